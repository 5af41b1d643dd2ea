"""Qrels and first-stage runs as compact arrays of query and document indices.

Shapes: Q queries, n entries. Indices are those of `Corpus`. A run may have hundreds of millions of
lines: it is read in one pass, sorted in parts on disk, and cached.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
from absl import logging

from gemma_encoder.data import cache
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.files.lines import COMPRESSED, Lines, Spans
from gemma_encoder.data.files.run_lines import (
    RunLines,
    find_ids,
    from_descending,
    read_qrels,
    read_run,
)
from gemma_encoder.inputs.errors import InputError

PART = 64 << 20  # bytes of a run sorted at a time
MOST_PARTS = 256  # files open at a time


class Qrels:
    """Relevance grades of documents, by query.

    Judgments of unknown queries affect no metric, so they are skipped, counted and logged.
    Judgments of documents that the collection lacks (ArguAna has some) do: a relevant document that
    nobody can retrieve lowers the recall. They are counted, logged and stay in `by_id`, as in
    BEIR's evaluation; their indices follow those of the collection.

    Args:
        path: TREC qrels (qid, 0, pid, relevance) separated by tabs or spaces, or BEIR qrels
            (query-id, corpus-id, score) with a header.
        queries, documents: the collections of the ids.

    Attributes:
        judged: [Q], number of judged documents of each query.
        relevant: [Q], number of relevant documents of each query.
        positives: [Q], number of those that the collection contains.

    Raises:
        InputError: a line is malformed, a document has two grades, or all queries or all documents
            are unknown.
    """

    def __init__(self, path: pathlib.Path, queries: Corpus, documents: Corpus):
        self.path = path
        self._queries = queries
        self._documents = documents
        self._missing: dict[str, int] = {}  # id of a document that the collection lacks -> index
        self._missing_ids: list[str] = []
        table = self._distinct(self._read())
        self._report_missing(table)
        table = table[:, np.lexsort((table[3], table[0]))]  # by query, then by line
        self._offsets = np.searchsorted(table[0], np.arange(len(queries) + 1))
        self.documents = table[1].astype(np.int32)
        self.grades = table[2].astype(np.int32)
        is_positive = table[2] > 0
        is_present = table[1] < len(documents)
        self.judged = np.diff(self._offsets)
        self.relevant = np.bincount(table[0][is_positive], minlength=len(queries))
        self.positives = np.bincount(table[0][is_positive & is_present], minlength=len(queries))

    def _read(self) -> np.ndarray:
        """Returns [4, n] int64: query, document, grade and line of judgments."""
        parts = []
        total = 0
        for lines, query, document, grades in read_qrels(self.path):
            queries = find_ids(query, self._queries.ids)
            documents = self._document_indices(document, queries >= 0)
            entries = np.stack([queries, documents, grades, lines.positions])
            parts.append(entries[:, queries >= 0])
            total += len(queries)
        if not total:
            raise InputError(f"{self.path} is empty")
        table = np.concatenate(parts, axis=1)
        if not table.size:
            raise InputError(f"{self.path} judges no query of {self._queries.path.name}")
        if table.shape[1] < total:
            logging.warning(
                "%s: skipping %d of %d judgments, whose queries are not in %s",
                self.path,
                total - table.shape[1],
                total,
                self._queries.path.name,
            )
        return table

    def _document_indices(self, ids: Spans, is_used: np.ndarray) -> np.ndarray:
        """Returns [n] int64, the indices of ids; new ones for documents the collection lacks."""
        indices = find_ids(ids, self._documents.ids).astype(np.int64)
        for line in np.flatnonzero((indices < 0) & is_used):
            document = ids.text(line)
            if document not in self._missing:
                self._missing[document] = len(self._documents) + len(self._missing)
                self._missing_ids.append(document)
            indices[line] = self._missing[document]
        return indices

    def _report_missing(self, table: np.ndarray) -> None:
        """Logs how many judgments are of documents that the collection lacks; refuses all."""
        is_missing = table[1] >= len(self._documents)
        if not is_missing.any():
            return
        corpus = self._documents.path.name
        if is_missing.all():
            raise InputError(
                f"{self.path} judges no document of {corpus}; the first is "
                f"{self._name(table[1, 0])} in line {table[3, 0]}"
            )
        first = table[:, is_missing][:, table[3, is_missing].argmin()]
        logging.warning(
            "%s: %d of %d judgments are of documents that %s lacks (the first in line %d: %s); "
            "they stay in the judgments, where those documents count as not retrieved",
            self.path,
            is_missing.sum(),
            len(is_missing),
            corpus,
            first[3],
            self._name(first[1]),
        )

    def _name(self, document: int) -> str:
        """Names a document in messages."""
        return f"{self._documents.id_name} {self.document_id(document)!r}"

    def document_id(self, index: int) -> str:
        """Returns the id of a judged document."""
        if index < len(self._documents):
            return self._documents.ids[index]
        return self._missing_ids[index - len(self._documents)]

    def _distinct(self, table: np.ndarray) -> np.ndarray:
        """Removes duplicate judgments; raises InputError if their grades differ."""
        table = table[:, np.lexsort((table[3], table[1], table[0]))]
        is_repeated = np.all(table[:2, 1:] == table[:2, :-1], axis=0)
        for entry in np.flatnonzero(is_repeated & (table[2, 1:] != table[2, :-1]))[:1] + 1:
            query, document, _, line = table[:, entry]
            raise InputError(
                f"{self.path}:{line}: {self._name(document)} is judged a second time "
                f"for {_name(self._queries, query)}, with another grade"
            )
        if is_repeated.any():
            logging.warning("%s: %d judgments are duplicates", self.path, is_repeated.sum())
        return table[:, np.concatenate([[True], ~is_repeated])]

    def of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the judged documents of a query, and their grades."""
        span = slice(self._offsets[query], self._offsets[query + 1])
        return self.documents[span], self.grades[span]

    def positives_of(self, query: int) -> np.ndarray:
        """Returns the relevant documents of a query that the collection contains."""
        documents, grades = self.of(query)
        return documents[(grades > 0) & (documents < len(self._documents))]

    def by_id(self, queries: np.ndarray) -> dict[str, dict[str, int]]:
        """Returns grades by query id and document id, for queries with judgments."""
        result = {}
        for query in queries:
            documents, grades = self.of(query)
            if len(documents):
                ids = [self.document_id(document) for document in documents]
                result[self._queries.ids[query]] = dict(zip(ids, grades.tolist(), strict=True))
        return result


class Candidates:
    """First-stage documents of each query, best first.

    Args:
        path: an MS MARCO run (qid, pid, rank), a TREC run (qid, Q0, docid, rank, score, tag), or a
            top1000 file (qid, pid, query, passage). A TREC run is ordered by its scores, as
            evaluators order it, whatever its ranks; equal scores, and a top1000 file, are in file
            order. The lines of a query need not be contiguous.
        queries, documents: the collections of the ids.
        drop_same_id: drop documents with the id of their query, as BEIR's evaluation does.

    Raises:
        InputError: a line is malformed, a query or a document is unknown, or a document is repeated
            for a query.
    """

    def __init__(
        self, path: pathlib.Path, queries: Corpus, documents: Corpus, *, drop_same_id: bool = False
    ):
        self.path = path
        self._queries = queries
        self._documents = documents
        self._drop_same_id = drop_same_id
        sources = [path, queries.path, documents.path]
        suffix = " without the query itself" if drop_same_id else ""
        description = f"run of {queries.path.name}, TREC by score, scores stored{suffix}"
        arrays = cache.derive(sources, description, self._build, cache.load_arrays)
        self._offsets = arrays["offsets"]
        self._ranked = arrays["documents"]
        self._keys = arrays.get("keys")  # of a TREC run: its scores, see `from_descending`
        documents.release()

    def of(self, query: int) -> np.ndarray:
        """Returns the documents of a query, best first."""
        return self._ranked[self._offsets[query] : self._offsets[query + 1]]

    def scores_of(self, query: int) -> np.ndarray:
        """Returns the scores of a query's documents, float32, best first.

        Raises:
            InputError: the run has no scores.
        """
        if self._keys is None:
            raise InputError(f"{self.path} has no scores; a run in TREC's format has them")
        return from_descending(self._keys[self._offsets[query] : self._offsets[query + 1]])

    def counts(self) -> np.ndarray:
        """Returns [Q], the number of documents of each query."""
        return np.diff(self._offsets)

    def _build(self, folder: pathlib.Path) -> None:
        """Writes the sorted run: an external bucket sort by query."""
        size = self.path.stat().st_size * (8 if self.path.suffix in COMPRESSED else 1)
        parts = min(1 + size // PART, MOST_PARTS)
        queries_per_part = -(-len(self._queries) // parts)
        counts = np.zeros(len(self._queries), np.int64)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(parts)]
            has_scores = False
            for lines, _, entries in self._entries():
                has_scores = lines.scores is not None
                part_of_entry = entries[:, 0] // queries_per_part
                for part in np.flatnonzero(np.bincount(part_of_entry, minlength=parts)):
                    entries[part_of_entry == part].tofile(files[part])
            for file in files:
                file.seek(0)
                entries = np.fromfile(file, np.int32).reshape(-1, 3)
                key = _sort_key(entries[:, 0], entries[:, 2])
                if np.any(key[1:] < key[:-1]):
                    entries = entries[np.argsort(key, kind="stable")]
                self._refuse_repeated(entries)
                counts += np.bincount(entries[:, 0], minlength=len(counts))
                cache.save_array(folder, "documents", np.ascontiguousarray(entries[:, 1]))
                if has_scores:
                    cache.save_array(folder, "keys", np.ascontiguousarray(entries[:, 2]))
        if not counts.any():
            raise InputError(f"{self.path} is empty")
        cache.save_array(folder, "offsets", np.concatenate([[0], np.cumsum(counts)]))

    def _entries(self) -> Iterator[tuple[RunLines, np.ndarray, np.ndarray]]:
        """Yields, for each block of the file, its lines, the indices of used lines, and entries.

        Entries are [n, 3] int32: query, document, and a key that is lowest for the best document.
        """
        for block in read_run(self.path):
            queries = _indices(block.lines, block.queries, self._queries, block.is_ours)
            documents = _indices(block.lines, block.documents, self._documents, block.is_ours)
            entries = np.stack([queries, documents, block.keys], axis=1).astype(np.int32)
            used = np.arange(len(entries))
            if self._drop_same_id:
                used = np.flatnonzero(~block.queries.equal(block.documents))
            yield block, used, entries[used]

    def _refuse_repeated(self, entries: np.ndarray) -> None:
        """Raises InputError at the second line of a repeated (query, document) pair."""
        pairs = np.sort(_sort_key(entries[:, 0], entries[:, 1]))
        repeated = np.flatnonzero(pairs[1:] == pairs[:-1])
        if not len(repeated):
            return
        query, document = divmod(int(pairs[repeated[0]]), 1 << 32)
        locations = [
            run.lines.where(used[row])
            for run, used, block in self._entries()
            for row in np.flatnonzero((block[:, 0] == query) & (block[:, 1] == document))
        ]
        raise InputError(
            f"{locations[1]}: {_name(self._documents, document)} appears a second time for "
            f"{_name(self._queries, query)}"
        )


def _name(texts: Corpus, index: int) -> str:
    """Names a text in messages, e.g. "pid '7'"."""
    return f"{texts.id_name} {texts.ids[index]!r}"


def _sort_key(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Combines two int32 to an int64 that sorts by the first, then by the second."""
    return (high.astype(np.int64) << 32) + low


def _indices(lines: Lines, ids: Spans, texts: Corpus, ours: bool = False) -> np.ndarray:
    """Returns [n] int32, the indices of ids; raises InputError naming the first unknown id."""
    indices = find_ids(ids, texts.ids, ours)
    for line in np.flatnonzero(indices < 0)[:1]:
        raise InputError(
            f"{lines.where(line)}: {texts.id_name} {ids.text(line)!r} is not in {texts.path.name}"
        )
    return indices
