"""The Batch: the one contract between data, model, losses and evaluation.

Shapes: B rows, L tokens per row, S segments (texts) per row, G lists per batch, K vector-label
width. Without packing S = 1. The same layout covers either padding side, packing, mixtures, lists
of documents and incomplete last batches.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.errors import InputError


class Batch(NamedTuple):
    """A batch, or one reader's block of its rows.

    Fields are numpy arrays on the host and JAX arrays on devices.

    Attributes:
        tokens: [B, L] int32 token ids.
        segment_ids: [B, L] int32; 0 for padding, else 1 … S.
        positions: [B, L] int32 position within the segment, from 0.
        task_id: [B, S] int32.
        label: [B, S] float32 class index, regression target in [0, 1], or relevance grade.
        group_id: [B, S] int32 list that a ranking segment belongs to, 0 … G - 1 within a
            micro-batch; -1 outside ranking.
        list_slot: [B, S] int32 index of the segment within that list.
        example_id: [B, S] int32 index into the task's table of examples on the host.
        weight: [B, S] float32; 0 for an empty slot.
        role: [B, S] int32 index into `task.ROLES`, 0 for none.
        targets: [B, S, K] float32 vector labels (multi-hot); K is 0 if no task has one.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    task_id: np.ndarray
    label: np.ndarray
    group_id: np.ndarray
    list_slot: np.ndarray
    example_id: np.ndarray
    weight: np.ndarray
    role: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static shape of a batch, or of one reader's block.

    Attributes:
        rows: B.
        row_length: L, in tokens.
        segments: S, the maximum number of texts per row.
        groups: G, the maximum number of lists per batch.
        list_size: maximum number of documents per list.
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
            value = getattr(self, field.name)
            minimum = 0 if field.name == "targets" else 1
            if value < minimum:
                raise InputError(f"batch {field.name} must be at least {minimum}, got {value}")

    def split(self, parts: int) -> "BatchShape":
        """Returns the shape of one of `parts` equal blocks: one per reader and micro-batch."""
        if self.rows % parts or self.groups % parts:
            raise InputError(
                f"readers x micro-batches = {parts} cannot share {self.rows} rows and "
                f"{self.groups} lists evenly; use multiples of {parts}"
            )
        return dataclasses.replace(self, rows=self.rows // parts, groups=self.groups // parts)


def empty_batch(shape: BatchShape) -> Batch:
    """Returns a batch of padding, with every slot empty."""
    tokens = (shape.rows, shape.row_length)
    slots = (shape.rows, shape.segments)
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
    """Concatenates blocks, with `group_id` shifted so that lists of different blocks differ.

    Args:
        blocks: adjacent blocks of one global batch.
        groups_per_block: G of each block.
        first: index of `blocks[0]` among all blocks of the global batch.
    """
    shifted = []
    for index, block in enumerate(blocks, first):
        group_id = np.where(block.group_id < 0, -1, block.group_id + index * groups_per_block)
        shifted.append(block._replace(group_id=group_id.astype(np.int32)))
    return Batch(*(np.concatenate(field) for field in zip(*shifted, strict=True)))
