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

import codecs
import csv
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gemma_encoder.data.files.lines import (
    COMPRESSED,
    numbered,
    open_binary,
    without_compression,
)
from gemma_encoder.inputs.errors import InputError

BATCH = 10_000  # rows of a Parquet file that are Python objects at a time
BLOCK = 1 << 20  # bytes of a JSON file that are read at a time


class Row(NamedTuple):
    """A row as the file has it."""

    number: int  # of its first line, or (Parquet) its own; from 1
    values: Mapping[str, Any]


def read(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    """The columns of a file (of JSONL, the fields of its first object), and its rows; raises InputError where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    suffix = pathlib.Path(without_compression(path.name)).suffix
    if suffix not in _READERS:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}; text files may also end "
            f"in {' or '.join(COMPRESSED)}"
        )
    return _READERS[suffix](path)


def where(path: pathlib.Path, number: int) -> str:
    """Names a row in messages."""
    has_lines = pathlib.Path(without_compression(path.name)).suffix not in (".parquet", ".json")
    return f"{path}:{number}" if has_lines else f"{path}: row {number}"


def check_unicode(values: Iterable[Any], path: pathlib.Path, number: int) -> None:
    """Raises InputError where a text is no Unicode: JSON may spell half a character."""
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                name = where(path, number)
                raise InputError(f"{name}: no valid Unicode: {error.reason}") from None


def _jsonl(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    def parse() -> Iterator[Row]:
        for number, line in numbered(path):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not a JSON object ({error.msg}): {line[:80].rstrip()!r}"
                ) from None
            if not isinstance(values, dict):
                raise InputError(
                    f"{path}:{number}: expected a JSON object, got {line[:80].rstrip()!r}"
                )
            yield Row(number, values)

    first = next(parse(), None)
    if first is None:
        raise InputError(f"{path} is empty")
    return tuple(first.values), parse()


def _json(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    def parse() -> Iterator[Row]:
        for number, values in enumerate(_json_values(path), 1):
            if not isinstance(values, dict):
                raise InputError(
                    f"{where(path, number)}: expected a JSON object, got {str(values)[:80]!r}"
                )
            yield Row(number, values)

    first = next(parse(), None)
    if first is None:
        raise InputError(f"{path} is empty")
    return tuple(first.values), parse()


def _json_values(path: pathlib.Path) -> Iterator[Any]:
    """The values of an array, or values that follow each other, parsed as the text comes."""
    blocks, text, count = _text_blocks(path), "", 0
    while not text and (block := next(blocks, None)) is not None:
        text = block.lstrip()
    is_array = text.startswith("[")
    text = text.removeprefix("[")
    while True:
        text, problem, value, end = text.lstrip(" \t\r\n,"), "", None, 0
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as error:
            problem = error.msg
        if problem or end == len(text):  # it may go on in the next block
            more = "".join(itertools.islice(blocks, 1 + len(text) // BLOCK))
            if more:
                text += more
                continue
        if problem:
            break
        count += 1
        yield value
        text = text[end:]
    if text.strip() != ("]" if is_array else ""):
        raise InputError(
            f"{where(path, count + 1)}: not a JSON object ({problem}): {text[:80].rstrip()!r}"
        )


def _text_blocks(path: pathlib.Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_binary(path) as file:
        while True:
            block = file.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not valid UTF-8 ({error.reason})") from None
            if not block:
                return


def _delimited(**dialect) -> Callable[[pathlib.Path], tuple[tuple[str, ...], Iterator[Row]]]:
    def read(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
        csv.field_size_limit(1 << 30)  # the library's own limit is shorter than a long document
        reader = csv.reader((line for _, line in numbered(path)), strict=True, **dialect)

        def records() -> Iterator[tuple[int, list[str]]]:
            while True:
                number = reader.line_num + 1
                try:
                    values = next(reader, None)
                except csv.Error as error:
                    raise InputError(f"{path}:{number}: malformed ({error})") from None
                if values is None:
                    return
                if values:
                    yield number, values

        lines = records()
        _, names = next(lines, (0, None))
        if names is None:
            raise InputError(f"{path} is empty; its first line should name the columns")
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise InputError(
                f"{path}:1: the first line should name every column, and none twice; got "
                f"{', '.join(map(repr, names))}"
                + ("; pandas writes its index so, without index=False" if not names[0] else "")
            )

        def parse() -> Iterator[Row]:
            for number, values in lines:
                if len(values) != len(names):
                    raise InputError(
                        f"{path}:{number}: expected {len(names)} columns ({', '.join(names)}), got {len(values)}"
                    )
                yield Row(number, dict(zip(names, values, strict=True)))

        return tuple(names), parse()

    return read


def _parquet(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None

    def parse() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(BATCH):
                columns = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    try:
                        columns[name] = column.to_pylist()
                    except UnicodeDecodeError as error:
                        raise InputError(
                            f"{path}: column {name!r} is not valid UTF-8 ({error.reason})"
                        ) from None
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    yield Row(number, dict(zip(columns, values, strict=True)))
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path}: broken after row {number} ({str(error).splitlines()[0]})"
            ) from None

    return tuple(file.schema_arrow.names), parse()


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _delimited(),
    ".tsv": _delimited(delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet,
}
