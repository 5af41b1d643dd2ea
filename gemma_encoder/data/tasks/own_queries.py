"""Rows of the user's files that queries group: locations, ids, and checks of both."""

import pathlib
from collections.abc import Sequence

import numpy as np

from gemma_encoder.data.files import rows
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError

QUERY_ID = "query_id"
DOCUMENT_ID = "document_id"


class QueryRows:
    """Rows of a table whose first column of text is the query.

    Attributes:
        paths, name: the files, and their name in messages.
        table: the rows, with the columns "label", "file" and "row".
        text_columns: columns of the table with the fields of the text, in order.
        has_query_id, has_document_id: the table has columns of ids.
    """

    paths: Sequence[pathlib.Path]
    name: str
    table: Table
    text_columns: Sequence[str]
    has_query_id: bool
    has_document_id: bool

    def __len__(self) -> int:
        return len(self.table)

    def numeric_labels(self) -> np.ndarray:
        """Returns [N] float64, the labels of a kind whose labels are numbers."""
        return self.table.numeric("label")

    def where(self, row: int) -> str:
        """Returns the location of a row, for messages."""
        path = self.paths[self.table.value("file", row)]
        return rows.where(path, self.table.value("row", row))

    def queries(self) -> tuple[Sequence[str], np.ndarray]:
        """Returns the ids of the queries, and [N] indices into them.

        Raises:
            InputError: a document is repeated for a query, or a query has two texts.
        """
        num_texts, text_codes = self.table.indices(self.text_columns[0])
        if self.has_query_id:
            ids, codes = self.table.codes(QUERY_ID)
            self._check_query_texts(ids, codes, text_codes)
        else:
            ids = _NumberedQueries(num_texts)
            codes = text_codes
        if self.has_document_id:
            self._check_documents(ids, codes)
        return ids, codes

    def _check_documents(self, query_ids: Sequence[str], codes: np.ndarray) -> None:
        """Raises InputError if a document is repeated for a query."""
        _, documents = self.table.indices(DOCUMENT_ID)
        order = np.lexsort((documents, codes))
        same_query = codes[order][1:] == codes[order][:-1]
        same_document = documents[order][1:] == documents[order][:-1]
        repeated = order[1:][same_query & same_document]
        if len(repeated):
            row = int(repeated.min())
            raise InputError(
                f"{self.where(row)}: document {self.document_id(row)!r} appears a second time for "
                f"query {query_ids[codes[row]]!r}"
            )

    def _check_query_texts(
        self, query_ids: Sequence[str], codes: np.ndarray, texts: np.ndarray
    ) -> None:
        """Raises InputError if rows of one query have different texts."""
        first_row = np.zeros(len(query_ids), np.int64)
        first_row[codes[::-1]] = np.arange(len(codes))[::-1]
        for row in np.flatnonzero(texts != texts[first_row[codes]])[:1]:
            earlier = self.where(int(first_row[codes[row]]))
            raise InputError(
                f"{self.where(int(row))}: the text of query {query_ids[codes[row]]!r} differs from "
                f"the one at {earlier}"
            )

    def document_id(self, row: int) -> str:
        """Returns the id of a row's document."""
        if self.has_document_id:
            return self.table.value(DOCUMENT_ID, row)
        name = f"row{self.table.value('row', row)}"
        return name if len(self.paths) == 1 else f"file{self.table.value('file', row) + 1}{name}"


class _NumberedQueries(Sequence):
    """The ids "query1", "query2", …, made when they are read: there may be millions."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        return f"query{range(1, self._count + 1)[index]}"


def name_of(paths: Sequence[pathlib.Path]) -> str:
    """Returns the name of files in messages."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
