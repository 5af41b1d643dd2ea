"""Rows of the user's files of a retrieval task, see `own_document_columns`.

A row of the table is a query and one of its documents; a row of lists becomes several of them.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.files import rows
from gemma_encoder.data.table import Table, write_summary, write_table_rows
from gemma_encoder.data.tasks import own_cells as cells
from gemma_encoder.data.tasks import own_lists
from gemma_encoder.data.tasks.own_checks import check_present, common_columns
from gemma_encoder.data.tasks.own_document_columns import DocumentColumns
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_queries import DOCUMENT_ID, QUERY_ID, QueryRows, name_of
from gemma_encoder.data.tasks.own_table import (
    Column,
    are_labeled,
    constant_column,
    document_columns,
    label_column,
    name_column,
    number_column,
    text_column,
    write_own_table,
)
from gemma_encoder.data.text_hashes import text_hashes
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED, Label
from gemma_encoder.inputs.task import Task


class DocumentRows(QueryRows):
    """Documents of the queries in the files of one split.

    Args:
        options: `config.own`.
        columns: meaning of the columns.
        paths: the files.
        origin: names the data that the columns are of, for messages.
        split: name of the split; test files may lack labels, and all but "train" scores.

    Attributes:
        labeled: True if there are labels.
        has_scores: True if there are scores of a teacher.
    """

    has_classes = False

    def __init__(
        self,
        options: OwnOptions,
        columns: DocumentColumns,
        paths: Sequence[pathlib.Path],
        origin: str,
        split: str,
    ):
        self.paths = paths
        self.name = name_of(paths)
        documents = (columns.positive,) if columns.are_lists else columns.document.values()
        ids = (columns.query_id, columns.document_id)
        required = [columns.query, *documents, *filter(None, ids)]
        required += [columns.label] if columns.label and split != "test" else []
        required += [columns.score] if columns.score and split == "train" else []
        present = common_columns(paths, required)
        check_present(columns, required, present, paths[0], origin)
        self.labeled = bool(
            not columns.label
            or split != "test"
            or are_labeled(paths, self.name, columns.label, present)
        )
        self.has_scores = bool(columns.score) and columns.score in present
        self.has_query_id, self.has_document_id = map(bool, ids)
        if not self.has_scores:
            columns = dataclasses.replace(columns, score="")
        self._columns = columns
        self._fields = {field: f"field {field}" for field in columns.document}
        self.text_columns = ["query", *self._fields.values()]
        self.table = self._open_table(options)
        if not len(self.table):
            raise InputError(f"{self.name} has no rows")
        self._positions = _positions(self.table) if columns.are_lists else None

    def _open_table(self, options: OwnOptions) -> Table:
        """Reads and checks the rows, or opens their cached table."""
        columns = self._columns
        settings = (dataclasses.astuple(columns), self.labeled)

        def write(folder: pathlib.Path) -> None:
            if columns.are_lists:
                _write_lists(folder, self.paths, columns)
            else:
                needed, made = _table_columns(options, columns, self.labeled)
                write_own_table(folder, self.paths, needed, made)

        description = f"table of queries and documents with {settings!r}"
        return cache.derive(self.paths, description, write, Table)

    def queries(self) -> tuple[Sequence[str], np.ndarray]:
        """Returns the ids of the queries, and [N] indices into them; -1 for repeated documents.

        Raises:
            InputError: as in `QueryRows`, or a text is a positive and a negative of one query.
        """
        ids, codes = super().queries()
        texts = text_hashes(self.table, self.text_columns[1:])
        order = np.lexsort((texts, codes))
        is_equal = (np.diff(codes[order]) == 0) & (np.diff(texts[order]) == 0)
        repeated = np.flatnonzero(is_equal) + 1
        is_positive = (self.numeric_labels() > 0)[order]
        self._refuse_contradictions(
            order, repeated[is_positive[repeated] != is_positive[repeated - 1]]
        )
        codes = codes.copy()
        codes[order[repeated]] = -1
        return ids, codes

    def _refuse_contradictions(self, order: np.ndarray, entries: np.ndarray) -> None:
        """Raises InputError if a text is a positive and a negative of one query.

        Args:
            order: rows, those of equal documents of a query one after another.
            entries: indices into `order`, where the label differs from that of the row before.
        """
        for entry in entries:
            first, second = sorted(order[entry - 1 : entry + 1].tolist())
            texts = [list(self.fields(row).values())[1:] for row in (first, second)]
            if [text.split() for text in texts[0]] != [text.split() for text in texts[1]]:
                continue  # equal hashes only
            raise InputError(
                f"{self.where(second)}: a document is a positive and a negative of the query "
                f"{self.table.value('query', second)[:60]!r}: {' '.join(texts[1])[:60]!r}, see "
                f"{self.where(first)}; leave one of them out"
            )

    def fields(self, row: int) -> dict[str, str]:
        """Returns the query and the fields of the document."""
        fields = {field: self.table.value(column, row) for field, column in self._fields.items()}
        return {"query": self.table.value("query", row), **fields}

    def label(self, row: int, indices: Mapping[str, int]) -> Label:
        """Returns the grade; with a teacher, (grade, score)."""
        del indices
        grade = self.table.value("label", row)
        return (grade, self.table.value("score", row)) if self.has_scores else grade

    def check_labels(self, task: Task, are_indices: bool, any_range: bool) -> None:
        """Accepts all grades: they were checked when the rows were read."""

    def class_indices(self, task: Task, are_indices: bool) -> dict[str, int]:
        """Returns no classes."""
        return {}

    def document_id(self, row: int) -> str:
        """Returns the id of a row's document; in lists, with its position in the list."""
        name = super().document_id(row)
        return name if self._positions is None else f"{name}.{self._positions[row] + 1}"


def _positions(table: Table) -> np.ndarray:
    """Returns [N] int32, the position of each document in its row of the file."""
    starts = np.ones(len(table), bool)
    starts[1:] = (np.diff(table.numeric("row")) != 0) | (np.diff(table.numeric("file")) != 0)
    first = np.flatnonzero(starts)
    lengths = np.diff([*first, len(table)])
    return (np.arange(len(table)) - np.repeat(first, lengths)).astype(np.int32)


def _table_columns(
    options: OwnOptions, columns: DocumentColumns, labeled: bool
) -> tuple[list[str], dict[str, Column]]:
    """Returns the columns of the files that are read, and those of the table."""
    names = tuple(columns.document.values())
    table = {"query": text_column(columns.query)}
    for field, column in zip(columns.document, document_columns(names), strict=True):
        table[f"field {field}"] = column
    ids = {QUERY_ID: columns.query_id, DOCUMENT_ID: columns.document_id}
    table |= {field: name_column(name) for field, name in ids.items() if name}
    needed = [columns.query, *names, *filter(None, ids.values())]
    if columns.score:
        table["score"] = number_column(columns.score)
        needed.append(columns.score)
    if not columns.label:
        table["label"] = constant_column(1.0)
    elif labeled:
        table["label"] = label_column(options, columns.label)
        needed.append(columns.label)
    else:
        table["label"] = constant_column(UNLABELED)
    return needed, table


def _write_lists(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], columns: DocumentColumns
) -> None:
    """Writes a row of the table for each document of the rows of files."""
    import pyarrow as pa

    text = pa.large_string()
    types = {"query": text} | {f"field {field}": text for field in columns.document}
    types |= {QUERY_ID: text} if columns.query_id else {}
    types |= {"score": pa.float64()} if columns.score else {}
    types |= {"label": pa.float64(), "file": pa.int32(), "row": pa.int64()}

    def documents() -> Iterator[list[Any]]:
        for index, path in enumerate(paths):
            for row in rows.read_rows(path)[1]:
                for values in _documents(row.values, columns, rows.where(path, row.position)):
                    rows.check_unicode(values, path, row.position)
                    yield [*values, index, row.position]

    write_table_rows(folder, types, documents())
    write_summary(folder, {})


def _documents(
    values: Mapping[str, Any], columns: DocumentColumns, where: str
) -> Iterator[list[Any]]:
    """Yields the columns of the table for each document of a row."""
    query = [cells.read_text(values, columns.query, where)]
    fields = tuple(columns.document)
    positives = own_lists.read_documents(values, columns.positive, fields, where)
    negatives = own_lists.read_documents(values, columns.negative, fields, where)
    if not positives:
        raise InputError(
            f"{where}: the query has no positive: column {columns.positive!r} is empty"
        )
    ids = [cells.read_name(values, columns.query_id, where)] if columns.query_id else []
    documents = [*positives, *negatives]
    scores: list[list[float]] = [[] for _ in documents]
    if columns.score:
        counts = (len(positives), len(negatives))
        scores = [[score] for score in own_lists.read_scores(values, columns.score, counts, where)]
    for index, (document, score) in enumerate(zip(documents, scores, strict=True)):
        yield [*query, *document, *ids, *score, float(index < len(positives))]
