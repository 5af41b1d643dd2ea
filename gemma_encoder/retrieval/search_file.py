"""Searches for the queries of a file and writes a run, in constant memory."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.data.files.corpus import Corpus, Ids
from gemma_encoder.data.files.runs import Qrels
from gemma_encoder.evaluation import ranking
from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.evaluation.units import (
    Units,
    paired_difference,
    units_of_queries,
    units_of_values,
)
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.ids import decode_id
from gemma_encoder.progress import progress
from gemma_encoder.retrieval.collection import open_queries
from gemma_encoder.retrieval.fusion import CONSTANT
from gemma_encoder.retrieval.index import Index, Results, check_same_collection
from gemma_encoder.runtime import require_retrieval
from gemma_encoder.whole_files import whole_file

QUERIES_AT_ONCE = 4096
WRITERS: dict[str, Callable[..., Iterator[str]]] = {
    ".trec": ranking.trec_lines,
    ".tsv": ranking.msmarco_lines,
}
METRICS = ("recall@100", "mrr@10", "ndcg@10")


class IndexedDocuments:
    """Documents of an index, as far as qrels need a collection.

    Attributes:
        path, id_name, ids: as those of a `Corpus`.
    """

    def __init__(self, index: Index):
        self.path = pathlib.Path(index.description.collection)
        self.id_name = index.description.id_name
        self.ids: Ids = index.ids

    def __len__(self) -> int:
        return len(self.ids)


class SearchSummary(NamedTuple):
    """Results of a search by a file, with 95 % intervals over the judged queries.

    Attributes:
        queries: number of queries.
        metrics: each of `METRICS`, empty without qrels.
        differences: to those of the baseline, empty without one.
    """

    queries: int
    metrics: dict[str, Interval]
    differences: dict[str, Interval]


def search_file(
    indexes: Sequence[Index],
    source: pathlib.Path,
    output: pathlib.Path,
    k: int,
    constant: float = CONSTANT,
    qrels: pathlib.Path | None = None,
    baseline: pathlib.Path | None = None,
) -> SearchSummary:
    """Searches for every query of a file.

    Args:
        indexes: the indexes; several are fused by their ranks.
        source: queries, see `open_queries`.
        output: .trec for a TREC run, .tsv for an MS MARCO run.
        k: number of results of a query.
        constant: of the fusion.
        qrels: relevance grades by which the run is evaluated.
        baseline: a TREC run of the same queries to compare with, which needs qrels.

    Raises:
        InputError: a file is invalid or cannot be written, or as in `Index.search`.
    """
    if output.suffix not in WRITERS:
        raise InputError(f"--output={output}: expected a file that ends in {', '.join(WRITERS)}")
    check_same_collection(indexes)
    queries = open_queries(source)
    grades: dict[str, dict[str, int]] = {}
    if baseline is not None and qrels is None:
        raise InputError(f"--baseline={baseline}: a comparison needs --qrels")
    if qrels is not None:
        require_retrieval("ir_measures")
        grades = _grades(qrels, queries, indexes[0])
    values: dict[str, dict[str, float]] = {
        name: dict.fromkeys(grades, 0.0) for name in METRICS if grades
    }
    to_lines = WRITERS[output.suffix]
    if output.suffix == ".tsv":
        to_lines = functools.partial(to_lines, depth=k)
    with in_one_line(f"--output={output} cannot be written", errors=OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
            for run in _runs(indexes, queries, k, constant):
                file.writelines(to_lines(run))
                judged = {query: grades[query] for query in run if query in grades}
                for name in values if judged else ():
                    values[name] |= ranking.by_query(name, judged, run)
    if not values:
        return SearchSummary(len(queries), {}, {})
    names = {name: name for name in METRICS}
    units = units_of_values(names, list(grades), values)
    metrics = {name: units.interval(name) for name in METRICS}
    if baseline is None:
        return SearchSummary(len(queries), metrics, {})
    base = units_of_queries(names, grades, _read_baseline(baseline, grades))
    return SearchSummary(len(queries), metrics, _differences(units, base))


def _differences(units: Units, base: Units) -> dict[str, Interval]:
    """Returns the paired difference of each metric."""
    every = np.arange(len(units.units))
    return {
        name: paired_difference(
            units,
            name,
            (units.metrics[name](every), base.metrics[name](every)),
            (units.resampled(name), base.resampled(name)),
        )
        for name in METRICS
    }


def _read_baseline(path: pathlib.Path, grades: Mapping[str, Any]) -> ranking.Run:
    """Returns a TREC run; raises InputError if it is none, or has none of the judged queries."""
    import ir_measures

    run: ranking.Run = {}
    with in_one_line(f"--baseline={path} is no TREC run", errors=(OSError, ValueError)):
        for query, document, score in ir_measures.read_trec_run(str(path)):
            run.setdefault(decode_id(query), []).append((decode_id(document), score))
    if not grades.keys() & run.keys():
        raise InputError(f"--baseline={path} has none of the judged queries")
    return run


def _runs(
    indexes: Sequence[Index], queries: Corpus, k: int, constant: float
) -> Iterator[ranking.Run]:
    """Yields the runs of some thousand queries at a time."""
    with progress("searching", 0, "queries", len(queries)) as advance:
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            rows = range(start, min(start + QUERIES_AT_ONCE, len(queries)))
            ids = [queries.ids[row] for row in rows]
            names = [f"{queries.path}: {queries.id_name} {text_id!r}" for text_id in ids]
            texts = [str(queries.text(row)) for row in rows]
            if len(indexes) > 1:
                results = Index.fuse(indexes, texts, k, constant=constant, names=names)
            else:
                results = indexes[0].search(texts, k, names=names)
            yield _as_run(ids, results)
            advance(len(ids))


def _as_run(ids: Sequence[str], results: Results) -> ranking.Run:
    """Returns results as a run, in which no two scores of a query are equal."""
    pairs = [(query, *result) for query, of in zip(ids, results, strict=True) for result in of]
    queries, documents, scores = zip(*pairs, strict=True) if pairs else ((), (), ())
    return ranking.make_run(queries, documents, scores)


def _grades(path: pathlib.Path, queries: Corpus, index: Index) -> Mapping[str, Mapping[str, int]]:
    """Returns relevance grades by query id and document id."""
    if not path.is_file():
        raise InputError(f"--qrels={path}: there is no such file")
    qrels = Qrels(path, queries, IndexedDocuments(index))
    return qrels.by_id(range(len(queries)))
