"""Arrow tables on disk, read by row: whatever the rows came from, they are read once, then mapped.

A table is a file of record batches. Rows are looked up by number without being copied, so that
memory stays flat however many there are.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from gemma_encoder.inputs.errors import InputError

Row = TypeVar("Row")

BATCH = 10_000  # rows that are Python objects at a time
FILE = "rows.arrow"


def write_table_rows(
    folder: pathlib.Path,
    types: Mapping[str, Any],
    rows: Iterator[Sequence[Any]],
    batch: int = BATCH,
) -> None:
    """Writes the table of a folder.

    Args:
        folder: exists.
        types: Arrow type of each column, by name.
        rows: values in the order of the columns.
        batch: rows that are held in memory.
    """
    write_table_batches(folder, types, (to_arrays(some, types) for some in chunks(rows, batch)))


def write_table_batches(
    folder: pathlib.Path, types: Mapping[str, Any], batches: Iterable[Sequence[Any]]
) -> None:
    """Writes a table as `write` does, of batches that are an Arrow array for each column."""
    import pyarrow as pa

    schema = pa.schema(list(types.items()))
    with pa.OSFile(str(folder / FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(list(batch), schema))


def chunks(rows: Iterable[Row], size: int = BATCH) -> Iterator[list[Row]]:
    """The rows in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while some := list(itertools.islice(iterator, size)):
        yield some


def to_arrays(rows: Sequence[Sequence[Any]], types: Mapping[str, Any]) -> list[Any]:
    """The columns of some rows as Arrow arrays."""
    columns = zip(*rows, strict=True)
    return [to_array(values, kind) for values, kind in zip(columns, types.values(), strict=True)]


def to_array(values: Sequence[Any] | np.ndarray, kind: Any) -> Any:
    """The Arrow array of some values.

    Text and numbers are laid out here, because `pyarrow.array` imports pandas (0.25 s).
    """
    import pyarrow as pa

    if kind == pa.large_string():
        texts = [value.encode() for value in values]
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        buffers = [offsets, b"".join(texts)]
    elif kind in (pa.int32(), pa.int64(), pa.float64()):
        buffers = [np.asarray(values, str(kind))]
    else:
        return pa.array(values, kind)
    return pa.Array.from_buffers(kind, len(values), [None, *map(pa.py_buffer, buffers)])


def numeric_values(array: Any) -> np.ndarray:
    """The values of an Arrow array of numbers without nulls; `to_numpy` would import pandas."""
    values = np.frombuffer(array.buffers()[1], str(array.type))
    return values[array.offset : array.offset + len(array)]


def write_summary(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Stores facts about all rows beside the table."""
    (folder / "summary.json").write_text(json.dumps(summary))


class Table:
    """The rows of a written table by index. Reading is safe in threads.

    Args:
        folder: that `write` filled; what is mapped outlives the folder's name.

    Attributes:
        arrow: the `pyarrow.Table`.
        summary: as `write_summary` stored it.
    """

    def __init__(self, folder: pathlib.Path):
        import pyarrow as pa

        self.arrow = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        self._columns = {name: self.arrow.column(name) for name in self.arrow.column_names}
        summary = folder / "summary.json"
        self.summary: dict[str, Any] = json.loads(summary.read_text()) if summary.exists() else {}

    def __len__(self) -> int:
        return len(self.arrow)

    def value(self, column: str, index: int) -> Any:
        """One value."""
        return self._columns[column][int(index)].as_py()

    def row(self, index: int) -> dict[str, Any]:
        """All values of a row, by column."""
        return {name: column[int(index)].as_py() for name, column in self._columns.items()}

    def codes(self, column: str) -> tuple[list[str], np.ndarray]:
        """Different values of a text column in their order, and which of them each row has."""
        chunks = self._columns[column].dictionary_encode().unify_dictionaries().chunks
        codes = np.concatenate([numeric_values(chunk.indices) for chunk in chunks])
        return chunks[0].dictionary.to_pylist(), codes


class Groups:
    """The rows of each query, by the query's index.

    Args:
        names: of the queries.
        codes: [N], which query each row has.
    """

    def __init__(self, names: Sequence[str], codes: np.ndarray):
        self._names, self._codes, self._order = names, codes, np.argsort(codes, kind="stable")
        self._starts = np.searchsorted(codes[self._order], np.arange(len(names) + 1))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[str, list[int]]:
        rows = self._order[self._starts[index] : self._starts[index + 1]]
        return self._names[index], rows.tolist()

    def has_both_labels(self, labels: np.ndarray) -> np.ndarray:
        """[Q]: whether a query has a positive and a negative, by the labels of the rows."""
        positives = np.bincount(self._codes[labels > 0], minlength=len(self))
        return (positives > 0) & (positives < np.diff(self._starts))


def decode(value: bytes, column: str, where: str) -> str:
    """Text of its UTF-8 bytes; raises InputError naming the column where they are none."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: field {column!r} is not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from error
