"""Retrieval tasks on lists in memory or in tables: each record is a query with its documents.

In evaluation, the queries of a split search the distinct documents of all of its lists.
"""

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemma_encoder.data.searched_documents import searched_documents
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example, Task

KEY_BITS = 31  # of `Batch.example_id`


class Distinct(NamedTuple):
    """Queries and distinct documents of a split.

    Attributes:
        documents: (record, position in its list) of the first appearance of each document that is
            searched.
        qrels: grades by query id and document id.
    """

    documents: Sequence[tuple[int, int]]
    qrels: Mapping[str, Mapping[str, float]]


class ListRetrievalSource(Source):
    """A retrieval task on the lists of another source.

    Args:
        task: the retrieval task; the templates of its roles name fields of the lists' examples.
        options: the data options of the config.
        lists: a source whose records are the documents of a query, with both in their fields.
    """

    def __init__(self, task: Task, options: DataOptions, lists: Source):
        super().__init__(task, options)
        self._lists = lists
        self.splits = lists.splits
        self.has_teacher = lists.has_teacher
        self.inferred = lists.inferred
        self.distinct = functools.cache(self._distinct)  # split -> its distinct documents

    def check(self) -> None:
        """Raises InputError if data are missing."""
        self._lists.check()

    def files(self, split: str) -> Sequence[pathlib.Path]:
        """Returns the files of the lists."""
        return self._lists.files(split)

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Returns the fingerprints of the lists' files."""
        return self._lists.fingerprints(split)

    def where(self, split: str, index: int) -> str:
        """Returns the location of a record, for messages."""
        if split != "train":
            queries = self._lists.size(split)
            index = index if index < queries else self.distinct(split).documents[index - queries][0]
        return self._lists.where(split, index)

    def count(self, split: str) -> int:
        """Returns the number of lists, or of queries and distinct documents to evaluate."""
        if split == "train":
            return self._lists.count(split)
        return self._lists.size(split) + len(self.distinct(split).documents)

    def size(self, split: str) -> int:
        """Returns the number of records that are used; limits of evaluation limit the queries."""
        return super().size(split) if split == "train" else self.count(split)

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """Returns the grades of the evaluated queries."""
        return self.distinct(split).qrels

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns a query or a document; for training a query, then all of its documents."""
        if training:
            record = self._lists.record(split, index)
            labels = [0.0, *record.labels]
            return Record(
                labels,
                lambda i: self._document(record, i - 1) if i else self._query(record),
            )
        queries = self._lists.size(split)
        if index < queries:
            return Record.of([self._query(self._lists.record(split, index))])
        at, position = self.distinct(split).documents[index - queries]
        document = self._document(self._lists.record(split, at), position)
        return Record.of([document._replace(label=0.0)])

    def _distinct(self, split: str) -> Distinct:
        """Reads all lists of a split, and selects the documents to search."""
        ids: dict[int, str] = {}  # text's digest -> id of the document
        owners: dict[str, int] = {}  # id of a document -> its text's digest
        documents = []
        relevant = []
        qrels: dict[str, dict[str, float]] = {}
        for index in range(self._lists.size(split)):
            record = self._lists.record(split, index)
            for position, label in enumerate(record.labels):
                example = record.example(position)
                digest = self._digest(example, "document", 64)
                if digest not in ids:
                    ids[digest] = example.document_id
                    documents.append((index, position))
                    if owners.setdefault(example.document_id, digest) != digest:
                        raise InputError(
                            f"task {self.task.name!r}, {self._lists.where(split, index)}: document "
                            f"{example.document_id!r} has another text than before; an id names "
                            "one text"
                        )
                grade = label[0] if isinstance(label, tuple) else label
                if grade == UNLABELED:
                    continue
                qrels.setdefault(example.query_id, {})[ids[digest]] = grade
                relevant += [ids[digest]] if grade > 0 else []
        order = {document: index for index, document in enumerate(ids.values())}
        searched = searched_documents(
            self, split, self._lists.size(split), [order[d] for d in relevant], len(documents)
        )
        return Distinct([documents[index] for index in searched], qrels)

    def _fields(self, example: Example, role: str) -> dict[str, str]:
        return {name: example.fields[name] for name in self.task.template_for(role).fields}

    def _digest(self, example: Example, role: str, bits: int) -> int:
        """Returns a number that is equal for equal texts of a role."""
        text = "\0".join(self._fields(example, role).values())
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> (64 - bits)

    def _query(self, record: Record) -> Example:
        example = record.example(0)
        key = self._digest(example, "query", KEY_BITS)
        return Example(self._fields(example, "query"), 0.0, example.query_id, role="query", key=key)

    def _document(self, record: Record, position: int) -> Example:
        example = record.example(position)
        key = self._digest(example, "document", KEY_BITS)
        return Example(
            self._fields(example, "document"),
            record.labels[position],
            document_id=example.document_id,
            role="document",
            key=key,
        )
