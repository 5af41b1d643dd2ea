"""Cells of the user's files that have several documents of a query, or their scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_encoder.data.files.lines import parse_number
from gemma_encoder.data.tasks.own_cells import parse_list, shown_value
from gemma_encoder.inputs.errors import InputError


def read_documents(
    values: Mapping[str, Any], column: str, fields: Sequence[str], where: str
) -> list[list[str]]:
    """Returns the fields of each document in a cell; none if the cell is empty or null.

    Args:
        values: the row.
        column: a text, an object of texts by field, or a list of such; also as text, in the syntax
            of JSON or Python. "" for no document.
        fields: fields of a document.
        where: location of the row, for messages.

    Raises:
        InputError: a value is no document, or a document is empty.
    """
    value = values.get(column) if column else None
    if isinstance(value, str):
        value = _as_documents(value)
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [_document(item, column, fields, where) for item in items]


def _as_documents(text: str) -> list[Any] | str | None:
    """Parses a list of documents in text; a text that is no such list is a document."""
    if not text.strip():
        return None
    parsed = parse_list(text.strip()) if text.lstrip().startswith("[") else None
    is_list = parsed is not None and all(isinstance(item, str | Mapping) for item in parsed)
    return parsed if is_list else text


def _document(item: Any, column: str, fields: Sequence[str], where: str) -> list[str]:
    if isinstance(item, str) and len(fields) == 1:
        texts = [item]
    elif isinstance(item, Mapping):
        texts = ["" if item.get(field) is None else item[field] for field in fields]
    else:
        expected = f"objects with {', '.join(fields)}" if len(fields) > 1 else "texts"
        raise InputError(
            f"{where}: column {column!r} should contain {expected}, got {shown_value(item)}"
        )
    for text in texts:
        if not isinstance(text, str):
            raise InputError(
                f"{where}: column {column!r} should contain documents of text, got "
                f"{shown_value(text)}"
            )
    if not any(text.strip() for text in texts):
        raise InputError(f"{where}: a document in column {column!r} is empty")
    return texts


def read_scores(
    values: Mapping[str, Any], column: str, counts: tuple[int, int], where: str
) -> list[float]:
    """Returns a teacher's scores of the documents of a row: of the positives, then the negatives.

    Args:
        values: the row.
        column: a list of numbers; also as text, in the syntax of JSON or Python.
        counts: number of positives and of negatives.
        where: location of the row, for messages.

    Raises:
        InputError: there is not one finite number per document.
    """
    value = values.get(column)
    if isinstance(value, str) and value.strip().startswith("["):
        value = parse_list(value.strip())
    scores = list(value) if isinstance(value, list | tuple) else [value]
    if len(scores) != sum(counts):
        raise InputError(
            f"{where}: column {column!r} has {len(scores)} scores for {counts[0]} positives and "
            f"{counts[1]} negatives; it needs those of the positives, then those of the negatives"
        )
    return [_score(score, column, where) for score in scores]


def _score(value: Any, column: str, where: str) -> float:
    try:
        result = parse_number(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if isinstance(value, bool) or not math.isfinite(result):
        raise InputError(
            f"{where}: column {column!r} should contain finite numbers, got {shown_value(value)}"
        )
    return result
