"""Arrow tables on disk, read by row: whatever the rows came from, they are read once, then mapped.

A table is a file of record batches. Rows are looked up by number without being copied, so that
memory stays flat however many there are.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.inputs.errors import InputError

BATCH = 10_000  # rows that are Python objects at a time
FILE = "rows.arrow"


def write(
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
    import pyarrow as pa

    schema = pa.schema(list(types.items()))
    with pa.OSFile(str(folder / FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while waiting := list(itertools.islice(rows, batch)):
            columns = zip(*waiting, strict=True)
            arrays = [pa.array(*pair) for pair in zip(columns, schema.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema))


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
        codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
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
