"""Writes tables of predictions, chunk by chunk, as CSV and Parquet files."""

import csv
import datetime
import decimal
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.json_text import to_json

Tables = Callable[[], Iterator[dict[str, list]]]  # yields the columns of each chunk


def to_line(record: Mapping[str, Any], where: str) -> bytes:
    """Serializes a record as one line of JSON; dates, times, decimals and UUIDs become text.

    Raises:
        InputError: at `where`, a value of a repeated column cannot be written.
    """
    try:
        text = to_json(record, ensure_ascii=False, default=_as_text)
        return f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        problem = getattr(error, "reason", None) or one_line(error)
        raise InputError(f"{where}: a column of --keep cannot be written: {problem}") from None


def _as_text(value: Any) -> str:
    """Returns the text of a value of a Parquet file that JSON does not know."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    raise TypeError(f"JSON has no {type(value).__name__}")


def write_csv(path: pathlib.Path, read: Tables) -> None:
    """Writes a CSV file; lists and objects become JSON, None an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(_Lines(file), lineterminator="\r\n")
        for index, table in enumerate(read()):
            if index == 0:
                writer.writerow(table)
            columns = [[_cell(value) for value in column] for column in table.values()]
            writer.writerows(zip(*columns, strict=True))


class _Lines:
    """A file that ends lines with a line feed, but lets `csv` quote carriage returns.

    `csv` quotes only the characters of its own line terminator.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def _cell(value: Any) -> Any:
    """Returns a CSV cell; a list becomes JSON, which the readers of own data parse."""
    return to_json(value, ensure_ascii=False) if isinstance(value, list | dict) else value


class ParquetTypes:
    """The types of Parquet columns, from the values of all chunks."""

    def __init__(self):
        import pyarrow as pa

        self.schema = pa.schema([])

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Adds the values of a chunk.

        Raises:
            InputError: a column has values that do not have a type in common.
        """
        import pyarrow as pa

        for name, values in columns.items():
            try:
                schema = pa.schema([(name, pa.array(values).type)])
                self.schema = pa.unify_schemas([self.schema, schema], promote_options="permissive")
            except (pa.ArrowException, ValueError, OverflowError) as error:
                raise _no_parquet(name, error) from None

    def check(self) -> None:
        """Raises InputError if Parquet has no such type, as for objects without a key."""
        import pyarrow as pa
        import pyarrow.parquet

        for field in self.schema:
            try:
                pyarrow.parquet.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
            except pa.ArrowException as error:
                raise _no_parquet(field.name, error) from None


def _no_parquet(column: str, error: Exception) -> InputError:
    return InputError(
        f"--keep={column}: the column has values of several types, or of one that Parquet does not "
        f"support ({str(error).splitlines()[0]}); use .jsonl"
    )


def write_parquet(path: pathlib.Path, read: Tables) -> None:
    """Writes tables, which are read twice: the first time for the types of all of them."""
    import pyarrow as pa
    import pyarrow.parquet

    types = ParquetTypes()
    for columns in read():
        types.add(columns)
    types.check()
    # Opened by Python, as the path may be one that is not UTF-8.
    with path.open("wb") as file, pyarrow.parquet.ParquetWriter(file, types.schema) as writer:
        for columns in read():
            for name, values in columns.items():
                try:
                    columns[name] = pa.array(values, types.schema.field(name).type)
                except (pa.ArrowException, ValueError, OverflowError) as error:
                    raise _no_parquet(name, error) from None
            writer.write_table(pa.table(columns, types.schema))
