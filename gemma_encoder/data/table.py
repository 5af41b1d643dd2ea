"""Memory-mapped Arrow tables with random access to rows.

A table is a file of record batches, written once from any kind of rows. Rows are looked up by index
without copying, so memory use does not grow with the number of rows.
"""

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import write_whole

Row = TypeVar("Row")

BATCH = 10_000  # rows held as Python objects at a time
FILE = "rows.arrow"


def write_table_rows(
    folder: pathlib.Path,
    types: Mapping[str, Any],
    rows: Iterator[Sequence[Any]],
    batch: int = BATCH,
    name: str = FILE,
) -> None:
    """Writes a table to a folder, row by row.

    Args:
        folder: an existing folder.
        types: Arrow type of each column, by name.
        rows: values in the order of the columns.
        batch: rows held in memory.
        name: name of the file, for one that is renamed to `FILE` when it is complete.
    """
    batches = (to_arrays(chunk, types) for chunk in chunks(rows, batch))
    write_table_batches(folder, types, batches, name)


def write_table_batches(
    folder: pathlib.Path,
    types: Mapping[str, Any],
    batches: Iterable[Sequence[Any]],
    name: str = FILE,
) -> None:
    """Writes a table to a folder from batches, each with an Arrow array per column."""
    import pyarrow as pa

    schema = pa.schema(list(types.items()))
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(list(batch), schema))


def chunks(rows: Iterable[Row], size: int = BATCH) -> Iterator[list[Row]]:
    """Yields the rows in lists of `size`; the last one may be shorter."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def to_arrays(rows: Sequence[Sequence[Any]], types: Mapping[str, Any]) -> list[Any]:
    """Converts rows to an Arrow array per column."""
    columns = zip(*rows, strict=True)
    return [to_array(values, kind) for values, kind in zip(columns, types.values(), strict=True)]


def to_array(values: Sequence[Any] | np.ndarray, kind: Any) -> Any:
    """Converts values to an Arrow array.

    The buffers of text and numbers are built here because `pyarrow.array` imports pandas (0.25 s).
    """
    import pyarrow as pa

    if kind == pa.large_string():
        texts = [value.encode() for value in values]
        ends = np.cumsum([len(text) for text in texts])
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        buffers = [offsets, b"".join(texts)]
    elif kind in (pa.int32(), pa.int64(), pa.float64()):
        buffers = [np.asarray(values, str(kind))]
    else:
        return pa.array(values, kind)
    return pa.Array.from_buffers(kind, len(values), [None, *map(pa.py_buffer, buffers)])


def numeric_values(array: Any) -> np.ndarray:
    """Returns the values of a numeric Arrow array without nulls; `to_numpy` imports pandas."""
    values = np.frombuffer(array.buffers()[1], str(array.type))
    return values[array.offset : array.offset + len(array)]


def write_summary(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Stores facts about all rows next to the table."""
    write_whole(folder / "summary.json", to_json(summary))


class Table:
    """Random access to the rows of a written table. Thread-safe.

    Args:
        folder: the folder of the table, which may be deleted once it is mapped.

    Attributes:
        arrow: the `pyarrow.Table`.
        summary: the facts that `write_summary` stored.
    """

    def __init__(self, folder: pathlib.Path):
        import pyarrow as pa

        self.arrow = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        self._columns = {name: self.arrow.column(name) for name in self.arrow.column_names}
        summary = folder / "summary.json"
        self.summary: dict[str, Any] = read_object(summary) if summary.exists() else {}

    def __len__(self) -> int:
        return len(self.arrow)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def numeric(self, column: str) -> np.ndarray:
        """Returns the values of a numeric column, [N]."""
        return np.concatenate([numeric_values(chunk) for chunk in self._columns[column].chunks])

    def value(self, column: str, index: int) -> Any:
        """Returns one value."""
        return self._columns[column][int(index)].as_py()

    def row(self, index: int) -> dict[str, Any]:
        """Returns all values of a row, by column."""
        return {name: column[int(index)].as_py() for name, column in self._columns.items()}

    def codes(self, column: str) -> tuple[list[str], np.ndarray]:
        """Dictionary-encodes a text column: its distinct values, and [N] indices into them."""
        values, codes = self._encoded(column)
        return values.to_pylist(), codes

    def indices(self, column: str) -> tuple[int, np.ndarray]:
        """Returns the number of distinct values of a text column, and the codes of `codes`."""
        values, codes = self._encoded(column)
        return len(values), codes

    def _encoded(self, column: str) -> tuple[Any, np.ndarray]:
        encoded = self._columns[column].dictionary_encode()
        # All chunks have one dictionary; to unify equal ones takes ten seconds for a million texts.
        if len({chunk.dictionary.buffers()[2].address for chunk in encoded.chunks}) > 1:
            encoded = encoded.unify_dictionaries()
        chunks = encoded.chunks
        codes = np.concatenate([numeric_values(chunk.indices) for chunk in chunks])
        return chunks[0].dictionary, codes


class Groups:
    """Rows grouped by query, by the query's index.

    Args:
        names: ids of the queries.
        codes: [N], index of each row's query; -1 leaves a row out.
    """

    def __init__(self, names: Sequence[str], codes: np.ndarray):
        self._names = names
        self._codes = codes
        self._order = np.argsort(codes, kind="stable")
        self._starts = np.searchsorted(codes[self._order], np.arange(len(names) + 1))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[str, list[int]]:
        rows = self._order[self._starts[index] : self._starts[index + 1]]
        return self._names[index], rows.tolist()

    def first_rows(self) -> np.ndarray:
        """Returns [Q], the first row of each query."""
        return self._order[self._starts[:-1]]

    def num_positives(self, labels: np.ndarray) -> np.ndarray:
        """Returns [Q], the number of positive rows of each query."""
        return np.bincount(self._codes[(labels > 0) & (self._codes >= 0)], minlength=len(self))

    def has_both_labels(self, labels: np.ndarray) -> np.ndarray:
        """Returns [Q] bool: True for queries with a positive and a negative row."""
        positives = self.num_positives(labels)
        return (positives > 0) & (positives < np.diff(self._starts))


def decode(value: bytes, column: str, where: str) -> str:
    """Decodes UTF-8 bytes; raises InputError naming the column if they are invalid."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: field {column!r} is not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from error
