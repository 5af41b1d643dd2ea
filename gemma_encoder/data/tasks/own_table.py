"""The Arrow table of the user's own files: every row read once and checked, Parquet by columns."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.data import table
from gemma_encoder.data.files import rows
from gemma_encoder.data.tasks import own_cells as cells
from gemma_encoder.data.tasks import own_columns
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.kind import UNLABELED

MAX_VALUES = 100_000  # different labels that are listed in the summary of a table
TEXT_LABELS = ("class", "classes")  # label columns that hold text in the table


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        is_text: text, or numbers.
        cell: its value, of the values of a row and the row's name in messages.
        array: its values, of the Arrow arrays of a batch; None where `cell` has to read them.
    """

    is_text: bool
    cell: Callable[[Mapping[str, Any], str], Any]
    array: Callable[[Mapping[str, Any]], Any]


def text_column(name: str) -> Column:
    """The texts of a column."""
    return Column(
        True,
        lambda values, where: cells.read_text(values, name, where),
        lambda arrays: own_columns.nonblank_texts(arrays[name]),
    )


def name_column(name: str) -> Column:
    """The ids of a column."""
    return Column(
        True,
        lambda values, where: cells.read_name(values, name, where),
        lambda arrays: own_columns.class_or_id_names(arrays[name]),
    )


def label_column(options: OwnOptions, name: str) -> Column:
    """The labels of a column, or unknown ones where it has no name."""
    is_text = bool(name) and kinds.get(options.kind).label_column in TEXT_LABELS
    if not name:
        return Column(is_text, cells.unlabeled, _unlabeled)
    check = own_columns.label_check(options)
    return Column(is_text, cells.label_reader(options, name), lambda arrays: check(arrays[name]))


def _unlabeled(arrays: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    count = len(next(iter(arrays.values())))
    return table.to_array(np.full(count, UNLABELED), pa.float64())


def write_own_table(
    folder: pathlib.Path,
    paths: Sequence[pathlib.Path],
    needed: Sequence[str],
    columns: Mapping[str, Column],
) -> None:
    """Writes the table of some files.

    Beside `columns` it has `file`, an index, and `row`, the number in that file. Its summary holds,
    over all rows: `values`, each class that occurs with the first row that names it; `several`,
    whether a row names more than one; `low` and `high`, the extreme numbers, each with its first
    row.

    Args:
        folder: exists.
        paths: the files.
        needed: the columns of the files that are read.
        columns: by name, the label last and named so.

    Raises:
        InputError: a file is broken, or a value is none that its column can hold.
    """
    import pyarrow as pa

    types = {
        name: pa.large_string() if column.is_text else pa.float64()
        for name, column in columns.items()
    }
    summary = _Summary(columns["label"].is_text)

    def batches() -> Iterator[list[Any]]:
        for index, path in enumerate(paths):
            for numbers, arrays in _batches(path, needed, columns, types):
                summary.add(arrays[-1])
                file = np.full(len(numbers), index, np.int32)
                yield [
                    *arrays,
                    table.to_array(file, pa.int32()),
                    table.to_array(numbers, pa.int64()),
                ]

    table.write_table_batches(folder, {**types, "file": pa.int32(), "row": pa.int64()}, batches())
    table.write_summary(folder, summary.facts())


def _batches(
    path: pathlib.Path,
    needed: Sequence[str],
    columns: Mapping[str, Column],
    types: Mapping[str, Any],
) -> Iterator[tuple[Sequence[int] | np.ndarray, list[Any]]]:
    """Numbers of some rows of a file, and the Arrow array of each column."""

    def by_cells(some: Iterable[rows.FileRow]) -> list[Any]:
        return table.to_arrays([_cells(path, row, columns) for row in some], types)

    if not rows.is_parquet(path):
        for some in table.chunks(rows.read_rows(path)[1]):
            yield [row.position for row in some], by_cells(some)
        return
    for first, batch in rows.parquet_batches(path, needed):
        arrays = [column.array(batch) for column in columns.values()]
        if any(array is None for array in arrays):
            arrays = by_cells(rows.parquet_rows(path, first, batch))
        yield np.arange(first, first + len(arrays[0])), arrays


def _cells(path: pathlib.Path, row: rows.FileRow, columns: Mapping[str, Column]) -> list[Any]:
    where = rows.where(path, row.position)
    result = [column.cell(row.values, where) for column in columns.values()]
    rows.check_unicode(result, path, row.position)
    return result


class _Summary:
    """Facts about the labels of all rows, gathered while they are read."""

    def __init__(self, is_text: bool):
        self._is_text, self._row = is_text, 0
        self._values: dict[str, int] = {}
        self._several = False
        self._extremes: dict[str, tuple[float, int]] = {}

    def add(self, labels: Any) -> None:
        """Counts the labels of the next rows, an Arrow array."""
        if not self._is_text:
            values = table.numeric_values(labels)
            for name, row in (("low", int(values.argmin())), ("high", int(values.argmax()))):
                self._add_extreme(name, float(values[row]), self._row + row)
        else:
            encoded = labels.dictionary_encode()
            _, first = np.unique(table.numeric_values(encoded.indices), return_index=True)
            for label, row in zip(encoded.dictionary.to_pylist(), first.tolist(), strict=True):
                self._add_classes([name for name in cells.split_names(label) if name], row)
        self._row += len(labels)

    def _add_extreme(self, name: str, value: float, row: int) -> None:
        sign = 1 if name == "low" else -1
        if name not in self._extremes or sign * value < sign * self._extremes[name][0]:
            self._extremes[name] = (value, row)

    def _add_classes(self, names: Sequence[str], row: int) -> None:
        self._several |= len(names) > 1
        for name in names:
            if name not in self._values and len(self._values) <= MAX_VALUES:
                self._values[name] = self._row + row

    def facts(self) -> dict[str, Any]:
        """As JSON holds them."""
        if self._is_text:
            return {"values": self._values, "several": self._several}
        return dict(self._extremes)
