"""Lines of large text files, a block at a time: where they and their columns begin and end.

n lines, C columns, N bytes. Everything is an array: a Python object per line would take minutes and
gigabytes where this takes seconds and megabytes. A line ends with \\n or \\r\\n, the last one also
with the file.
"""

import contextlib
import dataclasses
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gemma_encoder.inputs.errors import InputError

BLOCK = 16 << 20  # bytes that are read at a time

_TAB, _NEWLINE, _RETURN, _SPACE = b"\t\n\r "
# First bytes of the characters that str.strip() removes, in UTF-8.
_BLANK = np.zeros(256, bool)
_BLANK[[character.encode()[0] for character in map(chr, range(0x3001)) if character.isspace()]] = (
    True
)


@dataclasses.dataclass(frozen=True)
class Spans:
    """Pieces of text in an array of bytes that are valid UTF-8.

    Attributes:
        data: [N] uint8.
        starts, ends: [n] int64, into `data`; ends are past the last byte.
    """

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: list[bytes]) -> "Spans":
        """Spans over texts of one's own."""
        lengths = np.array([len(text) for text in texts], np.int64)
        ends = np.cumsum(lengths)
        return cls(np.frombuffer(b"".join(texts), np.uint8), ends - lengths, ends)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, in bytes."""
        return self.ends - self.starts

    def text(self, index: int) -> str:
        """One piece."""
        return self.data[self.starts[index] : self.ends[index]].tobytes().decode()

    def joined(self) -> np.ndarray:
        """The bytes of all pieces, one after the other."""
        lengths = self.lengths
        shifts = np.repeat(self.ends - np.cumsum(lengths), lengths)
        return self.data[np.arange(len(shifts)) + shifts]

    def equal(self, other: "Spans") -> np.ndarray:
        """[n] bool: whether piece i of both is the same."""
        lengths = self.lengths
        same = lengths == other.lengths
        for offset in range(int(lengths[same].max(initial=0))):
            alive = np.flatnonzero(same & (lengths > offset))
            mine, others = self.starts[alive] + offset, other.starts[alive] + offset
            same[alive] = self.data[mine] == other.data[others]
        return same

    def first(self) -> np.ndarray:
        """[n] uint8: the first byte of each piece, 0 of an empty one."""
        result = np.zeros(len(self.starts), np.uint8)
        for filled, byte in self._bytes(1):
            result[filled] = byte
        return result

    def hashes(self) -> np.ndarray:
        """[n] uint64, FNV-1a of each piece."""
        result = np.full(len(self.starts), 0xCBF29CE484222325, np.uint64)
        for alive, byte in self._bytes():
            result[alive] = (result[alive] ^ byte) * np.uint64(0x100000001B3)
        return result

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """[n] int64 values of pieces that are whole numbers, and [n] bool: which ones are."""
        negative = self.first() == ord("-")
        digits = Spans(self.data, self.starts + negative, self.ends)
        valid = (digits.lengths > 0) & (digits.lengths <= 18)
        values = np.zeros(len(valid), np.int64)
        for alive, byte in digits._bytes(18):
            valid[alive] &= (byte >= ord("0")) & (byte <= ord("9"))
            values[alive] = values[alive] * 10 + (byte.astype(np.int64) - ord("0"))
        return np.where(negative, -values, values), valid

    def _bytes(self, most: int | None = None) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
        """For the first, second, … byte: which pieces are that long, and their bytes there."""
        lengths = self.lengths
        longest = int(lengths.max(initial=0))
        for offset in range(min(longest, most or longest)):
            longer = lengths > offset
            alive = slice(None) if longer.all() else np.flatnonzero(longer)
            yield alive, self.data[self.starts[alive] + offset]


@dataclasses.dataclass(frozen=True)
class Lines(Spans):
    """Whole lines of a file, without their breaks.

    Attributes:
        path: the file.
        offset: of `data` in the file (after decompression).
        number: of the first line, from 1.
    """

    path: pathlib.Path
    offset: int
    number: int

    def where(self, line: int) -> str:
        """Names one line in messages."""
        return f"{self.path}:{self.number + int(line)}"

    def without_first(self) -> "Lines":
        """All lines but the first."""
        start = int(self.starts[1]) if len(self.starts) > 1 else len(self.data)
        spans = self.data[start:], self.starts[1:] - start, self.ends[1:] - start
        return Lines(*spans, self.path, self.offset + start, self.number + 1)


COMPRESSED = (".gz", ".zst")  # endings of compressed files


def without_compression(name: str) -> str:
    """A file's name without the ending of its compression."""
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


@contextlib.contextmanager
def open_binary(path: pathlib.Path) -> Iterator[BinaryIO]:
    """The file, decompressed if its name ends in .gz or .zst.

    Raises:
        InputError: while it is read, where it is compressed and not whole.
    """
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield file
        else:
            import pyarrow as pa

            with pa.input_stream(str(path), compression="zstd") as file:
                yield file
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        kind = {".gz": "gzip", ".zst": "Zstandard"}[path.suffix]
        raise InputError(f"{path}: not a whole {kind} file ({error})") from error


def read_lines(path: pathlib.Path) -> Iterator[Lines]:
    """All lines of a file, gz or plain, block by block; raises InputError where it is no text."""
    rest, offset, number = b"", 0, 1
    with open_binary(path) as file:
        while True:
            block = file.read(BLOCK)
            content = rest + block
            size = content.rfind(b"\n") + 1 if block else len(content)
            content, rest = content[:size], content[size:]
            if content:
                yield (lines := _split(path, content, offset, number))
                offset, number = offset + size, number + len(lines.starts)
            if not block:
                return


def _split(path: pathlib.Path, content: bytes, offset: int, number: int) -> Lines:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start) - 1
        raise InputError(
            f"{path}:{line}: not valid UTF-8 ({error.reason} at byte {column} of the line)"
        ) from None
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    if data[-1] != _NEWLINE:
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    ends = ends - ((ends > starts) & (data[ends - 1] == _RETURN))
    return Lines(data, starts, ends, path, offset, number)


def columns(lines: Lines, names: tuple[str, ...], *, whitespace: bool = False) -> list[Spans]:
    """The columns of lines that all have the same ones, none blank.

    Args:
        lines: what to split.
        names: of the columns, for the message.
        whitespace: whether columns are separated by any run of tabs and spaces, and not by one tab.

    Raises:
        InputError: names the first line that has other columns.
    """
    separator = np.zeros(256, bool)
    separator[[_TAB, _NEWLINE, *([_SPACE] if whitespace else [])]] = True
    blank = np.ones(len(lines.data) + 2, bool)  # a separator before and after
    blank[1:-1] = separator[lines.data]
    blank[lines.ends + 1] = True  # the \r of a \r\n
    edges = np.flatnonzero(blank[1:] != blank[:-1])
    starts, ends = edges[0::2], edges[1::2]
    counts = np.diff(np.searchsorted(starts, np.append(lines.starts, len(lines.data))))
    first = _first(counts != len(names))
    whole = slice(0, first * len(names))
    starts, ends = starts[whole].reshape(-1, len(names)), ends[whole].reshape(-1, len(names))
    if not whitespace:  # one tab between neighbours, none before or after
        outer = (starts[:, 0] != lines.starts[:first]) | (ends[:, -1] != lines.ends[:first])
        first = _first(outer | (starts[:, 1:] != ends[:, :-1] + 1).any(axis=1))
    for suspect in np.flatnonzero(_BLANK[lines.data[starts[:first]]].any(axis=1)):
        line = Spans(lines.data, starts[suspect], ends[suspect])
        if not all(line.text(column).strip() for column in range(len(names))):
            first = int(suspect)
            break
    if first < len(lines.starts):
        line = lines.text(first)
        got = len(line.split() if whitespace else line.split("\t"))
        kind = "columns" if whitespace else "tab-separated columns, none empty"
        raise InputError(
            f"{lines.where(first)}: expected {len(names)} {kind} ({', '.join(names)}); "
            f"got {got}: {line[:80]!r}"
        )
    return [Spans(lines.data, starts[:, i], ends[:, i]) for i in range(len(names))]


def _first(wrong: np.ndarray) -> int:
    """The index of the first True, or past the end."""
    return int(wrong.argmax()) if wrong.any() else len(wrong)


def numbered(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its break) one by one, without a byte order mark."""
    for lines in read_lines(path):
        for number, line in enumerate(io.BytesIO(lines.data.tobytes()), lines.number):
            text = line.decode()
            yield number, text.removeprefix("\ufeff") if number == 1 else text
