"""The reader of all text files, block by block: lines, columns and numbers.

Shapes: n lines, C columns, N bytes. Lines are byte offsets in arrays instead of Python objects,
which takes seconds and megabytes in place of minutes and gigabytes.

One rule for every format: text is UTF-8, optionally after a byte order mark. Lines end with \\n or
\\r\\n, the last one also with the file; another \\r, or a NUL, is a character of the text. A blank
line, of whitespace only, is no row and is skipped, except where every line is a text (.txt) and
within quotes (CSV). A number is decimal, in ASCII digits, with an optional sign, fraction and
exponent; a whole number may have a fraction of zeros, as pandas writes it.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import math
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gemma_encoder.inputs.errors import InputError

BLOCK = 16 << 20  # bytes read at a time

_TAB, _NEWLINE, _RETURN, _SPACE = b"\t\n\r "
# First UTF-8 bytes of the characters that str.strip() removes.
_BLANK = np.zeros(256, bool)
_WHITESPACE = [character for character in map(chr, range(0x3001)) if character.isspace()]
_BLANK[[character.encode()[0] for character in _WHITESPACE]] = True


@dataclasses.dataclass(frozen=True)
class Spans:
    """Spans of text in an array of UTF-8 bytes.

    Attributes:
        data: [N] uint8.
        starts, ends: [n] int64, offsets into `data`; ends are exclusive.
    """

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: list[bytes]) -> "Spans":
        """Concatenates UTF-8 texts and returns their spans."""
        lengths = np.array([len(text) for text in texts], np.int64)
        ends = np.cumsum(lengths)
        return cls(np.frombuffer(b"".join(texts), np.uint8), ends - lengths, ends)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, in bytes."""
        return self.ends - self.starts

    def text(self, index: int) -> str:
        """Decodes one span."""
        return self.data[self.starts[index] : self.ends[index]].tobytes().decode()

    def joined(self) -> np.ndarray:
        """Concatenates the bytes of all spans."""
        lengths = self.lengths
        shifts = np.repeat(self.ends - np.cumsum(lengths), lengths)
        return self.data[np.arange(len(shifts)) + shifts]

    def equal(self, spans: "Spans") -> np.ndarray:
        """Compares spans elementwise; returns [n] bool."""
        lengths = self.lengths
        is_equal = lengths == spans.lengths
        for offset in range(int(lengths[is_equal].max(initial=0))):
            active = np.flatnonzero(is_equal & (lengths > offset))
            byte = self.data[self.starts[active] + offset]
            is_equal[active] = byte == spans.data[spans.starts[active] + offset]
        return is_equal

    def contain(self, byte: int) -> np.ndarray:
        """Returns [n] bool, True for spans with that byte."""
        offsets = np.flatnonzero(self.data == byte)
        return np.searchsorted(offsets, self.starts) < np.searchsorted(offsets, self.ends)

    def first(self) -> np.ndarray:
        """Returns [n] uint8, the first byte of each span, 0 for empty spans."""
        result = np.zeros(len(self.starts), np.uint8)
        for active, byte in self._bytes(1):
            result[active] = byte
        return result

    def hashes(self) -> np.ndarray:
        """Returns [n] uint64, the FNV-1a hash of each span."""
        result = np.full(len(self.starts), 0xCBF29CE484222325, np.uint64)
        for active, byte in self._bytes():
            result[active] = (result[active] ^ byte) * np.uint64(0x100000001B3)
        return result

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """Parses integers of up to 18 digits: [n] int64 values, and [n] bool, True if valid."""
        is_negative = self.first() == ord("-")
        digits = Spans(self.data, self.starts + is_negative, self.ends)
        is_valid = (digits.lengths > 0) & (digits.lengths <= 18)
        values = np.zeros(len(is_valid), np.int64)
        for active, byte in digits._bytes(18):
            is_valid[active] &= (byte >= ord("0")) & (byte <= ord("9"))
            values[active] = values[active] * 10 + (byte.astype(np.int64) - ord("0"))
        return np.where(is_negative, -values, values), is_valid

    def whole_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Parses whole numbers such as 3, +3 and 3.0: as `integers`, but not for ids."""
        values, is_valid = self.integers()
        for index in np.flatnonzero(~is_valid):
            value = parse_number(self.text(index))
            if value.is_integer() and abs(value) < 2**53:
                values[index] = int(value)
                is_valid[index] = True
        return values, is_valid

    def floats(self) -> tuple[np.ndarray, np.ndarray]:
        """Parses finite numbers: [n] float64 values, and [n] bool, True if valid."""
        import pyarrow as pa  # only here, so that reading a config does not import it

        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        buffers = pa.py_buffer(offsets), pa.py_buffer(self.joined())
        texts = pa.LargeStringArray.from_buffers(len(self.starts), *buffers)
        try:
            values = texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:  # which names no row
            texts = map(self.text, range(len(self.starts)))
            values = np.array([parse_number(text) for text in texts])
        return values, np.isfinite(values)

    def _bytes(self, limit: int | None = None) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
        """Yields, for each byte offset, the spans longer than it and their bytes at the offset."""
        lengths = self.lengths
        longest = int(lengths.max(initial=0))
        for offset in range(min(longest, limit or longest)):
            is_longer = lengths > offset
            active = slice(None) if is_longer.all() else np.flatnonzero(is_longer)
            yield active, self.data[self.starts[active] + offset]


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def parse_number(text: str) -> float:
    """Parses a decimal number, with or without blanks around it; returns NaN for other texts.

    Python's `float` also accepts digits of other scripts, underscores, "nan" and "infinity".
    """
    text = text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else math.nan


@dataclasses.dataclass(frozen=True)
class Lines(Spans):
    """Complete lines of a file that are not blank, without line breaks.

    Attributes:
        path: the file.
        positions: [n] int64, the 1-based line of each span in the file.
        offsets: [n] int64, the byte offset of each span in the (decompressed) file.
        end: byte offset of the end of the lines in that file.
    """

    path: pathlib.Path
    positions: np.ndarray
    offsets: np.ndarray
    end: int

    def where(self, index: int) -> str:
        """Returns the location of a line, for messages."""
        return f"{self.path}:{self.positions[index]}"

    def without_first(self) -> "Lines":
        """Returns all lines except the first."""
        start = int(self.starts[1]) if len(self.starts) > 1 else len(self.data)
        spans = self.data[start:], self.starts[1:] - start, self.ends[1:] - start
        return Lines(*spans, self.path, self.positions[1:], self.offsets[1:], self.end)

    def without_blank(self) -> "Lines":
        """Returns the lines that are not blank."""
        lines = self.ends > self.starts
        for index in np.flatnonzero(_BLANK[self.data[self.starts]] & lines):
            lines[index] = bool(self.text(index).strip())
        if lines.all():
            return self
        lengths = np.diff(np.append(self.starts, len(self.data)))
        data = self.data[np.repeat(lines, lengths)]
        starts = np.cumsum(lengths * lines)[lines] - lengths[lines]
        which = self.positions[lines], self.offsets[lines]
        return Lines(data, starts, starts + self.lengths[lines], self.path, *which, self.end)


COMPRESSED = (".gz", ".zst")  # suffixes of compressed files


def without_compression(name: str) -> str:
    """Removes the suffix of a compressed file from its name."""
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


@contextlib.contextmanager
def open_binary(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressing it if its name ends in .gz or .zst.

    Raises:
        InputError: on reading, if a compressed file is truncated or damaged.
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
        raise InputError(f"{path}: damaged or truncated {kind} file ({error})") from error


def has_byte_order_mark(path: pathlib.Path) -> bool:
    """Returns True if a text file starts with UTF-8's byte order mark, as Windows writes it."""
    with open_binary(path) as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def read_lines(path: pathlib.Path) -> Iterator[Lines]:
    """Yields the lines of a plain or compressed file that are not blank, block by block.

    Raises:
        InputError: the file is not text in UTF-8, or damaged.
    """
    for content, offset, first_line in _blocks(path):
        if first_line == 1 and b"\n" not in content:
            refuse_returns(path, content[:-1])
        lines = _split(path, content, offset, first_line).without_blank()
        if len(lines.starts):
            yield lines


def refuse_returns(path: pathlib.Path, first: bytes) -> None:
    """Raises InputError if the first line of a table seems to contain all the others."""
    if b"\r" in first:
        raise InputError(
            f"{path}:1: lines end with a carriage return alone, as in files of old Macs; save the "
            "file with line feeds"
        )


def numbered(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (1-based line, text with its line break), blank lines included; errors as above."""
    for content, _, first_line in _blocks(path):
        for line, text in enumerate(io.BytesIO(content), first_line):
            yield line, text.decode()


def text_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (1-based line, text without its line break), blank lines included."""
    for line, text in numbered(path):
        yield line, text.removesuffix("\n").removesuffix("\r")


def text_blocks(path: pathlib.Path, size: int) -> Iterator[str]:
    """Yields a file as blocks of text of about `size` bytes, for formats without lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with open_binary(path) as file:
        while True:
            block = file.read(size)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                problem = f"not valid UTF-8 in line {line} ({error.reason})"
                raise InputError(f"{path}: {problem}") from None
            if text:
                yield text
            if not block:
                return
            line += text.count("\n")


def _blocks(path: pathlib.Path) -> Iterator[tuple[bytes, int, int]]:
    """Yields (complete lines, their byte offset, the 1-based line of the first), checked."""
    first_line = 1
    with open_binary(path) as file:
        start = file.read(len(codecs.BOM_UTF8))
        remainder = start.removeprefix(codecs.BOM_UTF8)  # the incomplete last line so far
        offset = len(start) - len(remainder)
        while True:
            block = file.read(BLOCK)
            content = remainder + block
            size = content.rfind(b"\n") + 1 if block else len(content)
            remainder = content[size:]
            if size:
                content = content[:size]
                try:
                    content.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _bad_utf8(path, first_line, error) from None
                yield content, offset, first_line
                offset += size
                first_line += content.count(b"\n")
            if not block:
                return


def _bad_utf8(path: pathlib.Path, first_line: int, error: UnicodeDecodeError) -> InputError:
    line = first_line + error.object.count(b"\n", 0, error.start)
    column = error.start - error.object.rfind(b"\n", 0, error.start) - 1
    is_utf16 = line == 1 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    hint = "; it is in UTF-16, save it as UTF-8" if is_utf16 else ""
    return InputError(
        f"{path}:{line}: not valid UTF-8 ({error.reason} at byte {column} of the line){hint}"
    )


def _split(path: pathlib.Path, content: bytes, offset: int, first_line: int) -> Lines:
    """Splits bytes into lines, blank ones included."""
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    if data[-1] != _NEWLINE:
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    ends = ends - ((ends > starts) & (data[ends - 1] == _RETURN))
    positions = first_line + np.arange(len(starts))
    return Lines(data, starts, ends, path, positions, offset + starts, offset + len(data))


def columns(lines: Lines, names: tuple[str, ...], *, whitespace: bool = False) -> list[Spans]:
    """Splits lines into a fixed number of columns, none blank.

    Args:
        lines: the lines to split.
        names: names of the columns, for the message.
        whitespace: separate columns by any run of tabs and spaces instead of a single tab.

    Raises:
        InputError: names the first line with other columns.
    """
    starts, ends = _fields(lines, whitespace)
    counts = np.diff(np.searchsorted(starts, np.append(lines.starts, len(lines.data))))
    num_valid = _first_true(counts != len(names))  # lines before the first malformed one
    starts = starts[: num_valid * len(names)].reshape(-1, len(names))
    ends = ends[: num_valid * len(names)].reshape(-1, len(names))
    if not whitespace:  # exactly one tab between adjacent fields, none before or after
        has_outer_tab = starts[:, 0] != lines.starts[:num_valid]
        has_outer_tab |= ends[:, -1] != lines.ends[:num_valid]
        has_empty_field = (starts[:, 1:] != ends[:, :-1] + 1).any(axis=1)
        num_valid = _first_true(has_outer_tab | has_empty_field)
    # Only fields that start with whitespace may be blank.
    for index in np.flatnonzero(_BLANK[lines.data[starts[:num_valid]]].any(axis=1)):
        fields = Spans(lines.data, starts[index], ends[index])
        if not all(fields.text(column).strip() for column in range(len(names))):
            num_valid = int(index)
            break
    if num_valid < len(lines.starts):
        line = lines.text(num_valid)
        got = len(line.split() if whitespace else line.split("\t"))
        kind = "columns" if whitespace else "tab-separated columns, none empty"
        raise InputError(
            f"{lines.where(num_valid)}: expected {len(names)} {kind} ({', '.join(names)}); "
            f"got {got}: {line[:80]!r}"
        )
    return [Spans(lines.data, starts[:, i], ends[:, i]) for i in range(len(names))]


def _fields(lines: Lines, whitespace: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts and ends of all runs of bytes that are not separators."""
    is_separator = np.zeros(256, bool)
    is_separator[[_TAB, _NEWLINE]] = True
    is_separator[_SPACE] = whitespace
    mask = np.ones(len(lines.data) + 2, bool)  # with a separator before and after
    mask[1:-1] = is_separator[lines.data]
    mask[lines.ends + 1] = True  # the \r of \r\n
    edges = np.flatnonzero(mask[1:] != mask[:-1])
    return edges[0::2], edges[1::2]


def _first_true(mask: np.ndarray) -> int:
    """Returns the index of the first True, or the length if there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
