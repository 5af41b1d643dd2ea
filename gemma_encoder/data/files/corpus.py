"""Text collections with lookup by id; texts are read from their file by byte offset.

The index of a collection (byte offsets of the lines, and the ids unless they are consecutive
integers) is built in one pass and cached. Memory use does not depend on the length of the texts.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.files.lines import (
    COMPRESSED,
    Lines,
    Spans,
    columns,
    has_byte_order_mark,
    open_binary,
    read_lines,
)
from gemma_encoder.inputs.errors import InputError


class Layout(Protocol):
    """Format of the lines of a collection."""

    id_name: str  # name of the id column, for messages
    condition: str  # what `ids` checks only in this layout, for the name of the cached index

    def ids(self, lines: Lines) -> Spans:
        """Returns the id of every line; raises InputError for a malformed line."""

    def parse(self, line: str) -> tuple[str, str]:
        """Returns id and text of a line that `ids` has checked."""


class TsvLayout:
    """Two tab-separated columns, e.g. pid and passage, none of them empty.

    Args:
        id_name, text_name: names of the columns, for messages.
    """

    condition = ""

    def __init__(self, id_name: str, text_name: str):
        self.id_name = id_name
        self._text_name = text_name

    def ids(self, lines: Lines) -> Spans:
        """Returns the first column."""
        return columns(lines, (self.id_name, self._text_name))[0]

    def parse(self, line: str) -> tuple[str, str]:
        """Splits the line into its two columns."""
        text_id, _, text = line.partition("\t")
        return text_id, text


class Corpus:
    """Texts of a file by index (lines, from 0) and by id. Thread-safe.

    Args:
        path: the file, plain or compressed.
        layout: format of its lines.
        in_memory: keep the content of the file in memory. A small compressed file then needs no
            decompressed copy in the cache.

    Raises:
        InputError: a line is malformed, an id is repeated, or the file is empty.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, *, in_memory: bool = False):
        self.path = path
        self.id_name = layout.id_name
        self._layout = layout
        # Indexes made by earlier versions took the mark for a part of the first id.
        suffix = " after the byte order mark" if has_byte_order_mark(path) else ""
        description = f"index of every {layout.id_name}{suffix}{layout.condition}"
        self._arrays = cache.derive([path], description, self._build, cache.load_arrays)
        self._offsets = self._arrays["offsets"]
        self.ids = Ids(self._arrays)
        self._content = b""
        if in_memory:
            with open_binary(path) as file:
                self._content = file.read()
        else:
            self._file = _decompressed(path).open("rb")

    def _build(self, folder: pathlib.Path) -> None:
        """Writes the arrays of the index."""
        ids = IdWriter(folder, self.path, self._layout.id_name)
        end = 0
        for lines in read_lines(self.path):
            ids.add(self._layout.ids(lines), lines.positions)
            cache.save_array(folder, "offsets", lines.offsets)
            end = lines.end
        if not end:
            raise InputError(f"{self.path} is empty")
        cache.save_array(folder, "offsets", np.array([end], np.int64))
        ids.finish()

    def copy_ids(self, folder: pathlib.Path) -> None:
        """Writes the ids to an empty folder, as the arrays that `Ids` reads."""
        for name, values in self._arrays.items():
            if name != "offsets":
                cache.save_array(folder, name, values)

    def release(self) -> None:
        """Releases memory used by the index, after many lookups."""
        cache.release(self._arrays.values())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __contains__(self, text_id: str) -> bool:
        return self.ids.index(text_id) >= 0

    def __getitem__(self, text_id: str) -> str:
        index = self.ids.index(text_id)
        if index < 0:
            raise KeyError(text_id)
        return self.text(index)

    def text(self, index: int) -> str:
        """Returns the text at an index.

        Raises:
            InputError: the file has changed since it was opened.
        """
        start = int(self._offsets[index])
        end = int(self._offsets[index + 1])
        if self._content:
            line = self._content[start:end]
        else:  # threads share the file, so seek and read would race
            line = os.pread(self._file.fileno(), end - start, start)
        text_id = None
        if len(line) == end - start:
            with contextlib.suppress(ValueError):
                line = line.partition(b"\n")[0].decode().removesuffix("\r")  # blank lines follow
                text_id, text = self._layout.parse(line)
        if text_id != self.ids[index]:
            raise InputError(
                f"{self.path} has changed since it was opened: line {index + 1}, blank "
                "ones not counted, has moved; run again"
            )
        return text


def _decompressed(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a plain file, or of the decompressed copy in the cache."""
    if path.suffix not in COMPRESSED:
        return path

    def decompress(folder: pathlib.Path) -> None:
        with open_binary(path) as compressed, (folder / path.stem).open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 1 << 20)

    return cache.keep([path], "text", decompress) / path.stem


class IdWriter:
    """Writes the ids of a file, in order, as the arrays that `Ids` reads.

    Args:
        folder: receives the arrays.
        path: the file of the ids, one per line.
        id_name: name of the id column for messages, e.g. "pid".
    """

    def __init__(self, folder: pathlib.Path, path: pathlib.Path, id_name: str):
        self._folder = folder
        self._path = path
        self._id_name = id_name
        self._count = 0
        self._num_bytes = 0
        self._first = 0
        self._is_consecutive = True
        self._hashes: list[np.ndarray] = []
        self._gaps: list[tuple[int, int]] = []  # index of an id after skipped lines, its line

    def add(self, ids: Spans, positions: np.ndarray | None = None) -> None:
        """Writes the ids of the next lines; `positions` are their lines in the file, from 1."""
        if positions is not None:
            self._note_gaps(positions)
        values, is_canonical = _canonical(ids)
        if not self._count and len(values):
            self._first = int(values[0])
        expected = self._first + np.arange(self._count, self._count + len(values))
        self._is_consecutive &= bool(np.all(is_canonical & (values == expected)))
        self._hashes.append(ids.hashes())
        ends = self._num_bytes + np.cumsum(ids.lengths)
        cache.save_array(self._folder, "id_bytes", ids.joined())
        cache.save_array(self._folder, "id_ends", ends)
        self._count += len(values)
        self._num_bytes = int(ends[-1])

    def _note_gaps(self, positions: np.ndarray) -> None:
        """Remembers after which ids blank lines were skipped."""
        skipped = positions - np.arange(self._count, self._count + len(positions))
        before = self._gaps[-1][1] - self._gaps[-1][0] if self._gaps else 1
        for index in np.flatnonzero(np.diff(skipped, prepend=before)):
            self._gaps.append((self._count + int(index), int(positions[index])))

    def _line(self, index: int) -> int:
        """Returns the line of an id in the file."""
        line = index + 1
        for first, position in self._gaps:
            line = position + index - first if first <= index else line
        return line

    def finish(self) -> None:
        """Completes the arrays; raises InputError for a repeated id."""
        if self._is_consecutive:
            for path in self._folder.glob("id_*"):
                path.unlink()
            bounds = np.array([self._first, self._count], np.int64)
            cache.save_array(self._folder, "id_range", bounds)
            return
        hashes = np.concatenate(self._hashes)
        self._hashes = []
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        hashes = hashes[order]
        cache.save_array(self._folder, "id_hashes", hashes)
        cache.save_array(self._folder, "id_order", order)
        ids = Ids(cache.load_arrays(self._folder))
        repeated: list[int] = []
        # Equal ids have equal hashes, which are adjacent here, as are the rare collisions.
        for distance in itertools.count(1):
            candidates = np.flatnonzero(hashes[distance:] == hashes[:-distance])
            if not len(candidates):
                break
            later = order[candidates + distance]
            is_equal = ids.spans(order[candidates]).equal(ids.spans(later))
            repeated += later[is_equal].tolist()
        if repeated:
            index = min(repeated)
            raise InputError(
                f"{self._path}:{self._line(index)}: {self._id_name} {ids[index]!r} appears a "
                "second time"
            )


class Ids:
    """Bidirectional mapping between ids and indices 0 … N - 1.

    Args:
        arrays: written by `IdWriter`: `id_range` if the ids are consecutive integers, otherwise the
            ids and their sorted hashes.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._range = None
        if "id_range" in arrays:
            first, count = map(int, arrays["id_range"])
            self._range = range(first, first + count)
        else:
            self._hashes = arrays["id_hashes"]
            self._order = arrays["id_order"]
            self._bytes = arrays["id_bytes"]
            self._ends = arrays["id_ends"]

    def __len__(self) -> int:
        return len(self._ends if self._range is None else self._range)

    def __getitem__(self, index: int) -> str:
        if self._range is None:
            return self.spans(np.array([index])).text(0)
        return str(self._range[index])

    def spans(self, indices: np.ndarray) -> Spans:
        """Returns the stored ids at the given indices."""
        starts = np.where(indices > 0, self._ends[indices - 1], 0)
        return Spans(self._bytes, starts, self._ends[indices])

    def texts(self, indices: np.ndarray) -> list[str]:
        """Returns the ids at the given indices."""
        if self._range is None:
            spans = self.spans(indices)
            return [spans.text(index) for index in range(len(indices))]
        return [str(self._range[index]) for index in indices]

    def find(self, ids: Spans) -> np.ndarray:
        """Returns [n] int32, the index of each id, -1 for unknown ids."""
        if self._range is not None:
            values, is_canonical = _canonical(ids)
            is_inside = is_canonical & (values >= self._range.start) & (values < self._range.stop)
            return np.where(is_inside, values - self._range.start, -1).astype(np.int32)
        hashes = ids.hashes()
        result = np.full(len(hashes), -1, np.int32)
        first = np.searchsorted(self._hashes, hashes)
        pending = np.arange(len(hashes))  # ids that are not resolved yet
        for distance in itertools.count():  # beyond 0 only after collisions of hashes
            pending = pending[first[pending] + distance < len(self._hashes)]
            pending = pending[self._hashes[first[pending] + distance] == hashes[pending]]
            if not len(pending):
                break
            indices = self._order[first[pending] + distance]
            pending_ids = Spans(ids.data, ids.starts[pending], ids.ends[pending])
            is_equal = pending_ids.equal(self.spans(indices))
            result[pending[is_equal]] = indices[is_equal]
            pending = pending[~is_equal]
        return result

    def index(self, text_id: str) -> int:
        """Returns the index of one id, -1 if it is unknown."""
        return int(self.find(Spans.of([text_id.encode()]))[0])


def _canonical(ids: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Returns integer values of ids, and True for ids that are str() of an integer from 0."""
    values, is_integer = ids.integers()
    first = ids.first()
    has_leading_zero = (first == ord("0")) & (ids.lengths > 1)
    return values, is_integer & (first != ord("-")) & ~has_leading_zero
