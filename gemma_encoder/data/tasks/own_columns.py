"""Vectorized checks of whole columns in the user's Parquet files.

A function returns None if a column needs a closer look. `own_cells` then reads it row by row, and
reports the first invalid value.
"""

import math
from collections.abc import Callable
from typing import Any

from gemma_encoder.data.tasks.own_cells import JOIN
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs import kinds

Check = Callable[[Any], Any]  # Arrow array of the file -> Arrow array of the table, or None

WHITESPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # as in str.strip


def label_check(options: OwnOptions) -> Check:
    """Returns the function that checks the labels of a column."""
    kind = kinds.get(options.kind)
    if kind.label_column == "class":
        return class_names
    if kind.label_column == "classes":
        return lambda column: None
    return lambda column: finite_numbers(column, kind.least_label, kind.whole_labels)


def nonblank_texts(column: Any) -> Any:
    """Checks for texts, none blank."""
    import pyarrow.compute as pc

    column = _as_text(column)
    if column is None or column.null_count:
        return None
    is_blank = pc.equal(pc.binary_length(pc.utf8_ltrim(column, WHITESPACE)), 0)
    return None if pc.any(is_blank).as_py() else column


def class_names(column: Any) -> Any:
    """Checks for classes, as `class_or_id_names`, none of which looks like several."""
    import pyarrow.compute as pc

    column = class_or_id_names(column)
    if column is None or pc.any(pc.match_substring(column, JOIN)).as_py():
        return None
    return column


def class_or_id_names(column: Any) -> Any:
    """Checks for classes or ids (text, integers, or true and false) and converts them to text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types
    try:
        if types.is_float32(column.type) or types.is_float64(column.type):
            column = column.cast(pa.int64())  # raises for fractions
        if types.is_integer(column.type) or types.is_boolean(column.type):
            return None if column.null_count else column.cast(pa.large_string())
    except pa.ArrowException:
        return None
    column = nonblank_texts(column)
    return None if column is None else pc.utf8_trim(column, WHITESPACE)


def finite_numbers(column: Any, least: float = -math.inf, whole: bool = False) -> Any:
    """Checks for finite, optionally whole numbers of at least `least`; converts to float64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if column.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    column = column.cast(pa.float64(), safe=False)  # rounds like float()
    is_valid = pc.and_(pc.is_finite(column), pc.greater_equal(column, least))
    if whole:
        is_valid = pc.and_(is_valid, pc.equal(column, pc.floor(column)))
    return column if pc.all(is_valid).as_py() else None


def _as_text(column: Any) -> Any:
    """Converts text to `large_string`; returns None if it is not valid UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return column.cast(pa.large_string())
