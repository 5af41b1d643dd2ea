"""Rows of JSONL, JSON, CSV, TSV and Parquet files, one by one.

| suffix | what is expected |
| --- | --- |
| .jsonl, .ndjson | one object a line |
| .json | an array of objects, or one object after the other |
| .csv | commas, a header, values in double quotes where they hold commas, quotes or line breaks |
| .tsv | tabs, a header, quotes mean nothing |
| .parquet | read by pyarrow |

Text is UTF-8. Text files may be .gz or .zst. Blank lines are no rows.
"""

import csv
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gemma_encoder.data.files.lines import COMPRESSED, numbered, open_binary, without_compression
from gemma_encoder.inputs.errors import InputError, one_line

BATCH = 10_000  # rows of a Parquet file that are Python objects at a time
BLOCK = 1 << 20  # characters of a JSON file that are read at a time
MAX_VALUE = 1 << 26  # characters of a JSON value
_BLANKS, _DECODER = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()


class FileRow(NamedTuple):
    """A row as the file has it."""

    number: int  # of its first line, or (Parquet) its own; from 1
    values: Mapping[str, Any]


def read_rows(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[FileRow]]:
    """The columns of a file (of JSONL, the fields of its first object), and its rows.

    Raises InputError where it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}; text files may also end "
            f"in {' or '.join(COMPRESSED)}"
        )
    return _READERS[suffix](path)


def where(path: pathlib.Path, number: int) -> str:
    """Names a row in messages."""
    return f"{path}: row {number}" if _suffix(path) in (".parquet", ".json") else f"{path}:{number}"


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(without_compression(path.name)).suffix


def check_unicode(values: Iterable[Any], path: pathlib.Path, number: int) -> None:
    """Raises InputError where a text is no Unicode: JSON may spell half a character."""
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                name = where(path, number)
                raise InputError(f"{name}: no valid Unicode: {error.reason}") from None


def _objects(
    parse: Callable[[pathlib.Path], Iterator[tuple[int, Any]]],
) -> Callable[[pathlib.Path], tuple[tuple[str, ...], Iterator[FileRow]]]:
    """The reader of a file whose numbered JSON values `parse` gives."""

    def rows(path: pathlib.Path) -> Iterator[FileRow]:
        for number, value in parse(path):
            if not isinstance(value, dict):
                got = json.dumps(value, ensure_ascii=False)[:80]
                raise InputError(f"{where(path, number)}: expected a JSON object, got {got!r}")
            yield FileRow(number, value)

    def read(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[FileRow]]:
        first = next(rows(path), None)
        if first is None:
            raise InputError(f"{path} is empty")
        return tuple(first.values), rows(path)

    return read


def _jsonl_values(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    for number, line in numbered(path):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, error, line) from None


def _malformed(path: pathlib.Path, number: int, error: BaseException, text: str) -> InputError:
    problem = getattr(error, "msg", "") or one_line(error)
    start = text[:80].rstrip()
    return InputError(f"{where(path, number)}: not a JSON object ({problem}): {start!r}")


def _json_values(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """The values of an array, or values that follow each other, parsed as the text comes."""
    text = _Text(path)
    is_array, count, error = text.next_mark() == "[", 0, None
    text.at += is_array
    while (mark := text.next_mark()) and (mark != "]" or not is_array):
        if is_array and count and mark == ",":
            text.at += 1
            text.next_mark()
        elif is_array and count:
            break
        value, error = text.next_value()
        if error is not None:
            break
        count += 1
        yield count, value
    if is_array and error is None:
        text.at += mark == "]"
        is_whole = mark == "]" and not text.next_mark()
    else:
        is_whole = not mark
    if not is_whole:
        error = error or ValueError("expected , or ]" if mark != "]" else "text after the array")
        raise _malformed(path, count + 1, error, text.rest())


class _Text:
    """The text of a file from a position on; what lies before it is forgotten."""

    def __init__(self, path: pathlib.Path):
        self._blocks, self._text, self.at = _text_blocks(path), "", 0

    def _more(self) -> bool:
        """Reads as much again as there is; False at the end of the file."""
        rest = self._text[self.at :]
        block = "".join(itertools.islice(self._blocks, 1 + len(rest) // BLOCK))
        self._text, self.at = rest + block, 0
        return bool(block)

    def next_mark(self) -> str:
        """Goes to the next character that is not blank, and returns it; "" at the end."""
        while True:
            self.at = _BLANKS.match(self._text, self.at).end()
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def next_value(self) -> tuple[Any, BaseException | None]:
        """Parses a value, or says why there is none."""
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self._text, self.at)
                return value, None
            except (ValueError, RecursionError) as error:
                if len(self._text) - self.at > MAX_VALUE or not self._more():
                    return None, error

    def rest(self) -> str:
        """The start of what is left."""
        return self._text[self.at : self.at + 80]


def _text_blocks(path: pathlib.Path) -> Iterator[str]:
    with open_binary(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            while block := text.read(BLOCK):
                yield block
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not valid UTF-8 ({error.reason})") from None


def _delimited(**dialect) -> Callable[[pathlib.Path], tuple[tuple[str, ...], Iterator[FileRow]]]:
    def records(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(1 << 30)  # the library's own limit is shorter than a long document
        reader = csv.reader((line for _, line in numbered(path)), strict=True, **dialect)
        number = 1
        try:
            for values in reader:
                if values:
                    yield number, values
                number = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}:{number}: malformed ({error})") from None

    def read(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[FileRow]]:
        lines = records(path)
        _, names = next(lines, (0, None))
        if names is None:
            raise InputError(f"{path} is empty; its first line should name the columns")
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise InputError(
                f"{path}:1: the first line should name every column, and none twice; got "
                f"{', '.join(map(repr, names))}"
                + ("; pandas writes its index so, without index=False" if not names[0] else "")
            )

        def rows() -> Iterator[FileRow]:
            for number, values in lines:
                if len(values) != len(names):
                    raise InputError(
                        f"{path}:{number}: expected {len(names)} columns ({', '.join(names)}), "
                        f"got {len(values)}"
                    )
                yield FileRow(number, dict(zip(names, values, strict=True)))

        return tuple(names), rows()

    return read


def is_parquet(path: pathlib.Path) -> bool:
    """Tells files that can be read by column."""
    return path.suffix == ".parquet"


def parquet_batches(
    path: pathlib.Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Some rows at a time: the number of the first one, and the Arrow array of each column by name.

    Raises InputError where the file is broken.
    """
    import pyarrow as pa

    number = 1
    try:
        for batch in _parquet_file(path).iter_batches(BATCH, columns=columns):
            yield number, dict(zip(batch.schema.names, batch.columns, strict=True))
            number += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path}: broken after row {number - 1} ({str(error).splitlines()[0]})"
        ) from None


def parquet_rows(path: pathlib.Path, first: int, arrays: Mapping[str, Any]) -> Iterator[FileRow]:
    """The rows of a batch of `parquet_batches`."""
    columns = {}
    for name, array in arrays.items():
        try:
            columns[name] = array.to_pylist()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: column {name!r} is not valid UTF-8 ({error.reason})"
            ) from None
        except (ValueError, OverflowError) as error:  # such as a date that Python cannot hold
            raise InputError(
                f"{path}: column {name!r} cannot be read behind row {first - 1} ({one_line(error)})"
            ) from None
    for number, values in enumerate(zip(*columns.values(), strict=True), first):
        yield FileRow(number, dict(zip(columns, values, strict=True)))


def _parquet_file(path: pathlib.Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _parquet(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[FileRow]]:
    batches = (parquet_rows(path, *batch) for batch in parquet_batches(path))
    return tuple(_parquet_file(path).schema_arrow.names), itertools.chain.from_iterable(batches)


_READERS = {
    ".jsonl": _objects(_jsonl_values),
    ".ndjson": _objects(_jsonl_values),
    ".json": _objects(_json_values),
    ".csv": _delimited(),
    ".tsv": _delimited(delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet,
}
