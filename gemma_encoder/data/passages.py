"""Texts by id, read from their file by offset: what is in memory does not grow with the length of the texts.

The index of a collection (where each line begins, and the ids unless they simply count) is built in one pass and kept, see `cache`.
"""

import os
import pathlib
import shutil
from typing import Protocol

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.ids import Ids, IdWriter
from gemma_encoder.data.lines import Lines, Spans, columns, open_binary, read_lines
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


class Texts:
    """Texts of a file by number (its lines, from 0) and by id. Reading is safe in threads.

    Args:
        path: the file, plain or gz.
        layout: of its lines.
        in_memory: hold the file's bytes, which spares a small gz file its decompressed copy in the cache.

    Raises:
        InputError: a line is malformed, an id comes twice, or the file is empty.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, *, in_memory: bool = False):
        self.path, self.what, self._layout = path, layout.what, layout
        self._content = b""
        if in_memory:
            with open_binary(path) as file:
                self._content = file.read()
        arrays = cache.derive(
            [path],
            f"index of every {layout.what}",
            lambda place: self._build(place),
            cache.load_arrays,
        )
        self.ids, self._offsets, self._arrays = Ids(arrays), arrays["offsets"], arrays
        self._file = None if in_memory else _decompressed(path).open("rb")

    def _build(self, place: pathlib.Path) -> None:
        ids, end = IdWriter(place, self.path, self._layout.what), 0
        for lines in read_lines(self.path):
            ids.add(self._layout.ids(lines))
            cache.save_array(place, "offsets", lines.offset + lines.starts)
            end = lines.offset + len(lines.data)
        if not end:
            raise InputError(f"{self.path} is empty")
        cache.save_array(place, "offsets", np.array([end], np.int64))
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
        content = (
            self._content[start:end]
            if self._file is None
            else _read(self._file.fileno(), start, end)
        )
        try:
            name, text = self._layout.parse(
                content.decode("utf-8").removesuffix("\n").removesuffix("\r")
            )
        except ValueError:
            name, text = "", ""
        if name != self.ids[number]:
            raise InputError(
                f"{self.path} has changed since it was opened: line {number + 1} no longer begins where it did; start again"
            )
        return text


def _read(descriptor: int, start: int, end: int) -> bytes:
    """Those bytes of a file. pread, not seek and read: threads share the file."""
    content = os.pread(descriptor, end - start, start)
    while len(content) < end - start:
        more = os.pread(descriptor, end - start - len(content), start + len(content))
        if not more:
            break  # the file has become shorter
        content += more
    return content


def _decompressed(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or the plain copy of a gz file in the cache."""
    if path.suffix != ".gz":
        return path

    def decompress(place: pathlib.Path) -> None:
        with open_binary(path) as compressed, (place / path.stem).open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 1 << 20)

    return cache.keep([path], "text", decompress) / path.stem
