"""Sequence packing: several texts share a row.

Units wait in a pool, in the order in which they came. A block of rows is filled from it by best fit, the oldest unit first, so
no unit waits for ever. A unit is one text, or the whole list of a ranking query: its texts may lie in several rows, but never in
two blocks. The numbers of what still waits are part of a reader's state, so a stream resumes exactly where it stopped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.batch import Batch, BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import NO_TARGETS


class Segment(NamedTuple):
    """One text, ready to be laid into a row."""

    tokens: np.ndarray  # [length] int32, bos and eos included
    task_id: int
    label: float
    example_id: int
    role: int = 0  # index into `task.ROLES`
    targets: np.ndarray = NO_TARGETS  # [width] float32, a vector label


class PackingGroup(NamedTuple):
    """What must not be split between batches: one text, or all the texts of one list."""

    segments: tuple[Segment, ...]
    is_list: bool = False
    number: int = -1  # of its record in a reader's order

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(len(segment.tokens) for segment in self.segments)


class Packer:
    """Lays units into blocks of a fixed shape.

    Args:
        shape: of a block. `segments=1` means no packing: every text has its own row.
        padding: the side of a row that padding takes, "right" or "left".
        lookahead: how many blocks' worth of tokens (or of segments) to gather before one is filled; more fills rows better and
            mixes the order of texts more.
    """

    LOOKAHEAD = 3.0

    def __init__(self, shape: BatchShape, padding: str = "right", lookahead: float = LOOKAHEAD):
        if padding not in ("left", "right"):
            raise InputError(f"padding must be 'left' or 'right', got {padding!r}")
        self.shape, self.padding, self.lookahead = shape, padding, lookahead
        self._pool: list[PackingGroup] = []
        self._pool_tokens = self._pool_segments = self._pool_lists = 0

    def add(self, unit: PackingGroup) -> None:
        """Puts a unit at the end of the pool. Raises InputError when no block of this shape could ever hold it."""
        if not unit.segments or not all(len(segment.tokens) for segment in unit.segments):
            raise InputError("a unit needs at least one text, and every text at least one token")
        longest = max(len(segment.tokens) for segment in unit.segments)
        if longest > self.shape.row_length:
            raise InputError(
                f"a text of {longest} tokens does not fit in a row of {self.shape.row_length}; raise batch.row_length or lower max_length"
            )
        if unit.is_list and len(unit.segments) > self.shape.list_size:
            raise InputError(
                f"a list of {len(unit.segments)} documents exceeds the batch's list_size={self.shape.list_size}"
            )
        if len(unit.segments) > 1 and _best_fit(unit, *self._empty_rows()) is None:
            shape = self.shape
            raise InputError(
                f"{len(unit.segments)} texts of one list, {unit.num_tokens} tokens in all, do not fit in {shape.rows} rows of "
                f"{shape.row_length} tokens and {shape.segments} segments; raise batch.rows or lower ranking.list_size"
            )
        self._pool.append(unit)
        self._count(unit, 1)

    def _empty_rows(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.shape.rows, self.shape.row_length), np.full(
            self.shape.rows, self.shape.segments
        )

    def _count(self, unit: PackingGroup, sign: int) -> None:
        self._pool_tokens += sign * unit.num_tokens
        self._pool_segments += sign * len(unit.segments)
        self._pool_lists += sign * unit.is_list

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def ready(self) -> bool:
        """Whether enough waits to fill a block well."""
        shape = self.shape
        return (
            self._pool_tokens >= self.lookahead * shape.rows * shape.row_length
            or self._pool_segments >= self.lookahead * shape.rows * shape.segments
            or self._pool_lists >= self.lookahead * shape.groups
        )

    def emit(self) -> Batch:
        """Fills one block from the pool; slots that nothing fits stay empty."""
        shape = self.shape
        free, slots = self._empty_rows()
        rows: list[list[tuple[Segment, int, int]]] = [[] for _ in range(shape.rows)]
        waiting, groups = [], 0
        for number, unit in enumerate(self._pool):
            if not slots.any() or not free.any():
                waiting.extend(self._pool[number:])
                break
            if unit.is_list and groups == shape.groups:
                waiting.append(unit)
                continue
            places = _best_fit(unit, free, slots)
            if places is None:
                waiting.append(unit)
                continue
            for slot, (segment, row) in enumerate(zip(unit.segments, places, strict=True)):
                rows[row].append((segment, groups if unit.is_list else -1, slot))
            groups += unit.is_list
            self._count(unit, -1)
        self._pool = waiting
        return _lay_out(rows, shape, self.padding)

    @property
    def waiting(self) -> Sequence[PackingGroup]:
        """The units of the pool, in order."""
        return self._pool


def _best_fit(unit: PackingGroup, free: np.ndarray, slots: np.ndarray) -> list[int] | None:
    """A row for every segment, the fullest that still holds it, or None with `free` and `slots` unchanged."""
    places = [0] * len(unit.segments)
    done = []
    for number in sorted(range(len(unit.segments)), key=lambda i: -len(unit.segments[i].tokens)):
        length = len(unit.segments[number].tokens)
        room = np.where((free >= length) & (slots > 0), free, np.iinfo(free.dtype).max)
        row = int(room.argmin())
        if free[row] < length or not slots[row]:
            for undo_row, undo_length in done:
                free[undo_row] += undo_length
                slots[undo_row] += 1
            return None
        free[row] -= length
        slots[row] -= 1
        done.append((row, length))
        places[number] = row
    return places


def _lay_out(
    rows: Sequence[Sequence[tuple[Segment, int, int]]], shape: BatchShape, padding: str
) -> Batch:
    """Writes (segment, group, list slot) triples into the arrays of a batch, row by row."""
    batch = empty_batch(shape)
    for row, content in enumerate(rows):
        used = sum(len(segment.tokens) for segment, _, _ in content)
        start = shape.row_length - used if padding == "left" else 0
        for slot, (segment, group, list_slot) in enumerate(content):
            end = start + len(segment.tokens)
            batch.tokens[row, start:end] = segment.tokens
            batch.segment_ids[row, start:end] = slot + 1
            batch.positions[row, start:end] = np.arange(end - start)
            batch.task_id[row, slot] = segment.task_id
            batch.label[row, slot] = segment.label
            batch.group_id[row, slot] = group
            batch.list_slot[row, slot] = list_slot if group >= 0 else 0
            batch.example_id[row, slot] = segment.example_id
            batch.weight[row, slot] = 1.0
            batch.role[row, slot] = segment.role
            batch.targets[row, slot, : len(segment.targets)] = segment.targets
            start = end
    return batch
