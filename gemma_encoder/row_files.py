"""Conversion of rows in memory (DataFrames, columns, records) to JSONL files."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.whole_files import write_whole

EXPECTED = "a path, a list of paths, a DataFrame, a dictionary of columns or an iterable of records"


def to_jsonl(data: Any, name: str) -> str:
    """Serializes the rows of `data` as JSON lines.

    Args:
        data: a DataFrame (pandas or polars), a dictionary from column to values, or an iterable of
            dictionaries from column to value, such as a `datasets.Dataset`.
        name: name of the split, for messages.

    Raises:
        InputError: `data` has another type, columns of different lengths, no records, or a value
            that JSON cannot represent.
    """
    lines = []
    for index, record in enumerate(_records(data, name)):
        where = f"{name}: record {index}"
        if not isinstance(record, Mapping):
            raise InputError(
                f"{where} is {type(record).__name__}, not a dictionary from column to value; "
                f"{name} must be {EXPECTED}"
            )
        values = {}
        for column, value in record.items():
            if str(column) in values:
                raise InputError(f"{where} has two columns named {str(column)!r}")
            values[str(column)] = value
        lines.append(_line(values, where))
    if not lines:
        raise InputError(f"{name} has no records")
    return "".join(f"{line}\n" for line in lines)


def _line(values: Mapping[str, Any], where: str) -> str:
    """Serializes one row as a JSON object."""
    fields = []
    for column, value in values.items():
        try:
            text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: column {column!r} has type {type(value).__name__}, which JSON cannot "
                f"represent ({error}); convert it to text or a number, or drop the column"
            ) from None
        fields.append(f"{to_json(column, ensure_ascii=False)}: {text}")
    return f"{{{', '.join(fields)}}}"


def write_rows(path: pathlib.Path, text: str) -> None:
    """Writes the lines of `to_jsonl` to a file.

    Raises:
        InputError: a text is not valid Unicode, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except UnicodeEncodeError as error:
        raise InputError(f"{path.stem}: a text is not valid Unicode: {error.reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written: {reason}") from error


def _records(data: Any, name: str) -> Iterable[Any]:
    """Returns the rows of `data`, which should be dictionaries."""
    if hasattr(data, "columns") and hasattr(data, "to_dicts"):  # polars
        return data.to_dicts()
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # pandas
        if not data.columns.is_unique:
            columns = ", ".join(map(str, data.columns))
            raise InputError(f"{name} has duplicate column names: {columns}")
        return data.to_dict("records")
    if isinstance(data, Mapping):
        return _column_records(data, name)
    is_scalar = isinstance(data, str | bytes) or getattr(data, "shape", None) == ()
    if is_scalar or not isinstance(data, Iterable):
        raise InputError(f"{name} is {type(data).__name__}; expected {EXPECTED}")
    return data


def _column_records(data: Mapping[Any, Any], name: str) -> Iterable[dict[Any, Any]]:
    """Returns the rows of a dictionary from column to values."""
    columns = {column: _column(values, column, name) for column, values in data.items()}
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{name}: the columns differ in length: {lengths}")
    rows = zip(*columns.values(), strict=True)
    return (dict(zip(columns, row, strict=True)) for row in rows)


def _column(values: Any, column: Any, name: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(
            f"{name}: column {column!r} is {type(values).__name__}, not a list of values"
        )
    return list(values)


def _plain(value: Any) -> Any:
    """Converts NumPy values and arrays to Python ones, and missing values (NaN) to None."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, set | frozenset):  # sorted, since iteration order differs per process
        return sorted((_plain(item) for item in value), key=lambda item: (str(type(item)), item))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
