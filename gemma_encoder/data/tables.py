"""Rows of JSONL, CSV, TSV and Parquet files, checked one by one as they are read, and held as an Arrow table outside Python's memory.

| suffix | what is expected |
| --- | --- |
| .jsonl, .ndjson | one object a line |
| .csv | commas, a header, values in double quotes where they hold commas, quotes or line breaks |
| .tsv | tabs, a header, quotes mean nothing |
| .parquet | read by pyarrow |

Text is UTF-8. Text files may be .gz. Blank lines are no rows.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.lines import numbered
from gemma_encoder.inputs.errors import InputError

BATCH = 10_000  # rows that are Python objects at a time


class Row(NamedTuple):
    """A row as the file has it."""

    number: int  # of its first line, or (Parquet) its own; from 1
    values: Mapping[str, Any]


def rows(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    """The columns of a file (of JSONL, the fields of its first object), and its rows; raises InputError where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    suffix = pathlib.Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _READERS:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}; text files may also end in .gz"
        )
    return _READERS[suffix](path)


def where(path: pathlib.Path, number: int) -> str:
    """Names a row in messages."""
    return f"{path}: row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


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
    ".csv": _delimited(),
    ".tsv": _delimited(delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet,
}


class Table:
    """Checked rows of a file, by number from 0. Reading is safe in threads.

    Args:
        path: the file.
        texts: names of the table's text columns.
        numbers: names of its number columns.
        convert: from a row of the file and its name in messages to the values of those columns, texts first; raises InputError for
            a row that is wrong.
        settings: everything that decides what `convert` does.
    """

    def __init__(
        self,
        path: pathlib.Path,
        texts: Sequence[str],
        numbers: Sequence[str],
        convert: Callable[[Mapping[str, Any], str], Sequence[Any]],
        settings: object,
    ):
        import pyarrow as pa

        self.path = path
        types = (
            [(name, pa.large_string()) for name in texts]
            + [(name, pa.float64()) for name in numbers]
            + [("row", pa.int64())]
        )
        schema = pa.schema(types)

        def write(place: pathlib.Path) -> None:
            with (
                pa.OSFile(str(place / "rows.arrow"), "wb") as file,
                pa.ipc.new_file(file, schema) as writer,
            ):
                waiting: list[tuple] = []
                count = 0
                for number, values in rows(path)[1]:
                    name = where(path, number)
                    converted = convert(values, name)
                    try:
                        for text in converted[: len(texts)]:
                            text.encode()  # JSON may spell half a character
                        waiting.append((*converted, number))
                    except UnicodeEncodeError as error:
                        raise InputError(f"{name}: no valid Unicode: {error.reason}") from None
                    count += 1
                    if len(waiting) == BATCH:
                        writer.write_batch(_batch(waiting, schema))
                        waiting = []
                if not count:
                    raise InputError(f"{path} holds no row")
                if waiting:
                    writer.write_batch(_batch(waiting, schema))

        def load(place: pathlib.Path):
            return pa.ipc.open_file(pa.memory_map(str(place / "rows.arrow"))).read_all()

        self.arrow = cache.derive([path], f"table {settings!r}", write, load)

    def __len__(self) -> int:
        return len(self.arrow)

    def __getitem__(self, place: tuple[str, int]) -> Any:
        """One value, by column and row."""
        column, row = place
        return self.arrow.column(column)[int(row)].as_py()

    def numbers(self, column: str) -> np.ndarray:
        """A number column."""
        return self.arrow.column(column).to_numpy()

    def codes(self, column: str) -> tuple[list[str], np.ndarray]:
        """The different values of a text column in the order in which they come, and which of them each row has, int32."""
        chunks = self.arrow.column(column).dictionary_encode().unify_dictionaries().chunks
        return chunks[0].dictionary.to_pylist(), np.concatenate(
            [chunk.indices.to_numpy() for chunk in chunks]
        )

    def where(self, row: int) -> str:
        """Names a row in messages."""
        return where(self.path, self["row", row])


def _batch(waiting: list[tuple], schema):
    import pyarrow as pa

    return pa.record_batch(
        [
            pa.array(values, kind.type)
            for values, kind in zip(zip(*waiting, strict=True), schema, strict=True)
        ],
        schema,
    )
