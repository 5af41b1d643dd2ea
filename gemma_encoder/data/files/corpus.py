"""Texts by id, read from their file by offset: memory does not grow with the length of the texts.

The index of a collection (where each line begins, and the ids unless they simply count) is built in
one pass and kept, see `cache`.
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
    open_binary,
    read_lines,
)
from gemma_encoder.inputs.errors import InputError


class Layout(Protocol):
    """How a line holds an id and a text."""

    what: str  # the file's word for an id

    def ids(self, lines: Lines) -> Spans:
        """The id of every line; raises InputError for a line that is malformed."""

    def parse(self, line: str) -> tuple[str, str]:
        """Id and text of one line that `ids` has seen."""


class TsvLayout:
    """Two columns, e.g. pid and passage.

    Args:
        what: the file's word for the id.
        text: its word for the text.
    """

    def __init__(self, what: str, text: str):
        self.what, self._text = what, text

    def ids(self, lines: Lines) -> Spans:
        """The first column."""
        return columns(lines, (self.what, self._text))[0]

    def parse(self, line: str) -> tuple[str, str]:
        """The two columns."""
        name, _, text = line.partition("\t")
        return name, text


class Corpus:
    """Texts of a file by number (its lines, from 0) and by id. Reading is safe in threads.

    Args:
        path: the file, plain or compressed.
        layout: of its lines.
        in_memory: hold the file's bytes, which spares a small compressed file its plain copy in the
            cache.

    Raises:
        InputError: a line is malformed, an id comes twice, or the file is empty.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, *, in_memory: bool = False):
        self.path, self.what, self._layout = path, layout.what, layout
        what = f"index of every {layout.what}"
        self._arrays = cache.derive([path], what, self._build, cache.load_arrays)
        self.ids, self._offsets = Ids(self._arrays), self._arrays["offsets"]
        if in_memory:
            with open_binary(path) as file:
                self._content = file.read()
        else:
            self._content, self._file = b"", _decompressed(path).open("rb")

    def _build(self, folder: pathlib.Path) -> None:
        ids, end = IdWriter(folder, self.path, self._layout.what), 0
        for lines in read_lines(self.path):
            ids.add(self._layout.ids(lines))
            cache.save_array(folder, "offsets", lines.offset + lines.starts)
            end = lines.offset + len(lines.data)
        if not end:
            raise InputError(f"{self.path} is empty")
        cache.save_array(folder, "offsets", np.array([end], np.int64))
        ids.finish()

    def release(self) -> None:
        """Gives back the memory that looking up many ids has filled."""
        cache.release(self._arrays.values())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __contains__(self, name: str) -> bool:
        return self.ids.number(name) >= 0

    def __getitem__(self, name: str) -> str:
        number = self.ids.number(name)
        if number < 0:
            raise KeyError(name)
        return self.text(number)

    def text(self, number: int) -> str:
        """The text of one number."""
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        if self._content:
            line = self._content[start:end]
        else:  # pread, not seek and read: threads share the file
            line = os.pread(self._file.fileno(), end - start, start)
        name, text = "", ""
        if len(line) == end - start:
            with contextlib.suppress(ValueError):
                name, text = self._layout.parse(line.decode().removesuffix("\n").removesuffix("\r"))
        if name != self.ids[number]:
            raise InputError(
                f"{self.path} has changed since it was opened: line {number + 1} no longer begins "
                "where it did; start again"
            )
        return text


def _decompressed(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or the plain copy of a compressed file in the cache."""
    if path.suffix not in COMPRESSED:
        return path

    def decompress(folder: pathlib.Path) -> None:
        with open_binary(path) as compressed, (folder / path.stem).open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 1 << 20)

    return cache.keep([path], "text", decompress) / path.stem


class IdWriter:
    """Takes the ids of a file in its order and writes the arrays that `Ids` reads.

    Args:
        folder: gets the arrays.
        path: the file that the ids come from, one per line.
        what: the file's word for an id, e.g. "pid".
    """

    def __init__(self, folder: pathlib.Path, path: pathlib.Path, what: str):
        self._folder, self._path, self._what = folder, path, what
        self._count, self._bytes, self._first = 0, 0, 0
        self._counting = True
        self._hashes: list[np.ndarray] = []

    def add(self, ids: Spans) -> None:
        """The ids of the next lines."""
        values, canonical = _canonical(ids)
        if not self._count and len(values):
            self._first = int(values[0])
        expected = self._first + np.arange(self._count, self._count + len(values))
        self._counting &= bool(np.all(canonical & (values == expected)))
        self._hashes.append(ids.hashes())
        ends = self._bytes + np.cumsum(ids.lengths)
        cache.save_array(self._folder, "id_bytes", ids.joined())
        cache.save_array(self._folder, "id_ends", ends)
        self._count, self._bytes = self._count + len(values), int(ends[-1])

    def finish(self) -> None:
        """Completes the arrays; raises InputError for an id that came twice."""
        if self._counting:
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
        again: list[int] = []
        for distance in itertools.count(1):
            equal = np.flatnonzero(hashes[distance:] == hashes[:-distance])
            if not len(equal):
                break
            same = ids.spans(order[equal]).equal(ids.spans(order[equal + distance]))
            again += order[equal + distance][same].tolist()
        if again:
            number = min(again)
            raise InputError(
                f"{self._path}:{number + 1}: {self._what} {ids[number]!r} appears a second time"
            )


class Ids:
    """Numbers 0 … N - 1 by id, and ids by number.

    Args:
        arrays: as `IdWriter` wrote them: `id_range` where ids count, else the ids and their hashes
            in order.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._range = None
        if "id_range" in arrays:
            first, count = map(int, arrays["id_range"])
            self._range = range(first, first + count)
        else:
            self._hashes, self._order = arrays["id_hashes"], arrays["id_order"]
            self._bytes, self._ends = arrays["id_bytes"], arrays["id_ends"]

    def __len__(self) -> int:
        return len(self._ends if self._range is None else self._range)

    def __getitem__(self, number: int) -> str:
        if self._range is None:
            return self.spans(np.array([number])).text(0)
        return str(self._range[number])

    def spans(self, numbers: np.ndarray) -> Spans:
        """The ids of numbers, where they are stored."""
        starts = np.where(numbers > 0, self._ends[numbers - 1], 0)
        return Spans(self._bytes, starts, self._ends[numbers])

    def find(self, ids: Spans) -> np.ndarray:
        """[n] int32: the number of each id, -1 where there is none."""
        if self._range is not None:
            values, canonical = _canonical(ids)
            inside = canonical & (values >= self._range.start) & (values < self._range.stop)
            return np.where(inside, values - self._range.start, -1).astype(np.int32)
        hashes = ids.hashes()
        result = np.full(len(hashes), -1, np.int32)
        first, rest = np.searchsorted(self._hashes, hashes), np.arange(len(hashes))
        for distance in itertools.count():
            rest = rest[first[rest] + distance < len(self._hashes)]
            rest = rest[self._hashes[first[rest] + distance] == hashes[rest]]
            if not len(rest):
                break
            numbers = self._order[first[rest] + distance]
            same = Spans(ids.data, ids.starts[rest], ids.ends[rest]).equal(self.spans(numbers))
            result[rest[same]] = numbers[same]
            rest = rest[~same]
        return result

    def number(self, name: str) -> int:
        """The number of one id, -1 where there is none."""
        return int(self.find(Spans.of([name.encode()]))[0])


def _canonical(ids: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Values of ids, and which ones are written as Python writes a whole number from 0."""
    (values, valid), first = ids.integers(), ids.first()
    leads_with_zero = (first == ord("0")) & (ids.lengths > 1)
    return values, valid & (first != ord("-")) & ~leads_with_zero
