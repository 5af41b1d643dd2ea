"""Values of one row of the user's own files: texts, names, classes and numbers, each checked."""

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED

JOIN = "\x1f"  # between the class names of one row, in the table


def label_reader(options: OwnOptions, column: str) -> Callable[[Mapping[str, Any], str], Any]:
    """The function that reads the label of a row; its arguments are the values and their row."""
    kind = kinds.get(options.kind)
    if kind.label_column == "class":
        return lambda values, where: read_name(values, column, where)
    if kind.label_column == "classes":
        return lambda values, where: JOIN.join(_names(values, column, options.separator, where))
    return lambda values, where: _parse_number(values, column, where, kind.least_label)


def unlabeled(values: Mapping[str, Any], where: str) -> float:
    """The label of a row that has none."""
    return UNLABELED


def split_names(value: str) -> list[str]:
    """The class names of a label in the table."""
    return value.split(JOIN)


def read_text(values: Mapping[str, Any], column: str, where: str) -> str:
    """A text that is not blank."""
    value = _present(values, column, where)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} should hold text, got {type(value).__name__} "
            f"{str(value)[:40]!r}"
        )
    if not value.strip():
        raise InputError(f"{where}: column {column!r} is empty")
    return value


def read_name(values: Mapping[str, Any], column: str, where: str) -> str:
    """A class or an id: text, a whole number, or true and false."""
    return _as_name(_present(values, column, where), column, where)


def _as_name(value: Any, column: str, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise InputError(
            f"{where}: column {column!r} should hold text or a whole number, got "
            f"{type(value).__name__} {str(value)[:40]!r}"
        )
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if not name:
        raise InputError(f"{where}: column {column!r} is empty")
    return name


def _names(values: Mapping[str, Any], column: str, separator: str, where: str) -> list[str]:
    """Several classes: a list, a list that is written as text, or text with separators.

    An empty list or text means that no class applies.
    """
    value = _present(values, column, where)
    if isinstance(value, str) and value.strip().startswith("["):
        value = _parsed_list(value.strip(), column, where)
    elif isinstance(value, str):
        value = [part for part in value.split(separator)] if value.strip() else []
    elif not isinstance(value, Sequence):
        value = [value]
    names = [_as_name(item, column, where) for item in value]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: column {column!r} names a class twice: {', '.join(names)}")
    return names


def _parsed_list(text: str, column: str, where: str) -> list[Any]:
    """A list as JSON writes it, or as Python does (pandas' `to_csv`)."""
    for parse, error in ((json.loads, json.JSONDecodeError), (ast.literal_eval, Exception)):
        try:
            value = parse(text)
        except error:
            continue
        if isinstance(value, list):
            return value
    raise InputError(f"{where}: column {column!r} holds a malformed list: {text[:60]!r}")


def _parse_number(values: Mapping[str, Any], column: str, where: str, least: float) -> float:
    value = _present(values, column, where)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least or isinstance(value, bool):
        bound = f" of at least {least:g}" if least > -math.inf else ""
        raise InputError(f"{where}: column {column!r} should hold a number{bound}, got {value!r}")
    return number


def _present(values: Mapping[str, Any], column: str, where: str) -> Any:
    if values.get(column) is not None:
        return values[column]
    if column in values:
        raise InputError(f"{where}: column {column!r} is null")
    raise InputError(
        f"{where}: column {column!r} is missing; there are {', '.join(map(repr, values))}"
    )
