"""Memory and roofline figures of a planned training step, and their report for the terminal."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from gemma_encoder.launch import hlo

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and time of a training step on a TPU topology.

    Attributes:
        size, topology, slices, mesh, rows, row_length, micro_batches, remat: the planned setup.
        chips: number of chips, over all slices.
        parameters, optimizer, other_arguments, temporaries: bytes per chip.
        peak: bytes per chip that are in use at the same time.
        memory: bytes of memory per chip.
        model_flops: FLOPs of the forward and backward passes over all tokens of a step, on all
            chips.
        program_flops: FLOPs of all matrix products of the program, on all chips, including remat's
            recomputation and attention over whole rows.
        collectives: kind, shape, size in bytes, group, times and traffic of each collective.
        seconds_compute, seconds_memory, seconds_links: time of each resource alone, see `seconds`.
        compile_seconds: compile time on this machine.
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
        """True if the step's peak memory does not exceed the chip's memory."""
        return self.peak <= self.memory

    @property
    def seconds(self) -> float:
        """Roofline lower bound of the step time.

        Compute, memory and links run at their published peaks and overlap fully, so the slowest of
        the three determines the time.
        """
        return max(self.seconds_compute, self.seconds_memory, self.seconds_links)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all chips at the roofline step time."""
        return self.rows * self.row_length / self.seconds

    @property
    def utilization(self) -> float:
        """Model FLOP utilization at the roofline step time."""
        return self.model_flops / self.program_flops * self.seconds_compute / self.seconds

    def figures(self) -> dict[str, Any]:
        """Returns all fields and derived figures, for JSON."""
        derived = {
            "fits": self.fits,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "utilization": self.utilization,
        }
        return {**dataclasses.asdict(self), **derived}

    def lines(self) -> Iterator[str]:
        """Yields the lines of a report for the terminal."""
        yield from self._setup_lines()
        yield ""
        yield from self._memory_lines()
        yield ""
        yield "compute per step, all chips"
        yield f"  model FLOPs {self.model_flops:.3g}"
        yield (
            f"  program FLOPs {self.program_flops:.3g}, "
            "with recomputation and attention over whole rows"
        )
        yield ""
        yield "communication per step and chip"
        yield from self._collective_lines()
        yield ""
        yield from self._time_lines()

    def _setup_lines(self) -> Iterator[str]:
        data, fsdp, tensor = self.mesh
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        yield (
            f"{self.size} on {self.topology}{slices}: {self.chips} chips, "
            f"data {data} x fsdp {fsdp} x tensor {tensor}"
        )
        split = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        yield (
            f"{self.rows} x {self.row_length} tokens per step{split}, remat {self.remat}; "
            f"compiled in {self.compile_seconds:.0f} s"
        )

    def _memory_lines(self) -> Iterator[str]:
        yield "memory per chip"
        for name, value in (
            ("parameters", self.parameters),
            ("optimizer state", self.optimizer),
            ("batch and other arguments", self.other_arguments),
            ("activations and other temporaries", self.temporaries),
        ):
            yield f"  {name:<34}{value / GIB:>8.2f} GiB"
        left = (self.memory - self.peak) / GIB
        if self.fits:
            verdict = f"fits, {left:.2f} GiB to spare"
        else:
            verdict = f"does NOT fit, {-left:.2f} GiB too much"
        yield f"  {'peak':<34}{self.peak / GIB:>8.2f} GiB of {self.memory / GIB:.0f}: {verdict}"

    def _collective_lines(self) -> Iterator[str]:
        for kind in hlo.COLLECTIVE_KINDS:
            same_kind = [item for item in self.collectives if item["kind"] == kind]
            if not same_kind:
                continue
            times = sum(item["times"] for item in same_kind)
            traffic = sum(item["traffic"] for item in same_kind)
            largest = same_kind[0]
            yield (
                f"  {kind:<20}{times:>6} times {traffic / GIB:>9.2f} GiB sent; "
                f"most: {largest['shape']} {largest['times']} times"
            )

    def _time_lines(self) -> Iterator[str]:
        yield (
            f"at least {self.seconds:.3f} s per step (compute {self.seconds_compute:.3f} s, "
            f"memory {self.seconds_memory:.3f} s, links {self.seconds_links:.3f} s, "
            "at published peaks and fully overlapped)"
        )
        yield (
            f"at most {self.tokens_per_second:,.0f} tokens per second, "
            f"model FLOP utilization {self.utilization:.0%}"
        )
