"""Conversion of the user's files to an Arrow table; checks every row, Parquet by columns."""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from gemma_encoder.data import table
from gemma_encoder.data.files import rows
from gemma_encoder.data.tasks import own_cells as cells
from gemma_encoder.data.tasks import own_columns
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED

MAX_VALUES = 100_000  # distinct labels listed in the summary of a table
TEXT_LABELS = ("class", "classes")  # kinds of label columns stored as text in the table


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        is_text: True for text, False for numbers.
        cell: reads a value from the values of a row and its location for messages.
        array: reads the Arrow array from those of a batch, or returns None to fall back on `cell`.
    """

    is_text: bool
    cell: Callable[[Mapping[str, Any], str], Any]
    array: Callable[[Mapping[str, Any]], Any]


def text_column(name: str) -> Column:
    """Returns a column of texts."""
    return Column(
        True,
        lambda values, where: cells.read_text(values, name, where),
        lambda arrays: own_columns.nonblank_texts(arrays[name]),
    )


def name_column(name: str) -> Column:
    """Returns a column of ids."""
    return Column(
        True,
        lambda values, where: cells.read_name(values, name, where),
        lambda arrays: own_columns.class_or_id_names(arrays[name]),
    )


def label_column(options: OwnOptions, name: str) -> Column:
    """Returns a column of labels, or of unknown ones if `name` is empty."""
    if not name:
        return constant_column(UNLABELED)
    is_text = kinds.get(options.kind).label_column in TEXT_LABELS
    check = own_columns.label_check(options)
    return Column(is_text, cells.label_reader(options, name), lambda arrays: check(arrays[name]))


def number_column(name: str) -> Column:
    """Returns a column of finite numbers."""
    return Column(
        False,
        lambda values, where: cells.parse_cell(values, name, where, -math.inf, False),
        lambda arrays: own_columns.finite_numbers(arrays[name]),
    )


def constant_column(value: float) -> Column:
    """Returns a column with the same number in every row."""

    def array(arrays: Mapping[str, Any]) -> Any:
        import pyarrow as pa

        return table.to_array(np.full(len(next(iter(arrays.values()))), value), pa.float64())

    return Column(False, lambda values, where: value, array)


def document_columns(names: Sequence[str]) -> list[Column]:
    """Returns columns of text, of which one may be blank where another is not."""
    if len(names) == 1:
        return [text_column(names[0])]

    def column(name: str) -> Column:
        def cell(values: Mapping[str, Any], where: str) -> str:
            parts = {each: cells.read_part(values, each, where) for each in names}
            if not any(parts.values()):
                listed = ", ".join(map(repr, names))
                raise InputError(f"{where}: the document is empty: the columns {listed} are blank")
            return parts[name]

        return text_column(name)._replace(cell=cell)

    return [column(name) for name in names]


def are_placeholders(paths: Sequence[pathlib.Path], label: str) -> bool:
    """Returns True if the label column of all files is empty or -1 throughout.

    A labeled file is read only up to its first label.
    """
    has_rows = False
    for path in paths:
        if rows.is_parquet(path):
            batches = rows.parquet_batches(path, [label])
            values = (row for batch in batches for row in rows.parquet_rows(path, *batch))
        else:
            values = rows.read_rows(path)[1]
        for row in values:
            has_rows = True
            if not cells.is_placeholder(row.values.get(label)):
                return False
    return has_rows


def are_labeled(
    paths: Sequence[pathlib.Path], name: str, column: str, present: Sequence[str]
) -> bool:
    """Returns True if any row has a label; logs if there are placeholders only.

    Args:
        paths, name: the files, and their name in messages.
        column: column of the label.
        present: columns of the files.
    """
    is_present = column in present
    if not is_present and not any(map(rows.has_keys, paths)):
        return False
    if not are_placeholders(paths, column):
        return True
    if is_present:
        logging.warning(
            "%s: every label is -1 or empty, that is unlabeled: there will be predictions, but no "
            "metrics",
            name,
        )
    return False


def write_own_table(
    folder: pathlib.Path,
    paths: Sequence[pathlib.Path],
    needed: Sequence[str],
    columns: Mapping[str, Column],
) -> None:
    """Writes the rows of files to a table.

    The table has two more columns: `file`, the index of the file, and `row`, the 1-based position
    in that file. Its summary contains, for text labels, `values` (each class with its first row)
    and `several` (True if a row has more than one class); for numeric labels, `low` and `high` (the
    extreme labels with their first rows).

    Args:
        folder: an existing folder.
        paths: the files.
        needed: columns of the files to read.
        columns: columns of the table by name, the last one called "label".

    Raises:
        InputError: a file is malformed, or a value is invalid for its column.
    """
    import pyarrow as pa

    types = {
        name: pa.large_string() if column.is_text else pa.float64()
        for name, column in columns.items()
    }
    summary = _Summary(columns["label"].is_text)

    def batches() -> Iterator[list[Any]]:
        for index, path in enumerate(paths):
            for positions, arrays in _batches(path, needed, columns, types):
                summary.add(arrays[-1])
                file = np.full(len(positions), index, np.int32)
                yield [
                    *arrays,
                    table.to_array(file, pa.int32()),
                    table.to_array(positions, pa.int64()),
                ]

    table.write_table_batches(folder, {**types, "file": pa.int32(), "row": pa.int64()}, batches())
    table.write_summary(folder, summary.facts())


def _batches(
    path: pathlib.Path,
    needed: Sequence[str],
    columns: Mapping[str, Column],
    types: Mapping[str, Any],
) -> Iterator[tuple[Sequence[int] | np.ndarray, list[Any]]]:
    """Yields batches of a file: positions of the rows, and the Arrow array of each column."""

    def read_cells(chunk: Iterable[rows.FileRow]) -> list[Any]:
        return table.to_arrays([_cells(path, row, columns) for row in chunk], types)

    if not rows.is_parquet(path):
        for chunk in table.chunks(rows.read_rows(path)[1]):
            yield [row.position for row in chunk], read_cells(chunk)
        return
    for first, batch in rows.parquet_batches(path, needed):
        arrays = [column.array(batch) for column in columns.values()]
        if any(array is None for array in arrays):
            arrays = read_cells(rows.parquet_rows(path, first, batch))
        yield np.arange(first, first + len(arrays[0])), arrays


def _cells(path: pathlib.Path, row: rows.FileRow, columns: Mapping[str, Column]) -> list[Any]:
    """Returns the checked values of a row."""
    where = rows.where(path, row.position)
    result = [column.cell(row.values, where) for column in columns.values()]
    rows.check_unicode(result, path, row.position)
    return result


class _Summary:
    """Accumulates the summary of the labels while rows are read."""

    def __init__(self, is_text: bool):
        self._is_text = is_text
        self._row = 0  # rows so far
        self._values: dict[str, int] = {}
        self._several = False
        self._extremes: dict[str, tuple[float, int]] = {}

    def add(self, labels: Any) -> None:
        """Adds the labels of the next rows, an Arrow array."""
        if not self._is_text:
            values = table.numeric_values(labels)
            for name, row in (("low", int(values.argmin())), ("high", int(values.argmax()))):
                self._add_extreme(name, float(values[row]), row)
        else:
            encoded = labels.dictionary_encode()
            _, first = np.unique(table.numeric_values(encoded.indices), return_index=True)
            for label, row in zip(encoded.dictionary.to_pylist(), first.tolist(), strict=True):
                self._add_classes([name for name in cells.split_names(label) if name], row)
        self._row += len(labels)

    def _add_extreme(self, name: str, value: float, row: int) -> None:
        sign = 1 if name == "low" else -1
        if name not in self._extremes or sign * value < sign * self._extremes[name][0]:
            self._extremes[name] = (value, self._row + row)

    def _add_classes(self, names: Sequence[str], row: int) -> None:
        self._several |= len(names) > 1
        for name in names:
            if name not in self._values and len(self._values) <= MAX_VALUES:
                self._values[name] = self._row + row

    def facts(self) -> dict[str, Any]:
        """Returns the summary, for JSON."""
        if self._is_text:
            return {"values": self._values, "several": self._several}
        return dict(self._extremes)
