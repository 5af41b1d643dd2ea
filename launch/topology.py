"""Slices of TPUs: generations, the shapes that their chips are wired in, and Google Cloud's names."""

import dataclasses
import math

from gemma_encoder.inputs.errors import InputError, unknown

# The shapes that an accelerator type stands for; any other shape of as many chips would be another one than was planned for.
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
    prefix: str  # of accelerator types
    cores: int  # an accelerator type counts these, per chip
    largest_host: int  # chips of its largest machine, which holds a whole slice
    shapes: tuple[str, ...]
    runtime_version: str  # of TPU VMs


GENERATIONS = {
    "v4": _Generation("v4", 2, 4, _CUBES, "tpu-ubuntu2204-base"),
    "v5e": _Generation("v5litepod", 1, 8, _FLAT, "v2-alpha-tpuv5-lite"),
    "v5p": _Generation("v5p", 2, 4, _CUBES, "v2-alpha-tpuv5"),
    "v6e": _Generation("v6e", 1, 8, _FLAT, "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: a TPU generation and the shape in which its chips are wired, written "v5e:8x8"."""

    generation: str
    shape: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "v5p:4x4x4"; raises InputError for what no accelerator type stands for."""
        generation, _, shape = text.partition(":")
        if generation not in GENERATIONS:
            raise unknown(f"TPU generation in --topology={text}", generation, GENERATIONS)
        if shape not in GENERATIONS[generation].shapes:
            raise InputError(
                f"--topology={text}: {generation} comes as {', '.join(GENERATIONS[generation].shapes)}; write e.g. v5e:8x8"
            )
        return cls(generation, shape)

    @property
    def chips(self) -> int:
        """Chips of a slice."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name for it: v5e:8x8 is v5litepod-64; v5p:4x4x4 is v5p-128, since v4 and v5p count cores, two a chip."""
        generation = GENERATIONS[self.generation]
        return f"{generation.prefix}-{self.chips * generation.cores}"

    def hosts(self, largest: int) -> int:
        """Machines of a slice: of four chips each, unless one holds all of it; `largest` is the most chips that a machine may have."""
        return (
            1
            if self.chips <= min(largest, GENERATIONS[self.generation].largest_host)
            else self.chips // 4
        )
