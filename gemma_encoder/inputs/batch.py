"""The Batch: the one contract between data, model, losses and evaluation.

B rows, L tokens a row, S segments (texts) a row, G lists a batch. Without packing S = 1. Padding side, packing, mixtures, lists
of documents and ragged last batches are all the same case.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.errors import InputError


class Batch(NamedTuple):
    """A batch, or one reader's block of its rows. Fields are numpy arrays on the host and JAX arrays on devices."""

    tokens: np.ndarray  # [B, L] int32
    segment_ids: np.ndarray  # [B, L] int32: 0 where padding, else 1 … S
    positions: np.ndarray  # [B, L] int32: position inside its own segment, from 0
    task_id: np.ndarray  # [B, S] int32
    label: (
        np.ndarray
    )  # [B, S] float32: class index, regression target in [0, 1], or relevance grade
    group_id: (
        np.ndarray
    )  # [B, S] int32: the list that a ranking segment belongs to, 0 … G - 1; -1 outside ranking
    list_slot: np.ndarray  # [B, S] int32: its place in that list
    example_id: np.ndarray  # [B, S] int32: index into the task's table of examples on the host
    weight: np.ndarray  # [B, S] float32: 0 for an empty slot
    role: np.ndarray  # [B, S] int32: index into `task.ROLES`, 0 for none
    targets: np.ndarray  # [B, S, K] float32: vector labels (multi-hot); K is 0 where none is used


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a batch, or of one reader's block.

    Attributes:
        rows: B.
        row_length: L, in tokens.
        segments: S, the most texts that share a row.
        groups: G, the most lists in a batch.
        list_size: the most documents in a list.
        targets: K, the widest vector label of the tasks; 0 for none.
    """

    rows: int
    row_length: int
    segments: int = 1
    groups: int = 1
    list_size: int = 1
    targets: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name == "targets" else 1
            if getattr(self, field.name) < least:
                raise InputError(
                    f"batch {field.name} must be at least {least}, got {getattr(self, field.name)}"
                )

    def split(self, parts: int) -> "BatchShape":
        """The shape of one of `parts` equal blocks that fill a batch: one for each reader and micro-batch."""
        if self.rows % parts or self.groups % parts:
            raise InputError(
                f"readers x micro-batches = {parts} cannot share {self.rows} rows and {self.groups} lists evenly; use multiples of {parts}"
            )
        return dataclasses.replace(self, rows=self.rows // parts, groups=self.groups // parts)


def empty_batch(shape: BatchShape) -> Batch:
    """A batch of padding: every slot empty."""
    tokens, slots = (shape.rows, shape.row_length), (shape.rows, shape.segments)
    return Batch(
        tokens=np.zeros(tokens, np.int32),
        segment_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        task_id=np.zeros(slots, np.int32),
        label=np.zeros(slots, np.float32),
        group_id=np.full(slots, -1, np.int32),
        list_slot=np.zeros(slots, np.int32),
        example_id=np.full(slots, -1, np.int32),
        weight=np.zeros(slots, np.float32),
        role=np.zeros(slots, np.int32),
        targets=np.zeros((*slots, shape.targets), np.float32),
    )


def concatenate(blocks: Sequence[Batch], groups_per_block: int, first: int = 0) -> Batch:
    """The rows of `blocks` in order, lists renumbered so that every block keeps its own.

    Args:
        blocks: neighbouring blocks of one global batch.
        groups_per_block: G of each.
        first: the place of `blocks[0]` among all blocks of the global batch.
    """
    shifted = [
        block._replace(
            group_id=np.where(
                block.group_id < 0, -1, block.group_id + number * groups_per_block
            ).astype(np.int32)
        )
        for number, block in enumerate(blocks, first)
    ]
    return Batch(*(np.concatenate(field) for field in zip(*shifted, strict=True)))
