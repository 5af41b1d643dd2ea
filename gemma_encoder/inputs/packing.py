"""Sequence packing: several texts share a row.

A block is the rows that one reader fills of one micro-batch. A packing group is one text, or all
texts of a ranking list: they may go to different rows, but never to different blocks. Groups wait
in a pool in order of arrival. A block is filled from the pool by best fit, the oldest group first,
so that no group waits indefinitely. The record indices of waiting groups are part of a reader's
state, so that a stream resumes exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.batch import Batch, BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import NO_TARGETS


class Segment(NamedTuple):
    """A tokenized text with its labels, ready to be packed."""

    tokens: np.ndarray  # [length] int32, bos and eos included
    task_id: int
    label: float
    example_id: int
    role: int = 0  # index into `task.ROLES`
    targets: np.ndarray = NO_TARGETS  # [width] float32, a vector label


class PackingGroup(NamedTuple):
    """Segments that must not be split between blocks: one text, or all texts of one list."""

    segments: tuple[Segment, ...]
    is_list: bool = False
    record_index: int = -1  # in the reader's order

    @property
    def num_tokens(self) -> int:
        """Total number of tokens of the segments."""
        return sum(len(segment.tokens) for segment in self.segments)


class Packer:
    """Packs groups of segments into blocks of a fixed shape.

    Args:
        shape: shape of a block. `segments=1` means no packing: one text per row.
        padding: side of the padding, "right" or "left".
        lookahead: a block is filled once the pool holds the tokens, segments or lists of this many
            blocks. A larger pool fills rows better and reorders texts more.
    """

    LOOKAHEAD = 3.0

    def __init__(self, shape: BatchShape, padding: str = "right", lookahead: float = LOOKAHEAD):
        if padding not in ("left", "right"):
            raise InputError(f"padding must be 'left' or 'right', got {padding!r}")
        self.shape = shape
        self.padding = padding
        self.lookahead = lookahead
        self._pool: list[PackingGroup] = []
        self._pool_tokens = 0
        self._pool_segments = 0
        self._pool_lists = 0

    def add(self, group: PackingGroup) -> None:
        """Appends a group to the pool; raises InputError if it cannot fit in any block."""
        self._check_fits(group)
        self._pool.append(group)
        self._update_totals(group, 1)

    def _check_fits(self, group: PackingGroup) -> None:
        shape = self.shape
        lengths = [len(segment.tokens) for segment in group.segments]
        if not lengths or not all(lengths):
            raise InputError("a group needs at least one text, and every text at least one token")
        if max(lengths) > shape.row_length:
            raise InputError(
                f"a text of {max(lengths)} tokens does not fit in a row of {shape.row_length}; "
                "raise batch.row_length or lower max_length"
            )
        if group.is_list and len(lengths) > shape.list_size:
            raise InputError(
                f"a list of {len(lengths)} documents exceeds the batch's "
                f"list_size={shape.list_size}"
            )
        if len(lengths) > 1 and _best_fit(group, *self._empty_rows()) is None:
            raise InputError(
                f"{len(lengths)} texts of one list, {group.num_tokens} tokens in total, do not fit "
                f"in {shape.rows} rows of {shape.row_length} tokens and {shape.segments} segments; "
                "raise batch.rows or lower ranking.list_size"
            )

    def _empty_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the free tokens and the free segment slots of each row of an empty block."""
        shape = self.shape
        return np.full(shape.rows, shape.row_length), np.full(shape.rows, shape.segments)

    def _update_totals(self, group: PackingGroup, sign: int) -> None:
        self._pool_tokens += sign * group.num_tokens
        self._pool_segments += sign * len(group.segments)
        self._pool_lists += sign * group.is_list

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def ready(self) -> bool:
        """True if the pool is large enough to fill a block well."""
        shape = self.shape
        return (
            self._pool_tokens >= self.lookahead * shape.rows * shape.row_length
            or self._pool_segments >= self.lookahead * shape.rows * shape.segments
            or self._pool_lists >= self.lookahead * shape.groups
        )

    def emit(self) -> Batch:
        """Fills one block from the pool; slots that no segment fits stay empty."""
        shape = self.shape
        free, slots = self._empty_rows()
        contents: list[list[tuple[Segment, int, int]]] = [[] for _ in range(shape.rows)]
        waiting: list[PackingGroup] = []
        num_lists = 0
        for index, group in enumerate(self._pool):
            if not slots.any() or not free.any():
                waiting.extend(self._pool[index:])
                break
            if group.is_list and num_lists == shape.groups:
                waiting.append(group)
                continue
            rows = _best_fit(group, free, slots)
            if rows is None:
                waiting.append(group)
                continue
            group_id = num_lists if group.is_list else -1
            for list_slot, (segment, row) in enumerate(zip(group.segments, rows, strict=True)):
                contents[row].append((segment, group_id, list_slot))
            num_lists += group.is_list
            self._update_totals(group, -1)
        self._pool = waiting
        return _to_batch(contents, shape, self.padding)

    @property
    def waiting(self) -> Sequence[PackingGroup]:
        """Groups in the pool, in order of arrival."""
        return self._pool


def _best_fit(group: PackingGroup, free: np.ndarray, slots: np.ndarray) -> list[int] | None:
    """Assigns each segment, the longest first, to the fullest row that it fits in.

    Args:
        group: the segments to assign.
        free: free tokens of each row, [rows]; updated.
        slots: free segment slots of each row, [rows]; updated.

    Returns:
        The row of each segment, or None with `free` and `slots` unchanged if the group does not
        fit.
    """
    lengths = [len(segment.tokens) for segment in group.segments]
    rows = [0] * len(lengths)
    assigned = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = np.where((free >= length) & (slots > 0), free, np.iinfo(free.dtype).max)
        row = int(fitting.argmin())
        if free[row] < length or not slots[row]:
            for assigned_row, assigned_length in assigned:
                free[assigned_row] += assigned_length
                slots[assigned_row] += 1
            return None
        free[row] -= length
        slots[row] -= 1
        assigned.append((row, length))
        rows[index] = row
    return rows


def _to_batch(
    contents: Sequence[Sequence[tuple[Segment, int, int]]], shape: BatchShape, padding: str
) -> Batch:
    """Builds a batch from the (segment, group id, list slot) triples of each row."""
    batch = empty_batch(shape)
    for row, content in enumerate(contents):
        used = sum(len(segment.tokens) for segment, _, _ in content)
        start = shape.row_length - used if padding == "left" else 0
        for slot, (segment, group_id, list_slot) in enumerate(content):
            end = start + len(segment.tokens)
            batch.tokens[row, start:end] = segment.tokens
            batch.segment_ids[row, start:end] = slot + 1
            batch.positions[row, start:end] = np.arange(end - start)
            batch.task_id[row, slot] = segment.task_id
            batch.label[row, slot] = segment.label
            batch.group_id[row, slot] = group_id
            batch.list_slot[row, slot] = list_slot if group_id >= 0 else 0
            batch.example_id[row, slot] = segment.example_id
            batch.weight[row, slot] = 1.0
            batch.role[row, slot] = segment.role
            batch.targets[row, slot, : len(segment.targets)] = segment.targets
            start = end
    return batch
