"""Streaming readers for rows of JSONL, JSON, CSV, TSV and Parquet files.

| suffix | format |
| --- | --- |
| .jsonl, .ndjson | one object per line |
| .json | an array of objects, or concatenated objects |
| .csv | commas, a header, values with commas, quotes or line breaks in double quotes |
| .tsv | tabs, a header, no quoting |
| .parquet | read by pyarrow |

Text files may be .gz or .zst. Rules for lines, such as that blank ones are skipped, are in `lines`.
"""

import csv
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gemma_encoder.data.files.lines import (
    COMPRESSED,
    numbered,
    refuse_returns,
    text_blocks,
    text_lines,
    without_compression,
)
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.json_text import from_json, to_json

BATCH = 10_000  # rows of a Parquet file held as Python objects at a time
BLOCK = 1 << 20  # bytes of a JSON file read at a time
MAX_VALUE = 1 << 26  # characters of a JSON value
_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class FileRow(NamedTuple):
    """A row of a file.

    Attributes:
        position: 1-based first line, or (Parquet, JSON) 1-based row.
        values: values by column.
    """

    position: int
    values: Mapping[str, Any]


Header = tuple[str, ...]


def read_rows(path: pathlib.Path) -> tuple[Header, Iterator[FileRow]]:
    """Returns the columns of a file (for JSON, the keys of its first object), and its rows.

    Raises:
        InputError: the file does not exist or is malformed.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, for text files "
            f"optionally followed by {' or '.join(COMPRESSED)}"
        )
    return _READERS[suffix](path)


def has_keys(path: pathlib.Path) -> bool:
    """Returns True if each row names its values, so that later rows may have other columns."""
    return _suffix(path) in (".jsonl", ".ndjson", ".json")


def where(path: pathlib.Path, position: int) -> str:
    """Returns the location of a row, for messages."""
    is_by_row = _suffix(path) in (".parquet", ".json")
    return f"{path}: row {position}" if is_by_row else f"{path}:{position}"


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(without_compression(path.name)).suffix


def check_unicode(values: Iterable[Any], path: pathlib.Path, position: int) -> None:
    """Raises InputError for invalid Unicode, such as lone surrogates, which JSON can escape."""
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                location = where(path, position)
                raise InputError(f"{location}: not valid Unicode: {error.reason}") from None


def _objects(
    parse: Callable[[pathlib.Path], Iterator[tuple[int, Any]]],
) -> Callable[[pathlib.Path], tuple[Header, Iterator[FileRow]]]:
    """Returns the reader of JSON objects that `parse` yields as (position, value)."""

    def rows(path: pathlib.Path) -> Iterator[FileRow]:
        for position, value in parse(path):
            if not isinstance(value, dict):
                got = to_json(value, ensure_ascii=False)[:80]
                raise InputError(f"{where(path, position)}: expected a JSON object, got {got!r}")
            yield FileRow(position, value)

    def read(path: pathlib.Path) -> tuple[Header, Iterator[FileRow]]:
        first = next(rows(path), None)
        if first is None:
            raise InputError(f"{path} is empty")
        return tuple(first.values), rows(path)

    return read


def _jsonl_values(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    for line, text in numbered(path):
        if text.strip():
            try:
                yield line, from_json(text)
            except ValueError as error:
                raise _malformed(path, line, error, text) from None


def _malformed(path: pathlib.Path, position: int, error: BaseException, text: str) -> InputError:
    problem = getattr(error, "msg", "") or one_line(error)
    start = text[:80].rstrip()
    return InputError(f"{where(path, position)}: not a JSON object ({problem}): {start!r}")


def _json_values(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (position, value) of an array, or of concatenated values, while reading the file."""
    text = _TextBuffer(path)
    is_array = text.peek() == "["
    if is_array:
        text.offset += 1
    count = 0
    error = None
    while (character := text.peek()) and (character != "]" or not is_array):
        if is_array and count and character == ",":
            text.offset += 1
            text.peek()
        elif is_array and count:
            break
        value, error = text.next_value()
        if error is not None:
            break
        count += 1
        yield count, value
    if is_array and error is None and character == "]":
        text.offset += 1
        is_complete = not text.peek()
    else:
        is_complete = not is_array and not character
    if not is_complete:
        expected = "text after the array" if character == "]" else "expected , or ]"
        raise _malformed(path, count + 1, error or ValueError(expected), text.preview())


class _TextBuffer:
    """Buffered text of a file, from the current offset on."""

    def __init__(self, path: pathlib.Path):
        self._blocks = text_blocks(path, BLOCK)
        self._text = ""
        self.offset = 0

    def _grow(self) -> bool:
        """Drops consumed text and doubles the remaining text; returns False at the end."""
        remaining = self._text[self.offset :]
        block = "".join(itertools.islice(self._blocks, 1 + len(remaining) // BLOCK))
        self._text = remaining + block
        self.offset = 0
        return bool(block)

    def peek(self) -> str:
        """Skips blanks and returns the next character without consuming it, "" at the end."""
        while True:
            self.offset = _BLANKS.match(self._text, self.offset).end()
            if self.offset < len(self._text) or not self._grow():
                return self._text[self.offset : self.offset + 1]

    def next_value(self) -> tuple[Any, BaseException | None]:
        """Parses a JSON value; returns (value, None) or (None, error)."""
        while True:
            try:
                value, self.offset = _DECODER.raw_decode(self._text, self.offset)
                return value, None
            except RecursionError:
                return None, ValueError("it is nested too deeply")
            except ValueError as error:
                if len(self._text) - self.offset > MAX_VALUE or not self._grow():
                    return None, error

    def preview(self) -> str:
        """Returns the start of the remaining text."""
        return self._text[self.offset : self.offset + 80]


def _csv_records(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (1-based first line, values) of the rows of a CSV file, the header included."""
    csv.field_size_limit(1 << 30)  # the default limit is shorter than a long document
    last = ""

    def texts() -> Iterator[str]:
        nonlocal last
        for _, last in numbered(path):
            yield last

    reader = csv.reader(texts(), strict=True)
    line = 1
    try:
        for values in reader:
            if len(values) > 1 or last.strip():  # a value "" in quotes is not a blank line
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        problem = str(error)
        if "new-line character" in problem:
            refuse_returns(path, last.rstrip().encode() if line == 1 else b"")
            problem = "a carriage return in a value without quotes"
        raise InputError(f"{path}:{line}: malformed ({problem})") from None


def _tsv_records(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (1-based line, values) of the rows of a TSV file, the header included."""
    for line, text in text_lines(path):
        if line == 1:
            refuse_returns(path, text.encode())
        if text.strip():
            yield line, text.split("\t")


def _delimited(
    records: Callable[[pathlib.Path], Iterator[tuple[int, list[str]]]],
) -> Callable[[pathlib.Path], tuple[Header, Iterator[FileRow]]]:
    """Returns the reader of tables that `records` yields as (position, values)."""

    def read(path: pathlib.Path) -> tuple[Header, Iterator[FileRow]]:
        lines = records(path)
        first, names = next(lines, (0, None))
        if names is None:
            raise InputError(f"{path} is empty; its first line should name the columns")
        names = _named(names)
        if len(set(names)) < len(names):
            raise InputError(
                f"{path}:{first}: the first line should name no column twice; got "
                f"{', '.join(map(repr, names))}"
            )

        def rows() -> Iterator[FileRow]:
            for line, values in lines:
                if len(values) != len(names):
                    raise InputError(
                        f"{path}:{line}: expected {len(names)} columns ({', '.join(names)}), "
                        f"got {len(values)}"
                    )
                yield FileRow(line, dict(zip(names, values, strict=True)))

        return tuple(names), rows()

    return read


def _named(names: Sequence[str]) -> list[str]:
    """Names columns without a name, such as the index of a DataFrame, as pandas does."""
    result = list(names)
    for index in range(len(result)):
        if not result[index].strip():
            name = f"Unnamed: {index}"
            while name in result:
                name += ".1"
            result[index] = name
    return result


def is_parquet(path: pathlib.Path) -> bool:
    """Returns True for files that can be read by column."""
    return path.suffix == ".parquet"


def parquet_batches(
    path: pathlib.Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based first row, Arrow arrays by column) of batches.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow as pa

    first = 1
    try:
        for batch in _parquet_file(path).iter_batches(BATCH, columns=columns):
            yield first, dict(zip(batch.schema.names, batch.columns, strict=True))
            first += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path}: damaged after row {first - 1} ({str(error).splitlines()[0]})"
        ) from None


def parquet_rows(path: pathlib.Path, first: int, arrays: Mapping[str, Any]) -> Iterator[FileRow]:
    """Yields the rows of a batch of `parquet_batches`."""
    columns = {}
    for name, array in arrays.items():
        try:
            columns[name] = array.to_pylist()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: column {name!r} is not valid UTF-8 ({error.reason})"
            ) from None
        except (ValueError, OverflowError) as error:  # such as a date beyond Python's range
            raise InputError(
                f"{path}: column {name!r} cannot be read after row {first - 1} ({one_line(error)})"
            ) from None
    for row, values in enumerate(zip(*columns.values(), strict=True), first):
        yield FileRow(row, dict(zip(columns, values, strict=True)))


def _parquet_file(path: pathlib.Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        # Opened by Python, as the path may be one that is not UTF-8.
        file = pyarrow.parquet.ParquetFile(path.open("rb"))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise InputError(
            f"{path}: the file should name no column twice; got {', '.join(map(repr, names))}"
        )
    return file


def _parquet(path: pathlib.Path) -> tuple[Header, Iterator[FileRow]]:
    batches = (parquet_rows(path, *batch) for batch in parquet_batches(path))
    return tuple(_parquet_file(path).schema_arrow.names), itertools.chain.from_iterable(batches)


_READERS = {
    ".jsonl": _objects(_jsonl_values),
    ".ndjson": _objects(_jsonl_values),
    ".json": _objects(_json_values),
    ".csv": _delimited(_csv_records),
    ".tsv": _delimited(_tsv_records),
    ".parquet": _parquet,
}
