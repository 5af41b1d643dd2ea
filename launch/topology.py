"""TPU slices: generations, topologies, and Google Cloud's accelerator types."""

import dataclasses
import math

from gemma_encoder.inputs.errors import InputError, unknown

# The shapes that accelerator types map to. An accelerator type fixes only the number of chips, so
# requesting any other shape would yield a different slice from the planned one.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)


@dataclasses.dataclass(frozen=True)
class _Generation:
    """A TPU generation.

    Attributes:
        prefix: first part of its accelerator types.
        cores: units that its accelerator types count, per chip.
        largest_host: chips of its largest machine, which holds a whole slice.
        shapes: supported topologies.
        runtime_version: default software version of TPU VMs.
    """

    prefix: str
    cores: int
    largest_host: int
    shapes: tuple[str, ...]
    runtime_version: str


GENERATIONS = {
    "v4": _Generation("v4", 2, 4, _CUBES, "tpu-ubuntu2204-base"),
    "v5e": _Generation("v5litepod", 1, 8, _FLAT, "v2-alpha-tpuv5-lite"),
    "v5p": _Generation("v5p", 2, 4, _CUBES, "v2-alpha-tpuv5"),
    "v6e": _Generation("v6e", 1, 8, _FLAT, "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice: a generation and the shape of its chip interconnect, written "v5e:8x8"."""

    generation: str
    shape: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parses "v5p:4x4x4"; raises InputError if no accelerator type has this topology."""
        generation, _, shape = text.partition(":")
        if generation not in GENERATIONS:
            raise unknown(f"TPU generation in --topology={text}", generation, GENERATIONS)
        shapes = GENERATIONS[generation].shapes
        if shape not in shapes:
            raise InputError(
                f"--topology={text}: {generation} comes as {', '.join(shapes)}; write e.g. v5e:8x8"
            )
        return cls(generation, shape)

    @property
    def chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name of the slice, e.g. v5litepod-64 for v5e:8x8.

        v4 and v5p count cores, two per chip: v5p:4x4x4 is v5p-128.
        """
        generation = GENERATIONS[self.generation]
        return f"{generation.prefix}-{self.chips * generation.cores}"

    def hosts(self, largest: int) -> int:
        """Returns the number of machines in the slice.

        A slice consists of machines with four chips each, unless a single machine holds all of it.

        Args:
            largest: the most chips that the platform offers on one machine.
        """
        if self.chips <= min(largest, GENERATIONS[self.generation].largest_host):
            return 1
        return self.chips // 4
