"""Ranking: runs with one stated order, TREC and MS MARCO files, and metrics by ir-measures over what was written.

Ties: documents of one query are ordered by score, descending, then by document id, ascending. Evaluators disagree about equal
scores, so a run holds none: a score that is not below its predecessor's is lowered to the next float32 below it.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError, unknown

# Our names, and those of ir-measures. Binary ones take the least grade that counts as relevant, 1 unless it is said: "mrr(rel=2)@10".
METRICS = {"mrr@10": "RR@10", "ndcg@10": "nDCG@10", "map": "AP", "recall@100": "R@100"}
_GRADE = re.compile(r"\(rel=[1-9]\d*\)")

Run = dict[str, list[tuple[str, float]]]


def make_run(query_ids: Sequence[str], document_ids: Sequence[str], scores: np.ndarray) -> Run:
    """Documents of each query, best first, with strictly falling float32 scores.

    Args:
        query_ids, document_ids: [N], of each scored pair; no pair twice.
        scores: [N].
    """
    by_query: Run = {}
    for query, document, score in zip(
        query_ids, document_ids, np.asarray(scores, np.float32), strict=True
    ):
        by_query.setdefault(query, []).append((document, score))
    run: Run = {}
    for query, scored in by_query.items():
        if len({document for document, _ in scored}) < len(scored):
            raise InputError(f"query {query!r}: a document appears twice among its candidates")
        ordered, last = [], np.float32(np.inf)
        for document, score in sorted(scored, key=lambda pair: (-pair[1], pair[0])):
            last = min(score, np.nextafter(last, np.float32(-np.inf)))
            ordered.append((document, float(last)))
        run[query] = ordered
    return run


def write_trec(run: Run, path: epath.PathLike, tag: str = "gemma_encoder") -> None:
    """Writes `qid Q0 docid rank score tag` lines; scores carry nine digits, enough to restore a float32 exactly."""
    lines = [
        f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"
        for query, scored in run.items()
        for rank, (document, score) in enumerate(scored, 1)
    ]
    epath.Path(path).write_text("".join(lines))


def write_msmarco(run: Run, path: epath.PathLike, depth: int = 1000) -> None:
    """Writes `qid pid rank` lines, tab-separated, as MS MARCO's passage-ranking leaderboard wants: the `depth` best of each query."""
    lines = [
        f"{query}\t{document}\t{rank}\n"
        for query, scored in run.items()
        for rank, (document, _) in enumerate(scored[:depth], 1)
    ]
    epath.Path(path).write_text("".join(lines))


def write_qrels(qrels: Mapping[str, Mapping[str, float]], path: epath.PathLike) -> None:
    """Writes `qid 0 docid grade` lines, as TREC does."""
    lines = [
        f"{query} 0 {document} {int(grade)}\n"
        for query, grades in qrels.items()
        for document, grade in grades.items()
    ]
    epath.Path(path).write_text("".join(lines))


def by_query(metric: str, qrels: Mapping[str, Mapping[str, float]], run: Run) -> dict[str, float]:
    """One metric of every judged query; a judged query that the run lacks counts zero."""
    import ir_measures

    judged = {
        query: {document: int(grade) for document, grade in grades.items()}
        for query, grades in qrels.items()
    }
    found = ir_measures.iter_calc(
        [ir_measures.parse_measure(_measure(metric))],
        judged,
        {query: dict(scored) for query, scored in run.items()},
    )
    return dict.fromkeys(judged, 0.0) | {value.query_id: float(value.value) for value in found}


def compute_ranking_metrics(
    metrics: Sequence[str], qrels: Mapping[str, Mapping[str, float]], run: Run
) -> dict[str, float]:
    """Means over the judged queries; a judged query that the run lacks counts zero. None where there are no judgements at all.

    Args:
        metrics: names in `METRICS`, binary ones with "(rel=…)" after the word if need be.
        qrels: relevance grade of each judged document of each query.
        run: as `make_run` gives it.
    """
    import ir_measures

    measures = {name: ir_measures.parse_measure(_measure(name)) for name in metrics}
    if not qrels:
        return {}
    judged = {
        query: {document: int(grade) for document, grade in grades.items()}
        for query, grades in qrels.items()
    }
    values = ir_measures.calc_aggregate(
        list(measures.values()), judged, {query: dict(scored) for query, scored in run.items()}
    )
    return {name: float(values[measure]) for name, measure in measures.items()}


def check_ranking_metrics(metrics: Sequence[str]) -> None:
    """Raises InputError for what is no ranking metric."""
    for name in metrics:
        _measure(name)


def _measure(name: str) -> str:
    """What ir-measures calls one of our metrics."""
    grade = _GRADE.search(name)
    plain = _GRADE.sub("", name, count=1)
    if plain not in METRICS:
        raise unknown("ranking metric", name, METRICS)
    measure, at, cutoff = METRICS[plain].partition("@")
    if grade and measure == "nDCG":
        raise InputError(
            f"ranking metric {name!r}: nDCG uses the grades themselves, it takes no (rel=…)"
        )
    return f"{measure}{grade[0] if grade else ''}{at}{cutoff}"
