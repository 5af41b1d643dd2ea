"""Plans a run on TPUs without having one: compiles the training step for a TPU topology.

The program is `gemma-encoder plan`. A process that plans should set JAX_PLATFORMS=cpu before it
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

from gemma_encoder import terminal
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.launch import flops, hlo
from gemma_encoder.launch.chips import CHIPS, Chip
from gemma_encoder.launch.figures import GIB, Plan
from gemma_encoder.model import sharding
from gemma_encoder.training.build import build
from gemma_encoder.training.step import make_program

PLATFORM = "tpu"  # which is planned for, whatever this machine is
REMAT = ("none", "dots", "full")


def describe_topology(text: str, slices: int) -> tuple[Chip, list[jax.Device]]:
    """Returns the chip and the abstract devices of a topology such as "v5e:8x8"."""
    generation, _, shape = text.partition(":")
    if generation not in CHIPS or not shape:
        raise InputError(
            f"--topology={text}: plans are available for {', '.join(CHIPS)}; write e.g. v5e:8x8"
        )
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        description = topologies.get_topology_desc(text, platform=PLATFORM, **options)
    except Exception as error:  # libtpu raises its own exception types
        raise InputError(
            f"--topology={text}: {one_line(error)[:200]}; "
            "compiling for TPUs needs libtpu: pip install 'jax[tpu]'"
        ) from error
    return CHIPS[generation], list(description.devices)


@contextlib.contextmanager
def with_fields(
    config: ml_collections.ConfigDict, **fields: Any
) -> Iterator[ml_collections.ConfigDict]:
    """Yields a copy of a config with some fields set; `batch__rows` sets `batch.rows`."""
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
    """Compiles the training step of a config for a topology and analyzes it.

    Raises:
        InputError: the config, the topology or the mesh is invalid.
    """
    recipe = build(config, dry=True, platform=PLATFORM)
    chip, devices = describe_topology(topology, slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    recipe.check_rows(mesh)
    program = make_program(recipe, mesh, 1000, 100)
    began = time.monotonic()
    traced = program.step.trace(program.abstract, program.batch)
    compiled = _compile(traced)
    compile_seconds = time.monotonic() - began

    chips = len(devices)
    collectives = hlo.collectives(compiled.as_text(), chips)
    program_flops = flops.count(traced.jaxpr.jaxpr, chips)
    stream = recipe.stream
    tokens = stream.shape.rows * stream.shape.row_length
    forward_flops = recipe.encoder.transformer.forward_flops(tokens, stream.max_length)
    parameters = _bytes(program.abstract.parameters)
    optimizer = _bytes(program.abstract.optimizer)
    memory = compiled.memory_analysis()
    inputs_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # A lower bound: the state is read and written once, temporaries are written and read once.
    moved_bytes = inputs_and_outputs + 2 * memory.temp_size_in_bytes
    return Plan(
        size=config.model.size,
        topology=topology,
        slices=slices,
        mesh=tuple(mesh.shape.values()),
        rows=stream.shape.rows,
        row_length=stream.shape.row_length,
        micro_batches=stream.micro_batches,
        remat=recipe.encoder.remat,
        chips=chips,
        parameters=parameters,
        optimizer=optimizer,
        other_arguments=memory.argument_size_in_bytes - parameters - optimizer,
        temporaries=memory.temp_size_in_bytes,
        peak=inputs_and_outputs + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        memory=chip.memory,
        model_flops=3 * forward_flops,  # the backward pass takes twice the forward pass
        program_flops=program_flops,
        collectives=[{**dataclasses.asdict(item), "traffic": item.traffic} for item in collectives],
        seconds_compute=program_flops / chips / chip.peak_flops,
        seconds_memory=moved_bytes / chip.memory_bandwidth,
        seconds_links=_link_seconds(collectives, mesh, slices, chip),
        compile_seconds=compile_seconds,
    )


def _compile(traced: jax.stages.Traced) -> jax.stages.Compiled:
    try:
        return traced.lower(lowering_platforms=(PLATFORM,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the compiler cannot fit the step into the chips' memory: {one_line(error)[:300]}"
        ) from error


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree of abstract arrays on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _link_seconds(
    collectives: Sequence[hlo.Collective], mesh: Mesh, slices: int, chip: Chip
) -> float:
    """Returns the time of all collectives, executed one after another.

    A collective that crosses slices runs at the speed of the network between them.
    """
    slice_chips = mesh.size // slices
    return sum(
        collective.traffic / _bandwidth(collective, slices, slice_chips, chip)
        for collective in collectives
    )


def _bandwidth(collective: hlo.Collective, slices: int, slice_chips: int, chip: Chip) -> float:
    """Returns the bandwidth of the slowest connection that a collective uses."""
    exceeds_slice = collective.group > slice_chips
    if slices == 1:
        crosses_slices = exceeds_slice
    else:
        crosses_slices = exceeds_slice or collective.group in (slices, slices * slice_chips)
    return chip.network_bandwidth if crosses_slices else chip.link_bandwidth


def candidates(
    config: ml_collections.ConfigDict, chips: int, slices: int, memory: float
) -> Iterator[dict[str, Any]]:
    """Yields config fields worth trying.

    They combine batches of one to eight rows per chip, remat policies, and those meshes over which
    parameters and optimizer state fit in memory.

    Args:
        config: the config that the fields modify.
        chips: number of chips, over all slices.
        slices: number of slices.
        memory: bytes of memory per chip.
    """
    transformer = build(config, dry=True, platform=PLATFORM).encoder.transformer
    for tensor, replicas, remat, rows in itertools.product(
        (1, 2, 4), (1, 2, 4, 8), REMAT, (1, 2, 4, 8)
    ):
        data = slices * replicas
        if chips % (data * tensor):
            continue
        fsdp = chips // (data * tensor)
        # Parameters and AdamW's two moments, in float32.
        state_bytes = 12 * transformer.num_parameters / (fsdp * tensor)
        if state_bytes < memory:
            yield {
                "mesh": (data, fsdp, tensor),
                "batch__rows": rows * data * fsdp * config.batch.micro_batches,
                "model__remat": remat,
            }


def search(
    config: ml_collections.ConfigDict, topology: str, slices: int, seconds: float
) -> Plan | None:
    """Plans all candidates, printing a line for each.

    Args:
        config: the config.
        topology: topology of one slice, e.g. "v5e:8x8".
        slices: number of slices.
        seconds: time after which no further candidate is tried.

    Returns:
        The plan with the highest throughput that fits, None if none fits.
    """
    chip, devices = describe_topology(topology, slices)
    began = time.monotonic()
    best = None
    too_big: list[dict[str, Any]] = []
    all_fields = sorted(candidates(config, len(devices), slices, chip.memory), key=_search_order)
    for index, fields in enumerate(all_fields):
        if any(_needs_at_least(fields, failed) for failed in too_big):
            continue
        if time.monotonic() - began > seconds:
            remaining = len(all_fields) - index
            terminal.print_result(f"time is up; {remaining} of {len(all_fields)} were not tried")
            break
        plan = _try_candidate(config, fields, topology, slices)
        if plan is None or not plan.fits:
            too_big.append(fields)
        elif best is None or plan.tokens_per_second > best.tokens_per_second:
            best = plan
    return best


def _search_order(fields: dict[str, Any]) -> tuple[int, ...]:
    """Sort key of `search`: simple meshes first, then the candidates that need least memory.

    Candidates that need more memory than one that does not fit are skipped.
    """
    data, _, tensor = fields["mesh"]
    return tensor, data, fields["batch__rows"], -REMAT.index(fields["model__remat"])


def _needs_at_least(fields: dict[str, Any], failed: dict[str, Any]) -> bool:
    """Returns True if a candidate needs at least as much memory as one that failed."""
    remat = REMAT.index(fields["model__remat"])
    failed_remat = REMAT.index(failed["model__remat"])
    return (
        fields["mesh"] == failed["mesh"]
        and fields["batch__rows"] >= failed["batch__rows"]
        and remat <= failed_remat
    )


def _try_candidate(
    config: ml_collections.ConfigDict, fields: dict[str, Any], topology: str, slices: int
) -> Plan | None:
    """Plans a candidate and prints the result; None if it cannot be planned."""
    mesh, rows, remat = fields.values()
    label = f"mesh {mesh} rows {rows:>5} remat {remat:<5}"
    try:
        with with_fields(config, **fields) as candidate:
            plan = make_plan(candidate, topology, slices)
    except InputError as error:
        terminal.print_result(f"{label} not possible: {error}"[:160])
        return None
    verdict = "fits" if plan.fits else "too much"
    terminal.print_result(
        f"{label} {plan.peak / GIB:>6.1f} GiB {verdict}, "
        f"at most {plan.tokens_per_second:>12,.0f} tokens/s"
    )
    return plan
