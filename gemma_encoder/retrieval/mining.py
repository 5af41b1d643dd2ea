"""Mines hard negatives from a run: documents that it ranks high and that qrels do not name.

The run is read once, in blocks of lines as arrays. The lines of a query must be contiguous, as in
every run that a program has written.

Shapes: n lines of a block, P positives.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.files.corpus import Corpus, Ids, IdWriter
from gemma_encoder.data.files.lines import Lines, Spans
from gemma_encoder.data.files.run_lines import RunLines, find_ids, read_qrels, read_run
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.retrieval.collection import open_collection, open_queries
from gemma_encoder.whole_files import whole_file

RANKS = (1, 100)
MAX_SHARE = 0.95


@dataclasses.dataclass
class MiningReport:
    """Counts of a mining.

    Attributes:
        queries: judged queries of the run, with negatives or not.
        negatives: documents that were written.
        without_positive: those queries of whose positives none is in the run.
        too_similar: documents left out since they score about as high as a positive.
        missing: judged queries that the run lacks.
    """

    queries: int = 0
    negatives: int = 0
    without_positive: int = 0
    too_similar: int = 0
    missing: int = 0

    def lines(self, max_share: float | None) -> Iterator[str]:
        """Yields the counts in words."""
        yield f"{self.negatives} negatives of {self.queries} queries"
        if self.too_similar:
            yield f"{self.too_similar} documents left out: above {max_share:g} x the positive"
        if self.without_positive:
            yield f"{self.without_positive} queries without a positive in the run: no such limit"
        if self.missing:
            yield f"{self.missing} judged queries are not in the run"


def mine(
    run: pathlib.Path,
    qrels: pathlib.Path,
    output: pathlib.Path,
    ranks: tuple[int, int] = RANKS,
    max_share: float | None = None,
    queries: pathlib.Path | None = None,
    collection: pathlib.Path | None = None,
) -> MiningReport:
    """Writes the negatives of the judged queries as an MS MARCO run (qid, pid, rank).

    Args:
        run: a TREC run or an MS MARCO run.
        qrels: relevance grades; documents with a grade above 0 are never negatives.
        output: the file to write.
        ranks: first and last rank of the run that are used.
        max_share: documents that score higher than this share of the query's best positive are
            left out, since they may be positives; by default 0.95 if the run has scores. Of a
            score b below 0, the limit is as far below b: b − (1 − share) |b|.
        queries, collection: files that must have all ids of the run, if they are given.

    Raises:
        InputError: a file is invalid, no judged query is in the run, the run has no scores for
            `max_share`, or an id is unknown.
    """
    low, high = ranks
    if not 1 <= low <= high:
        raise InputError(f"ranks are FIRST-LAST, such as 1-100, got {low}-{high}")
    if max_share is not None and not 0 < max_share <= 1:
        raise InputError(f"max_share must be above 0 and at most 1, got {max_share}")
    for flag, path in (("run", run), ("qrels", qrels)):
        if not path.is_file():
            raise InputError(f"--{flag}={path}: there is no such file")
    positives = Positives(qrels)
    corpora = (
        open_queries(queries) if queries else None,
        open_collection(collection) if collection else None,
    )
    report = MiningReport()
    mined = np.zeros(len(positives.queries), bool)
    with in_one_line(f"--output={output} cannot be written", errors=OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as temporary, temporary.open("wb") as file:
            for group in _whole_queries(run):
                _check_ids(group, *corpora)
                file.write(_negatives(group, positives, ranks, max_share, mined, report))
            if not mined.any():
                raise InputError(
                    f"{run} has no query of {qrels}: the first of the run is "
                    f"{_first_query(run)!r}, of the judgments {positives.queries[0]!r}"
                )
    report.queries = int(mined.sum())
    report.missing = len(mined) - report.queries
    return report


def _check_ids(block: RunLines, queries: Corpus | None, documents: Corpus | None) -> None:
    """Raises InputError for an id that a given collection lacks."""
    for ids, corpus in ((block.queries, queries), (block.documents, documents)):
        unknown = [] if corpus is None else find_ids(ids, corpus.ids, block.is_ours) < 0
        for line in np.flatnonzero(unknown)[:1]:
            raise InputError(
                f"{block.lines.where(line)}: {corpus.id_name} {ids.text(line)!r} is not in "
                f"{corpus.path.name}"
            )


class Positives:
    """Relevant documents of queries.

    Attributes:
        queries, documents: ids of the queries with a relevant document, and of these documents.

    Args:
        path: qrels.

    Raises:
        InputError: a line is malformed, or no document is relevant.
    """

    def __init__(self, path: pathlib.Path):
        queries, documents = [], []
        for _, query, document, grades in read_qrels(path):
            for line in np.flatnonzero(grades > 0):
                queries.append(query.text(line).encode())
                documents.append(document.text(line).encode())
        if not queries:
            raise InputError(f"{path} has no relevant document: no grade is above 0")
        self.queries = _ids_of(queries, path)
        self.documents = _ids_of(documents, path)
        keys = self.keys(
            self.queries.find(Spans.of(queries)), self.documents.find(Spans.of(documents))
        )
        self._keys = np.unique(keys)

    def keys(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Combines indices of queries and documents to one number each; -1 for unknown ones."""
        keys = queries.astype(np.int64) * len(self.documents) + documents
        return np.where((queries < 0) | (documents < 0), -1, keys)

    def contain(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Returns True for the pairs that are relevant."""
        keys = self.keys(queries, documents)
        slots = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[slots] == keys


def _ids_of(texts: list[bytes], path: pathlib.Path) -> Ids:
    """Returns the distinct ids, in their first order."""
    with tempfile.TemporaryDirectory() as folder:
        writer = IdWriter(pathlib.Path(folder), path, "id")
        writer.add(Spans.of(list(dict.fromkeys(texts))))
        writer.finish()
        return Ids(cache.load_arrays(pathlib.Path(folder)))


def _whole_queries(path: pathlib.Path) -> Iterator[RunLines]:
    """Yields the lines of a run such that those of a query are together.

    Raises:
        InputError: the lines of a query are not contiguous, or have no order.
    """
    rest: RunLines | None = None
    seen: set[bytes] = set()
    for block in read_run(path):
        if not block.has_order:
            raise InputError(f"{path} has neither ranks nor scores; name a run")
        block = block if rest is None else _joined(rest, block)
        starts = _starts(block.queries)
        for index in starts if rest is None else starts[1:]:
            name = block.queries.text(index).encode()
            if name in seen:
                raise InputError(
                    f"{block.lines.where(index)}: query {name.decode()!r} appears a second time; "
                    "the lines of a query must follow each other: sort the run by query"
                )
            seen.add(name)
        if starts[-1]:
            yield _part(block, 0, starts[-1])
        rest = _part(block, starts[-1], len(block.keys))
    if rest is not None:
        yield rest


def _starts(queries: Spans) -> np.ndarray:
    """Returns the lines at which another query begins."""
    count = len(queries.starts)
    later = Spans(queries.data, queries.starts[1:], queries.ends[1:])
    former = Spans(queries.data, queries.starts[:-1], queries.ends[:-1])
    begins = np.ones(count, bool)
    begins[1:] = ~later.equal(former)
    return np.flatnonzero(begins)


def _part(block: RunLines, first: int, last: int) -> RunLines:
    """Returns some lines of a block, with their bytes alone."""
    lines = block.lines
    start = int(lines.starts[first])
    stop = int(lines.starts[last]) if last < len(lines.starts) else len(lines.data)
    data = lines.data[start:stop]

    def moved(spans: Spans) -> Spans:
        return Spans(data, spans.starts[first:last] - start, spans.ends[first:last] - start)

    cut = moved(lines)
    return dataclasses.replace(
        block,
        lines=Lines(
            data,
            cut.starts,
            cut.ends,
            lines.path,
            lines.positions[first:last],
            lines.offsets[first:last],
            lines.end,
        ),
        queries=moved(block.queries),
        documents=moved(block.documents),
        keys=block.keys[first:last],
        scores=None if block.scores is None else block.scores[first:last],
    )


def _joined(first: RunLines, second: RunLines) -> RunLines:
    """Returns the lines of two blocks as one."""
    data = np.concatenate([first.lines.data, second.lines.data])
    shift = len(first.lines.data)

    def both(name: str, spans: Spans, more: Spans, moves: bool = True) -> np.ndarray:
        return np.concatenate([getattr(spans, name), getattr(more, name) + shift * moves])

    def joined(spans: Spans, more: Spans) -> Spans:
        return Spans(data, both("starts", spans, more), both("ends", spans, more))

    lines = joined(first.lines, second.lines)
    return dataclasses.replace(
        second,
        lines=Lines(
            data,
            lines.starts,
            lines.ends,
            second.lines.path,
            both("positions", first.lines, second.lines, False),
            both("offsets", first.lines, second.lines, False),
            second.lines.end,
        ),
        queries=joined(first.queries, second.queries),
        documents=joined(first.documents, second.documents),
        keys=np.concatenate([first.keys, second.keys]),
        scores=None if second.scores is None else np.concatenate([first.scores, second.scores]),
    )


def _negatives(
    block: RunLines,
    positives: Positives,
    ranks: tuple[int, int],
    max_share: float | None,
    mined: np.ndarray,
    report: MiningReport,
) -> bytes:
    """Returns the lines to write of whole queries, and counts them."""
    if block.scores is None and max_share is not None:
        raise InputError(
            f"{block.lines.path} has no scores, which max_share compares; leave max_share out, or "
            "name a TREC run"
        )
    starts = _starts(block.queries)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(block.keys))))
    order = np.lexsort((block.keys, group))  # stable, so that ties are in file order
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - starts[group] + 1
    queries = find_ids(block.queries, positives.queries, block.is_ours)
    documents = find_ids(block.documents, positives.documents, block.is_ours)
    is_judged = queries >= 0
    is_positive = positives.contain(queries, documents)
    has_positive = np.zeros(len(starts), bool)
    has_positive[group[is_positive]] = True
    is_used = is_judged & ~is_positive & (rank >= ranks[0]) & (rank <= ranks[1])
    if block.scores is not None:
        best = np.full(len(starts), -np.inf)
        np.maximum.at(best, group[is_positive], block.scores[is_positive].astype(np.float64))
        share = MAX_SHARE if max_share is None else max_share
        with np.errstate(invalid="ignore"):
            limit = np.where(has_positive, best - (1 - share) * np.abs(best), np.inf)
        is_similar = is_used & (block.scores > limit[group])
        report.too_similar += int(is_similar.sum())
        is_used &= ~is_similar
    mined[queries[is_judged]] = True
    report.negatives += int(is_used.sum())
    report.without_positive += int((is_judged[starts] & ~has_positive).sum())
    used = order[is_used[order]]
    return _run_text(block, used, group[used])


def _run_text(block: RunLines, used: np.ndarray, group: np.ndarray) -> bytes:
    """Returns `qid pid rank` lines, the ranks of a query from 1, without an object per line."""
    if not len(used):
        return b""
    first = np.searchsorted(group, group)
    rank = np.arange(len(used)) - first
    words = [str(value + 1).encode() for value in range(int(rank.max()) + 1)]
    ranks = Spans.of(words)
    base = len(block.lines.data)
    data = np.concatenate([block.lines.data, np.frombuffer(b"\t\n", np.uint8), ranks.data])
    tab, line_break = np.full(len(used), base), np.full(len(used), base + 1)
    shift = base + 2
    columns = [
        (block.queries.starts[used], block.queries.ends[used]),
        (tab, tab + 1),
        (block.documents.starts[used], block.documents.ends[used]),
        (tab, tab + 1),
        (ranks.starts[rank] + shift, ranks.ends[rank] + shift),
        (line_break, line_break + 1),
    ]
    starts, ends = (np.stack(side, axis=1).ravel() for side in zip(*columns, strict=True))
    return Spans(data, starts, ends).joined().tobytes()


def _first_query(path: pathlib.Path) -> str:
    return next(read_run(path)).queries.text(0)
