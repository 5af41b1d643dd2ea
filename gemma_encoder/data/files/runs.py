"""Judgements and first-stage runs in compact arrays: queries and documents are line numbers.

Q queries. A run may hold hundreds of millions of lines: it is read in one pass, sorted in parts on
disk, and kept, see `cache`.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data import cache
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.files.lines import COMPRESSED, Lines, Spans, columns, read_lines
from gemma_encoder.inputs.errors import InputError

PART = 64 << 20  # bytes of a run's text that are sorted at a time
MOST_PARTS = 256  # files that may be open at a time
BEIR_HEADER = ("query-id", "corpus-id", "score")


class Qrels:
    """Relevance grades of documents, by query.

    Args:
        path: TREC qrels (qid, 0, pid, relevance), separated by tabs or spaces, or BEIR's (query-id,
            corpus-id, score under a header).
        queries, documents: the files whose ids it uses.

    Attributes:
        positives: [Q], how many relevant documents each query has.

    Raises:
        InputError: a line is malformed, a document is unknown or graded in two ways, or no query is
            known. Judgements of single unknown queries have no effect on any metric, so they are
            counted and logged.
    """

    def __init__(self, path: pathlib.Path, queries: Corpus, documents: Corpus):
        self.path, self._queries, self._documents = path, queries, documents
        table = self._distinct(self._read())
        table = table[:, np.lexsort((table[3], table[0]))]  # of one query in the file's order
        self._offsets = np.searchsorted(table[0], np.arange(len(queries) + 1))
        self.documents, self.grades = table[1].astype(np.int32), table[2].astype(np.int32)
        self.positives = np.bincount(table[0][table[2] > 0], minlength=len(queries))

    def _read(self) -> np.ndarray:
        """[4, n] int64: query, document, grade and line of the judgements of known queries."""
        parts, total = [], 0
        for lines, (query, document, grade) in _qrels_columns(self.path):
            queries, grades = self._queries.ids.find(query), _integers(lines, grade, "relevance")
            documents = _numbers(lines, document, self._documents)
            entries = np.stack([queries, documents, grades, lines.number + np.arange(len(queries))])
            parts.append(entries[:, queries >= 0])
            total += len(queries)
        if not total:
            raise InputError(f"{self.path} is empty")
        table = np.concatenate(parts, axis=1)
        if not table.size:
            raise InputError(f"{self.path} judges no query of {self._queries.path.name}")
        if table.shape[1] < total:
            logging.warning(
                "%s: %d of %d judgements are for queries that %s lacks, and are left out",
                self.path,
                total - table.shape[1],
                total,
                self._queries.path.name,
            )
        return table

    def _distinct(self, table: np.ndarray) -> np.ndarray:
        """The table without what stands there twice."""
        table = table[:, np.lexsort((table[3], table[1], table[0]))]
        again = np.all(table[:2, 1:] == table[:2, :-1], axis=0)
        for entry in np.flatnonzero(again & (table[2, 1:] != table[2, :-1]))[:1] + 1:
            query, document, _, line = table[:, entry]
            raise InputError(
                f"{self.path}:{line}: {self._documents.what} {self._documents.ids[document]!r} is "
                f"judged a second time for {self._queries.what} {self._queries.ids[query]!r}, with "
                "another grade"
            )
        if again.any():
            logging.warning("%s: %d judgements stand there twice", self.path, again.sum())
        return table[:, np.concatenate([[True], ~again])]

    def of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Judged documents of a query, and their grades."""
        span = slice(self._offsets[query], self._offsets[query + 1])
        return self.documents[span], self.grades[span]

    def by_id(self, queries: np.ndarray) -> dict[str, dict[str, int]]:
        """Grades of those queries that have judgements, by ids."""
        result = {}
        for query in queries:
            documents, grades = self.of(query)
            if len(documents):
                names = [self._documents.ids[document] for document in documents]
                result[self._queries.ids[query]] = dict(zip(names, grades.tolist(), strict=True))
        return result


class Candidates:
    """The first stage's documents of each query, best first.

    Args:
        path: a run of MS MARCO (qid, pid, rank), one of TREC (qid, Q0, docid, rank, score, tag), or
            triples with their texts (qid, pid, query, passage), whose rank is their order in the
            file. Queries need not stand together.
        queries, documents: the files whose ids it uses.
        drop_same_id: leave out a document that has its query's own id, as BEIR's evaluation does.

    Raises:
        InputError: a line is malformed, a query or a document is unknown, or a document comes twice
            for one query.
    """

    def __init__(
        self, path: pathlib.Path, queries: Corpus, documents: Corpus, *, drop_same_id: bool = False
    ):
        self.path, self._queries, self._documents = path, queries, documents
        self._drop_same_id = drop_same_id
        what = f"run of {queries.path.name}{' without the query itself' if drop_same_id else ''}"
        arrays = cache.derive(
            [path, queries.path, documents.path], what, self._build, cache.load_arrays
        )
        self._offsets, self._ranked = arrays["offsets"], arrays["documents"]
        documents.release()

    def of(self, query: int) -> np.ndarray:
        """Documents of a query, best first."""
        return self._ranked[self._offsets[query] : self._offsets[query + 1]]

    def counts(self) -> np.ndarray:
        """[Q]: how many documents each query has."""
        return np.diff(self._offsets)

    def _build(self, folder: pathlib.Path) -> None:
        size = self.path.stat().st_size * (8 if self.path.suffix in COMPRESSED else 1)
        parts = min(1 + size // PART, MOST_PARTS)
        share = -(-len(self._queries) // parts)  # queries of one part
        counts = np.zeros(len(self._queries), np.int64)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(parts)]
            for _, _, entries in self._entries():
                mine = entries[:, 0] // share
                for part in np.flatnonzero(np.bincount(mine, minlength=parts)):
                    entries[mine == part].tofile(files[part])
            for file in files:
                file.seek(0)
                entries = np.fromfile(file, np.int32).reshape(-1, 3)
                key = _joined(entries[:, 0], entries[:, 2])
                if np.any(key[1:] < key[:-1]):
                    entries = entries[np.argsort(key, kind="stable")]
                self._refuse_repeated(entries)
                counts += np.bincount(entries[:, 0], minlength=len(counts))
                cache.save_array(folder, "documents", np.ascontiguousarray(entries[:, 1]))
        if not counts.any():
            raise InputError(f"{self.path} is empty")
        cache.save_array(folder, "offsets", np.concatenate([[0], np.cumsum(counts)]))

    def _entries(self) -> Iterator[tuple[Lines, np.ndarray, np.ndarray]]:
        """Blocks of the file: its lines, those that are used, and their entries.

        Entries are [n, 3] int32: query, document, rank.
        """
        names: tuple[str, ...] = ()
        for lines in read_lines(self.path):
            names = names or _run_columns(lines)
            spans = columns(lines, names, whitespace="query" not in names)
            by_name = dict(zip(names, spans, strict=True))
            queries = _numbers(lines, by_name["qid"], self._queries)
            documents = _numbers(lines, by_name["pid"], self._documents)
            if "rank" in by_name:
                ranks = _integers(lines, by_name["rank"], "rank")
            else:
                ranks = np.zeros(len(queries), np.int64)  # the sort is stable
            entries = np.stack([queries, documents, ranks], axis=1).astype(np.int32)
            used = np.arange(len(entries))
            if self._drop_same_id:
                used = np.flatnonzero(~by_name["qid"].equal(by_name["pid"]))
            yield lines, used, entries[used]

    def _refuse_repeated(self, entries: np.ndarray) -> None:
        pairs = np.sort(_joined(entries[:, 0], entries[:, 1]))
        again = np.flatnonzero(pairs[1:] == pairs[:-1])
        if not len(again):
            return
        query, document = divmod(int(pairs[again[0]]), 1 << 32)
        where = [
            lines.where(used[row])
            for lines, used, block in self._entries()
            for row in np.flatnonzero((block[:, 0] == query) & (block[:, 1] == document))
        ]
        raise InputError(
            f"{where[1]}: {self._documents.what} {self._documents.ids[document]!r} comes a second "
            f"time for {self._queries.what} {self._queries.ids[query]!r}"
        )


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two int32 as one int64 that sorts by the first, then by the second."""
    return (high.astype(np.int64) << 32) + low


def _run_columns(lines: Lines) -> tuple[str, ...]:
    """The layout of a run, by its first line."""
    line = lines.text(0)
    by_tabs, by_blanks = len(line.split("\t")), len(line.split())
    if by_tabs == 4:
        return ("qid", "pid", "query", "passage")
    if by_blanks == 3:
        return ("qid", "pid", "rank")
    if by_blanks == 6:
        return ("qid", "Q0", "pid", "rank", "score", "tag")
    raise InputError(
        f"{lines.where(0)}: not a line of a run; expected qid, pid, rank, or qid, Q0, docid, rank, "
        f"score, tag, or qid, pid, query, passage separated by tabs; got {line[:80]!r}"
    )


def _qrels_columns(path: pathlib.Path) -> Iterator[tuple[Lines, Sequence[Spans]]]:
    """Blocks of a qrels file, a header left out: lines, and columns of query, document, grade."""
    has_header = False
    for lines in read_lines(path):
        if lines.number == 1 and tuple(lines.text(0).split("\t")) == BEIR_HEADER:
            has_header, lines = True, lines.without_first()
        if has_header:
            yield lines, columns(lines, BEIR_HEADER)
        else:
            query, _, *rest = columns(lines, ("qid", "0", "pid", "relevance"), whitespace=True)
            yield lines, (query, *rest)


def _numbers(lines: Lines, ids: Spans, texts: Corpus) -> np.ndarray:
    """[n] int32: the numbers of ids; raises InputError naming the first unknown one."""
    numbers = texts.ids.find(ids)
    for line in np.flatnonzero(numbers < 0)[:1]:
        where, name = lines.where(line), ids.text(line)
        raise InputError(f"{where}: {texts.what} {name!r} is not in {texts.path.name}")
    return numbers


def _integers(lines: Lines, spans: Spans, what: str) -> np.ndarray:
    """[n] int64; raises InputError naming the first that is no whole number of 32 bits."""
    values, valid = spans.integers()
    for line in np.flatnonzero(~valid | (np.abs(values) >= 2**31))[:1]:
        where, text = lines.where(line), spans.text(line)
        raise InputError(f"{where}: {what} must be a whole number, got {text!r}")
    return values
