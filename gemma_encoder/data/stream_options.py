"""Options of a stream of batches: shapes, readers, seed."""

import dataclasses

from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Options of a stream of batches.

    Attributes:
        shape: shape of a global batch.
        max_length: maximum tokens of a text, bos and eos included.
        readers: number of independent readers that fill a batch, a multiple of the process count.
        seed: seed of shuffling, mixing and sampling.
        padding: side of a row that is padded, "left" or "right".
        micro_batches: equal parts of a global batch for gradient accumulation. A list is never
            split between them.
    """

    shape: BatchShape
    max_length: int
    readers: int = 1
    seed: int = 0
    padding: str = "right"
    micro_batches: int = 1

    @property
    def block(self) -> BatchShape:
        """Shape of one reader's part of one micro-batch."""
        return self.shape.split(self.readers * self.micro_batches)

    def __post_init__(self):
        if self.padding not in ("left", "right"):
            raise InputError(f"padding must be 'left' or 'right', got {self.padding!r}")
        if self.max_length < 3:
            raise InputError(
                f"max_length={self.max_length} leaves no room for a token between bos and eos"
            )
        if self.max_length > self.shape.row_length:
            raise InputError(
                f"max_length={self.max_length} exceeds batch.row_length={self.shape.row_length}"
            )
        if self.micro_batches < 1:
            raise InputError(f"batch.micro_batches must be at least 1, got {self.micro_batches}")
        _ = self.block
