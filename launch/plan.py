"""Plans a run on TPUs without one: compiles the step that training runs for a topology.

`gemma-encoder plan` is the program. A process that plans should set JAX_PLATFORMS=cpu before it
imports JAX, as the program does.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.launch import flops, hlo
from gemma_encoder.launch.chips import CHIPS, Chip
from gemma_encoder.model import sharding
from gemma_encoder.training.build import build
from gemma_encoder.training.step import make_program

REMAT = ("none", "dots", "full")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs of each chip, and how long it takes at least.

    Attributes:
        size, topology, slices, mesh, rows, row_length, micro_batches, remat: what was planned.
        chips: of all slices.
        parameters, optimizer, other_arguments, temporaries, peak, memory: bytes of a chip; `peak` is what is in use at most, `memory`
            what there is.
        model_flops: of forward and backward passes over all tokens of a step, all chips together.
        program_flops: of all the program's matrix products: with what remat computes again, and attention over whole rows.
        collectives: kind, shape, bytes, chips, and how often.
        seconds_compute, seconds_memory, seconds_links: what each takes alone, see `roofline`.
        compile_seconds: on this machine.
    """

    size: str
    topology: str
    slices: int
    mesh: tuple[int, ...]
    rows: int
    row_length: int
    micro_batches: int
    remat: str
    chips: int
    parameters: int
    optimizer: int
    other_arguments: int
    temporaries: int
    peak: int
    memory: float
    model_flops: float
    program_flops: float
    collectives: list[dict[str, Any]]
    seconds_compute: float
    seconds_memory: float
    seconds_links: float
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step's peak stays within the chip."""
        return self.peak <= self.memory

    @property
    def seconds(self) -> float:
        """The roofline: compute, memory and links at their published peaks and wholly overlapped, so the longest of the three."""
        return max(self.seconds_compute, self.seconds_memory, self.seconds_links)

    @property
    def tokens_per_second(self) -> float:
        """Of all chips, at that time."""
        return self.rows * self.row_length / self.seconds

    @property
    def utilization(self) -> float:
        """Model FLOPs against the chips' peak, at that time."""
        return self.model_flops / self.program_flops * self.seconds_compute / self.seconds

    def figures(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {
            "fits": self.fits,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "utilization": self.utilization,
        }
        return {**dataclasses.asdict(self), **derived}

    def lines(self) -> Iterator[str]:
        """The figures, for a person."""
        data, fsdp, tensor = self.mesh
        cut = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        yield f"{self.size} on {self.topology}{slices}: {self.chips} chips, data {data} x fsdp {fsdp} x tensor {tensor}"
        yield f"{self.rows} x {self.row_length} tokens a step{cut}, remat {self.remat}; compiled in {self.compile_seconds:.0f} s"
        yield ""
        yield "memory of a chip"
        for name, value in (
            ("parameters", self.parameters),
            ("optimiser state", self.optimizer),
            ("batch and the rest", self.other_arguments),
        ):
            yield f"  {name:<34}{value / GIB:>8.2f} GiB"
        yield f"  {'activations and other temporaries':<34}{self.temporaries / GIB:>8.2f} GiB"
        left = (self.memory - self.peak) / GIB
        verdict = (
            f"fits, {left:.2f} GiB to spare"
            if self.fits
            else f"does NOT fit, {-left:.2f} GiB too much"
        )
        yield f"  {'peak':<34}{self.peak / GIB:>8.2f} GiB of {self.memory / GIB:.0f}: {verdict}"
        yield ""
        yield "work of a step, all chips"
        yield f"  model FLOPs {self.model_flops:.3g}; the program's, with recomputation and attention over whole rows, {self.program_flops:.3g}"
        yield ""
        yield "between chips, a step and chip"
        for kind in hlo.KINDS:
            mine = [one for one in self.collectives if one["kind"] == kind]
            if mine:
                times, traffic = (
                    sum(one["times"] for one in mine),
                    sum(one["traffic"] for one in mine),
                )
                yield f"  {kind:<20}{times:>6} times {traffic / GIB:>9.2f} GiB sent; most: {mine[0]['shape']} {mine[0]['times']} times"
        yield ""
        parts = f"compute {self.seconds_compute:.3f} s, memory {self.seconds_memory:.3f} s, links {self.seconds_links:.3f} s"
        yield f"at least {self.seconds:.3f} s a step ({parts}, at published peaks and wholly overlapped)"
        yield f"at most {self.tokens_per_second:,.0f} tokens a second, model FLOP utilization {self.utilization:.0%}"


def describe_topology(text: str, slices: int) -> tuple[Chip, list[jax.Device]]:
    """The chips that "v5e:8x8" stands for, as devices to compile for."""
    generation, _, shape = text.partition(":")
    if generation not in CHIPS or not shape:
        raise InputError(
            f"--topology={text}: plans are made for {', '.join(CHIPS)}; write e.g. v5e:8x8"
        )
    try:
        found = topologies.get_topology_desc(
            text, platform="tpu", **({"num_slices": slices} if slices > 1 else {})
        )
    except Exception as error:  # libtpu raises its own kinds
        raise InputError(
            f"--topology={text}: {one_line(error)[:200]}; compiling for TPUs needs libtpu: pip install 'jax[tpu]'"
        ) from error
    return CHIPS[generation], list(found.devices)


@contextlib.contextmanager
def with_fields(
    config: ml_collections.ConfigDict, **fields: Any
) -> Iterator[ml_collections.ConfigDict]:
    """A copy of a config with some fields set, "batch__rows" being `batch.rows`."""
    copy = config.copy_and_resolve_references()
    with copy.ignore_type():
        for path, value in fields.items():
            *parents, field = path.split("__")
            node = copy
            for parent in parents:
                node = node[parent]
            node[field] = value
    yield copy


def make_plan(config: ml_collections.ConfigDict, topology: str, slices: int = 1) -> Plan:
    """Compiles a config's step for a topology and reads off what it needs.

    Raises:
        InputError: the config, the topology or the mesh cannot be used.
    """
    recipe = build(config, dry=True)
    chip, devices = describe_topology(topology, slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    recipe.check_rows(mesh)
    program = make_program(recipe, mesh, 1000, 100)
    began = time.monotonic()
    traced = program.step.trace(program.abstract, program.batch)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the compiler found no way to fit the step into the chips: {one_line(error)[:300]}"
        ) from error
    seconds = time.monotonic() - began
    memory, chips = compiled.memory_analysis(), len(devices)
    collectives = hlo.collectives(compiled.as_text(), chips)
    program_flops = flops.count(traced.jaxpr.jaxpr, chips)
    tokens = recipe.stream.shape.rows * recipe.stream.shape.row_length
    model_flops = 3 * recipe.encoder.transformer.forward_flops(tokens, recipe.stream.max_length)
    parameters, optimizer = _bytes(program.abstract.parameters), _bytes(program.abstract.optimizer)
    moved = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    )
    return Plan(
        size=config.model.size,
        topology=topology,
        slices=slices,
        mesh=tuple(mesh.shape.values()),
        rows=recipe.stream.shape.rows,
        row_length=recipe.stream.shape.row_length,
        micro_batches=recipe.stream.micro_batches,
        remat=recipe.encoder.remat,
        chips=chips,
        parameters=parameters,
        optimizer=optimizer,
        other_arguments=memory.argument_size_in_bytes - parameters - optimizer,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        memory=chip.memory,
        model_flops=model_flops,
        program_flops=program_flops,
        collectives=[{**dataclasses.asdict(one), "traffic": one.traffic} for one in collectives],
        seconds_compute=program_flops / chips / chip.peak_flops,
        # At least: the state is read and written once, and temporaries are written and read once.
        seconds_memory=moved / chip.memory_bandwidth,
        seconds_links=_seconds(collectives, mesh, slices, chip),
        compile_seconds=seconds,
    )


def _bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _seconds(collectives: Sequence[hlo.Collective], mesh: Mesh, slices: int, chip: Chip) -> float:
    """Of all collectives one after another; one over more chips than a slice has goes at the speed of the network between slices."""
    within = mesh.size // slices
    return sum(
        one.traffic
        / (
            chip.link_bandwidth
            if one.group <= within and slices == 1
            else _slowest(one, slices, within, chip)
        )
        for one in collectives
    )


def _slowest(one: hlo.Collective, slices: int, within: int, chip: Chip) -> float:
    crosses = one.group > within or one.group in (slices, slices * within)
    return chip.network_bandwidth if crosses else chip.link_bandwidth


def candidates(
    config: ml_collections.ConfigDict, chips: int, slices: int, memory: float
) -> Iterator[dict[str, Any]]:
    """What is worth trying: batches of one to eight rows a chip, remat policies, and meshes over which the state fits."""
    transformer = build(config, dry=True).encoder.transformer
    for tensor, replicas, remat, rows in itertools.product(
        (1, 2, 4), (1, 2, 4, 8), REMAT, (1, 2, 4, 8)
    ):
        data = slices * replicas
        if chips % (data * tensor):
            continue
        fsdp = chips // (data * tensor)
        state = (
            12 * transformer.num_parameters / (fsdp * tensor)
        )  # parameters and two moments in float32
        if state < memory:
            yield {
                "mesh": (data, fsdp, tensor),
                "batch__rows": rows * data * fsdp * config.batch.micro_batches,
                "model__remat": remat,
            }


def search(
    config: ml_collections.ConfigDict, topology: str, slices: int, seconds: float
) -> Plan | None:
    """Tries what is worth trying, printing each; the fastest that fits, None where none does."""
    chip, devices = describe_topology(topology, slices)
    began, best = time.monotonic(), None
    too_big: set[tuple] = set()
    tried = list(candidates(config, len(devices), slices, chip.memory))
    # The simplest meshes first; of a mesh, what saves most memory first: where that does not fit, nothing else will.
    tried.sort(
        key=lambda fields: (
            fields["mesh"][2],
            fields["mesh"][0],
            fields["batch__rows"],
            -REMAT.index(fields["model__remat"]),
        )
    )
    for place, fields in enumerate(tried):
        mesh, rows, remat = fields.values()
        if any(
            mesh == other and rows >= least and REMAT.index(remat) <= REMAT.index(policy)
            for other, least, policy in too_big
        ):
            continue
        if time.monotonic() - began > seconds:
            print(
                f"time is up; {len(tried) - place} of {len(tried)} were not looked at", flush=True
            )
            break
        try:
            with with_fields(config, **fields) as one:
                plan = make_plan(one, topology, slices)
        except InputError as error:
            print(
                f"mesh {mesh} rows {rows:>5} remat {remat:<5} not possible: {error}"[:160],
                flush=True,
            )
            too_big.add((mesh, rows, remat))
            continue
        verdict = f"{plan.peak / GIB:>6.1f} GiB {'fits' if plan.fits else 'too much'}, at most {plan.tokens_per_second:>12,.0f} tokens/s"
        print(f"mesh {mesh} rows {rows:>5} remat {remat:<5} {verdict}", flush=True)
        if not plan.fits:
            too_big.add((mesh, rows, remat))
        elif best is None or plan.tokens_per_second > best.tokens_per_second:
            best = plan
    return best
