"""Parsing and checking of single values in rows of the user's files."""

import decimal
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_encoder.data.files.lines import parse_number
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import are_numbers, canonical_name
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.literals import parse_literal

JOIN = "\x1f"  # separates the class names of a row in the table


def label_reader(options: OwnOptions, column: str) -> Callable[[Mapping[str, Any], str], Any]:
    """Returns the function that reads the label from the values and the location of a row."""
    kind = kinds.get(options.kind)
    if kind.label_column == "class":
        fractions = kind.fractional_classes
        return lambda values, where: read_class(values, column, where, fractions)
    if kind.label_column == "classes":
        return lambda values, where: JOIN.join(_names(values, column, options.separator, where))
    return lambda values, where: parse_cell(
        values, column, where, kind.least_label, kind.whole_labels
    )


def is_placeholder(value: Any) -> bool:
    """Returns True for values that stand for an unknown label: null, NaN, empty text, and -1."""
    if isinstance(value, str):
        return canonical_name(value.strip()) in ("", f"{UNLABELED:g}")
    if isinstance(value, list | tuple):
        return all(map(is_placeholder, value))
    return value is None or value == UNLABELED or value != value


def split_names(value: str) -> list[str]:
    """Splits a label of the table into class names."""
    return value.split(JOIN)


def read_part(values: Mapping[str, Any], column: str, where: str) -> str:
    """Returns a text that may be blank, null or missing; raises InputError if it is not text."""
    value = values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return read_text(values, column, where)


def read_text(values: Mapping[str, Any], column: str, where: str) -> str:
    """Returns a text; raises InputError if it is blank or not text."""
    value = _present(values, column, where)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} should contain text, got {type(value).__name__} "
            f"{str(value)[:40]!r}; own.fields names the columns of the text"
        )
    if not value.strip():
        raise InputError(f"{where}: column {column!r} is empty")
    return value


def read_name(values: Mapping[str, Any], column: str, where: str) -> str:
    """Returns a class or an id: text, an integer, or true and false."""
    return _as_name(_present(values, column, where), column, where)


def read_class(values: Mapping[str, Any], column: str, where: str, fractions: bool = False) -> str:
    """Returns a class, as `read_name`; if `fractions`, also from a number such as 0.5."""
    return _as_class(_present(values, column, where), column, where, fractions)


def _as_class(value: Any, column: str, where: str, fractions: bool = False) -> str:
    if fractions and isinstance(value, float) and are_numbers([str(value)]):
        value = str(value)
    name = _as_name(value, column, where)
    if JOIN in name:
        raise InputError(
            f"{where}: column {column!r} contains a class with the control character U+001F: "
            f"{name[:40]!r}; remove it"
        )
    return name


def _as_name(value: Any, column: str, where: str) -> str:
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, str | int):
        raise InputError(
            f"{where}: column {column!r} should contain text or a whole number, got "
            f"{type(value).__name__} {str(value)[:40]!r}"
        )
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if not name:
        raise InputError(f"{where}: column {column!r} is empty")
    return name


def _names(values: Mapping[str, Any], column: str, separator: str, where: str) -> list[str]:
    """Returns several classes, from a list, a list literal, or text with separators.

    An empty list or text means that no class applies.
    """
    value = _present(values, column, where)
    if isinstance(value, str) and value.strip().startswith("["):
        text = value.strip()
        value = parse_list(text)
        if value is None:
            raise InputError(f"{where}: column {column!r} contains a malformed list: {text[:60]!r}")
    elif isinstance(value, str):
        value = [part for part in value.split(separator)] if value.strip() else []
    elif not isinstance(value, Sequence):
        value = [value]
    names = [_as_class(item, column, where) for item in value]
    if len(set(map(canonical_name, names))) < len(names):
        raise InputError(f"{where}: column {column!r} names a class twice: {', '.join(names)}")
    return names


def parse_list(text: str) -> list[Any] | None:
    """Parses a list in the syntax of JSON or of Python, which pandas' `to_csv` writes.

    None if the text is no list.
    """
    for parse in (from_json, parse_literal):
        try:
            value = parse(text)
        except ValueError:
            continue
        if isinstance(value, list):
            return value
    return None


def parse_cell(
    values: Mapping[str, Any], column: str, where: str, least: float, whole: bool
) -> float:
    """Returns a finite number of at least `least`; if `whole`, without a fraction."""
    value = _present(values, column, where)
    try:
        result = parse_number(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    is_valid = math.isfinite(result) and result >= least and not isinstance(value, bool)
    if not is_valid or (whole and not result.is_integer()):
        expected = "a whole number" if whole else "a number"
        bound = f" of at least {least:g}" if least > -math.inf else ""
        raise InputError(
            f"{where}: column {column!r} should contain {expected}{bound}, got {shown_value(value)}"
        )
    return result


def shown_value(value: Any) -> str:
    """Returns the repr of a value for messages; the first characters of a long one."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _present(values: Mapping[str, Any], column: str, where: str) -> Any:
    """Returns a value; raises InputError if it is missing or null."""
    if values.get(column) is not None:
        return values[column]
    if column in values:
        raise InputError(f"{where}: column {column!r} is null")
    raise InputError(
        f"{where}: column {column!r} is missing; the row has {', '.join(map(repr, values))}"
    )
