"""Writes tables of predictions, chunk by chunk, as CSV and Parquet files."""

import csv
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json

Tables = Callable[[], Iterator[dict[str, list]]]  # yields the columns of each chunk


def write_csv(path: pathlib.Path, read: Tables) -> None:
    """Writes a CSV file; lists become JSON, None an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for index, table in enumerate(read()):
            if index == 0:
                writer.writerow(table)
            columns = [[_cell(value) for value in column] for column in table.values()]
            writer.writerows(zip(*columns, strict=True))


def _cell(value: Any) -> Any:
    """Returns a CSV cell; a list becomes JSON, which the readers of own data parse."""
    return to_json(value, ensure_ascii=False) if isinstance(value, list) else value


def write_parquet(path: pathlib.Path, read: Tables) -> None:
    """Writes tables, which are read twice: the first time for the types of all of them."""
    import pyarrow as pa
    import pyarrow.parquet

    writer = None
    try:
        schema = pa.schema([])
        for columns in read():
            schemas = [schema, pa.table(columns).schema]
            schema = pa.unify_schemas(schemas, promote_options="permissive")
        writer = pyarrow.parquet.ParquetWriter(path, schema)
        for columns in read():
            writer.write_table(pa.table(columns).cast(schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise InputError(
            "a column of --keep has values of several types, which Parquet does not support "
            f"({str(error).splitlines()[0]}); use .jsonl"
        ) from None
    finally:
        if writer is not None:
            writer.close()
