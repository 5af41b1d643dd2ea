"""Judgements and first-stage runs, in compact arrays: queries and documents are numbers of their files' lines.

Q queries. A run may hold hundreds of millions of lines: it is read in one pass, sorted in parts on disk, and kept, see `cache`.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
from absl import logging

from gemma_encoder.data import cache
from gemma_encoder.data.files.lines import COMPRESSED, Lines, Spans, columns, read_lines
from gemma_encoder.data.files.passages import Texts
from gemma_encoder.inputs.errors import InputError

PART = 64 << 20  # bytes of a run's text that are sorted at a time
MOST_PARTS = 256  # files that may be open at a time


class Judgements:
    """Relevance grades of documents, by query.

    Args:
        path: TREC qrels (qid, 0, pid, relevance), separated by tabs or spaces, or BEIR's (query-id, corpus-id, score under a header).
        queries, documents: the files whose ids it uses.

    Raises:
        InputError: a line is malformed, a document is unknown or graded in two ways, or no query is known. Judgements of single
            unknown queries have no effect on any metric, so they are counted and logged.
    """

    def __init__(self, path: pathlib.Path, queries: Texts, documents: Texts):
        self.path, self._queries, self._documents = path, queries, documents
        parts, unknown, total = [], 0, 0
        for lines, skip, (query, document, grade) in _judgement_columns(path):
            numbers, found, values = (
                queries.ids.find(query),
                documents.ids.find(document),
                _integers(lines, grade, skip, "relevance"),
            )
            _refuse(
                lines,
                document,
                skip,
                found < 0,
                lambda name: f"{documents.what} {name!r} is not in {documents.path.name}",
            )
            known = numbers >= 0
            unknown, total = unknown + int((~known).sum()), total + len(known)
            number = lines.number + skip + np.arange(len(known))
            parts.append(np.stack([numbers, found, values, number])[:, known])
        if unknown == total:
            raise InputError(
                f"{path} judges no query of {queries.path.name}" if total else f"{path} is empty"
            )
        if unknown:
            logging.warning(
                "%s: %d of %d judgements are for queries that %s lacks, and are left out",
                path,
                unknown,
                total,
                queries.path.name,
            )
        table = np.concatenate(parts, axis=1)
        table = table[:, np.lexsort((table[3], table[1], table[0]))]
        again = (table[0, 1:] == table[0, :-1]) & (table[1, 1:] == table[1, :-1])
        differing = again & (table[2, 1:] != table[2, :-1])
        if differing.any():
            place = int(np.flatnonzero(differing)[0]) + 1
            raise InputError(
                f"{path}:{table[3, place]}: {documents.what} {documents.ids[table[1, place]]!r} is judged a second time for {queries.what} "
                f"{queries.ids[table[0, place]]!r}, with another grade"
            )
        if again.any():
            logging.warning("%s: %d judgements stand there twice", path, again.sum())
            table = table[:, np.concatenate([[True], ~again])]
        table = table[:, np.lexsort((table[3], table[0]))]  # of one query in the file's order
        self._offsets = np.searchsorted(table[0], np.arange(len(queries) + 1))
        self.documents, self.grades = table[1].astype(np.int32), table[2].astype(np.int32)

    def of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Judged documents of a query, and their grades."""
        span = slice(self._offsets[query], self._offsets[query + 1])
        return self.documents[span], self.grades[span]

    def positives(self) -> np.ndarray:
        """[Q]: how many relevant documents each query has."""
        counted = np.concatenate([[0], np.cumsum(self.grades > 0)])
        return counted[self._offsets[1:]] - counted[self._offsets[:-1]]

    def by_id(self, queries: np.ndarray) -> dict[str, dict[str, int]]:
        """Grades of those queries that have judgements, by ids."""
        result = {}
        for query in queries:
            documents, grades = self.of(query)
            if len(documents):
                result[self._queries.ids[query]] = {
                    self._documents.ids[d]: int(grade)
                    for d, grade in zip(documents, grades, strict=True)
                }
        return result


class Candidates:
    """The first stage's documents of each query, best first.

    Args:
        path: a run of MS MARCO (qid, pid, rank), one of TREC (qid, Q0, docid, rank, score, tag), or triples with their texts
            (qid, pid, query, passage), whose rank is their order in the file. Queries need not stand together.
        queries, documents: the files whose ids it uses.
        drop_same_id: leave out a document that has its query's own id, as BEIR's evaluation does.

    Raises:
        InputError: a line is malformed, a query or a document is unknown, or a document comes twice for one query.
    """

    def __init__(
        self, path: pathlib.Path, queries: Texts, documents: Texts, *, drop_same_id: bool = False
    ):
        self.path, self._queries, self._documents, self._drop_same_id = (
            path,
            queries,
            documents,
            drop_same_id,
        )
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

    def _build(self, place: pathlib.Path) -> None:
        size = self.path.stat().st_size * (8 if self.path.suffix in COMPRESSED else 1)
        parts = min(1 + size // PART, MOST_PARTS)
        share = -(-len(self._queries) // parts)  # queries of one part
        cache.save_array(place, "documents", np.zeros(0, np.int32))
        counts = np.zeros(len(self._queries), np.int64)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=place)) for _ in range(parts)]
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
                cache.save_array(place, "documents", np.ascontiguousarray(entries[:, 1]))
        if not counts.any():
            raise InputError(f"{self.path} is empty")
        cache.save_array(place, "offsets", np.concatenate([[0], np.cumsum(counts)]))

    def _entries(self) -> Iterator[tuple[Lines, np.ndarray, np.ndarray]]:
        """Blocks of the file: the lines, the places among them that are used, and (query, document, rank) of those, [n, 3] int32."""
        names: tuple[str, ...] = ()
        for lines in read_lines(self.path):
            names = names or _run_columns(lines)
            found = dict(
                zip(names, columns(lines, names, whitespace="query" not in names), strict=True)
            )
            queries, documents = (
                self._queries.ids.find(found["qid"]),
                self._documents.ids.find(found["pid"]),
            )
            _refuse(
                lines,
                found["qid"],
                0,
                queries < 0,
                lambda name: f"{self._queries.what} {name!r} is not in {self._queries.path.name}",
            )
            _refuse(
                lines,
                found["pid"],
                0,
                documents < 0,
                lambda name: (
                    f"{self._documents.what} {name!r} is not in {self._documents.path.name}"
                ),
            )
            if "rank" in found:
                ranks = _integers(lines, found["rank"], 0, "rank")
            else:
                ranks = np.zeros(len(queries), np.int64)  # the sort is stable
            entries = np.stack([queries, documents, ranks], axis=1).astype(np.int32)
            used = (
                np.flatnonzero(~found["qid"].equal(found["pid"]))
                if self._drop_same_id
                else np.arange(len(entries))
            )
            yield lines, used, entries[used]

    def _refuse_repeated(self, entries: np.ndarray) -> None:
        pairs = np.sort(_joined(entries[:, 0], entries[:, 1]))
        again = np.flatnonzero(pairs[1:] == pairs[:-1])
        if not len(again):
            return
        query, document = divmod(int(pairs[again[0]]), 1 << 32)
        seen = 0
        for lines, used, found in self._entries():
            for row in np.flatnonzero((found[:, 0] == query) & (found[:, 1] == document)):
                seen += 1
                if seen == 2:
                    names = self._documents.ids[document], self._queries.ids[query]
                    raise InputError(
                        f"{lines.where(used[row])}: {self._documents.what} {names[0]!r} comes a second time for {self._queries.what} {names[1]!r}"
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
        f"{lines.where(0)}: not a line of a run; expected qid, pid, rank, or qid, Q0, docid, rank, score, tag, or qid, pid, query, passage "
        f"separated by tabs; got {line[:80]!r}"
    )


def _judgement_columns(
    path: pathlib.Path,
) -> Iterator[tuple[Lines, int, tuple[Spans, Spans, Spans]]]:
    """Blocks of a qrels file: lines, how many of them are a header, and the columns of query, document and grade."""
    header = False
    for lines in read_lines(path):
        first = lines.number == 1
        if first:
            header = lines.text(0).split("\t") == ["query-id", "corpus-id", "score"]
        if not header:
            query, _, document, grade = columns(
                lines, ("qid", "0", "pid", "relevance"), whitespace=True
            )
            yield lines, 0, (query, document, grade)
            continue
        query, document, grade = (
            Spans(s.data, s.starts[first:], s.ends[first:])
            for s in columns(lines, ("query-id", "corpus-id", "score"))
        )
        yield lines, int(first), (query, document, grade)


def _integers(lines: Lines, spans: Spans, skip: int, what: str) -> np.ndarray:
    values, valid = spans.integers()
    _refuse(
        lines,
        spans,
        skip,
        ~valid | (np.abs(values) >= 2**31),
        lambda text: f"{what} must be a whole number, got {text!r}",
    )
    return values


def _refuse(lines: Lines, spans: Spans, skip: int, wrong: np.ndarray, message) -> None:
    """Raises InputError naming the first wrong line and what stands there; `skip` lines of the block come before the first span."""
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(f"{lines.where(skip + place)}: {message(spans.text(place))}")
