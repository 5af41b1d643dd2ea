"""Rows in memory as a file that `tables` reads: what the user hands over in Python."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemma_encoder import runtime
from gemma_encoder.inputs.errors import InputError

EXPECTED = "a path, a list of paths, a DataFrame, a dictionary of columns or an iterable of records"


def to_jsonl(data: Any, name: str) -> str:
    """The rows of `data` as JSON lines.

    Args:
        data: a DataFrame (pandas or polars), a dictionary from column to its values, or an iterable
            of dictionaries from column to value, such as a `datasets.Dataset`.
        name: of the split, for messages.

    Raises:
        InputError: something else, columns of different lengths, a value that JSON cannot hold.
    """
    lines = []
    for number, record in enumerate(_records(data, name)):
        if not isinstance(record, Mapping):
            raise InputError(
                f"{name}: record {number} is {type(record).__name__}, not a dictionary from column "
                f"to value; {name} is {EXPECTED}"
            )
        values = {}
        for column, value in record.items():
            if str(column) in values:
                raise InputError(f"{name}: record {number} has two columns named {str(column)!r}")
            values[str(column)] = value
        lines.append(_line(values, f"{name}: record {number}"))
    if not lines:
        raise InputError(f"{name} holds no record")
    return "".join(f"{line}\n" for line in lines)


def _line(values: Mapping[str, Any], where: str) -> str:
    fields = []
    for column, value in values.items():
        try:
            text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: column {column!r} holds {type(value).__name__}, which JSON cannot "
                f"({error}); make it text or a number, or leave the column out"
            ) from None
        fields.append(f"{json.dumps(column, ensure_ascii=False)}: {text}")
    return f"{{{', '.join(fields)}}}"


def write_rows(path: pathlib.Path, text: str) -> None:
    """Writes the lines of `to_jsonl`; raises InputError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_whole(path, text)
    except UnicodeEncodeError as error:
        raise InputError(f"{path.stem}: a text is no valid Unicode: {error.reason}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def _records(data: Any, name: str) -> Iterable[Any]:
    if hasattr(data, "columns") and hasattr(data, "to_dicts"):
        return data.to_dicts()
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        if not data.columns.is_unique:
            raise InputError(
                f"{name} has two columns of one name: {', '.join(map(str, data.columns))}"
            )
        return data.to_dict("records")
    if isinstance(data, Mapping):
        columns = {column: _column(values, column, name) for column, values in data.items()}
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{name}: the columns differ in length: {lengths}")
        return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    scalar = isinstance(data, str | bytes) or getattr(data, "shape", None) == ()
    if scalar or not isinstance(data, Iterable):
        raise InputError(f"{name} is {type(data).__name__}; give {EXPECTED}")
    return data


def _column(values: Any, column: Any, name: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(
            f"{name}: column {column!r} is {type(values).__name__}, not a list of values"
        )
    return list(values)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as those of Python, missing values as None."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, set | frozenset):  # in one order, whatever the process
        return sorted((_plain(item) for item in value), key=lambda item: (str(type(item)), item))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
