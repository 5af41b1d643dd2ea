"""Ranking: runs, TREC and MS MARCO files, and metrics computed by ir-measures.

Documents of a query are ordered by score, descending, then by document id, ascending. Evaluation
tools break ties differently, so a run contains none: a score that is not below its predecessor's is
lowered to the next float32 below it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.ids import RUN_TAG, encode_id

# Names of ir-measures by our names. Binary metrics take the lowest relevant grade, by default 1, as
# in "mrr(rel=2)@10".
METRICS = {"mrr@10": "RR@10", "ndcg@10": "nDCG@10", "map": "AP", "recall@100": "R@100"}
_GRADE = re.compile(r"\(rel=[1-9]\d*\)")

Run = dict[str, list[tuple[str, float]]]


def make_run(query_ids: Sequence[str], document_ids: Sequence[str], scores: np.ndarray) -> Run:
    """Returns the documents of each query, best first, with strictly decreasing float32 scores.

    Args:
        query_ids, document_ids: [N], one entry per scored pair; pairs must be unique.
        scores: [N].
    """
    candidates: Run = {}
    for query, document, score in zip(
        query_ids, document_ids, np.asarray(scores, np.float32), strict=True
    ):
        candidates.setdefault(query, []).append((document, score))
    run: Run = {}
    for query, scored in candidates.items():
        if len({document for document, _ in scored}) < len(scored):
            raise InputError(f"query {query!r}: a document appears twice among its candidates")
        ordered = []
        last = np.float32(np.inf)
        for document, score in sorted(scored, key=lambda pair: (-pair[1], pair[0])):
            last = min(score, np.nextafter(last, np.float32(-np.inf)))
            ordered.append((document, float(last)))
        run[query] = ordered
    return run


def trec_lines(run: Run, tag: str = RUN_TAG) -> Iterator[str]:
    """Yields `qid Q0 docid rank score tag` lines; ids with whitespace are encoded, see `ids`.

    Scores have nine digits, enough to restore a float32 exactly.
    """
    tag = encode_id(tag or RUN_TAG)
    for query, scored in run.items():
        for rank, (document, score) in enumerate(scored, 1):
            yield f"{encode_id(query)} Q0 {encode_id(document)} {rank} {score:.9g} {tag}\n"


def msmarco_lines(run: Run, depth: int = 1000) -> Iterator[str]:
    """Yields tab-separated `qid pid rank` lines for the `depth` best documents of each query.

    This is the format of MS MARCO's passage-ranking leaderboard. Ids are as in `trec_lines`.
    """
    for query, scored in run.items():
        for rank, (document, _) in enumerate(scored[:depth], 1):
            yield f"{encode_id(query)}\t{encode_id(document)}\t{rank}\n"


def qrels_lines(qrels: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yields `qid 0 docid grade` lines, the TREC format. Ids are as in `trec_lines`."""
    for query, grades in qrels.items():
        for document, grade in grades.items():
            yield f"{encode_id(query)} 0 {encode_id(document)} {int(grade)}\n"


def by_query(metric: str, qrels: Mapping[str, Mapping[str, float]], run: Run) -> dict[str, float]:
    """Computes a metric for every judged query; a query missing from the run counts as zero."""
    import ir_measures

    judged = _integer_grades(qrels)
    values = ir_measures.iter_calc(
        [ir_measures.parse_measure(_measure(metric))],
        judged,
        {query: dict(scored) for query, scored in run.items()},
    )
    return dict.fromkeys(judged, 0.0) | {value.query_id: float(value.value) for value in values}


def compute_ranking_metrics(
    metrics: Sequence[str], qrels: Mapping[str, Mapping[str, float]], run: Run
) -> dict[str, float]:
    """Computes means over the judged queries; empty without qrels.

    A judged query that is missing from the run counts as zero.

    Args:
        metrics: names in `METRICS`; binary metrics may have "(rel=…)" before the "@".
        qrels: relevance grade of each judged document of each query.
        run: ranking, from `make_run`.
    """
    import ir_measures

    measures = {name: ir_measures.parse_measure(_measure(name)) for name in metrics}
    if not qrels:
        return {}
    values = ir_measures.calc_aggregate(
        list(measures.values()),
        _integer_grades(qrels),
        {query: dict(scored) for query, scored in run.items()},
    )
    return {name: float(values[measure]) for name, measure in measures.items()}


def _integer_grades(qrels: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """Converts grades, which are whole numbers, to the type that ir-measures needs."""
    return {
        query: {document: int(grade) for document, grade in grades.items()}
        for query, grades in qrels.items()
    }


def check_ranking_metrics(metrics: Sequence[str]) -> None:
    """Raises InputError if a name is not a ranking metric."""
    for name in metrics:
        _measure(name)


def split_name(name: str) -> tuple[str, int]:
    """Returns a metric's name in `METRICS`, and its lowest relevant grade."""
    grade = _GRADE.search(name)
    return _GRADE.sub("", name, count=1), int(grade[0][len("(rel=") : -1]) if grade else 1


def _measure(name: str) -> str:
    """Returns the ir-measures name of a metric."""
    grade = _GRADE.search(name)
    plain = _GRADE.sub("", name, count=1)
    if plain not in METRICS:
        raise unknown("ranking metric", name, METRICS)
    measure, at, cutoff = METRICS[plain].partition("@")
    if grade and measure == "nDCG":
        raise InputError(
            f"ranking metric {name!r}: nDCG uses the grades themselves; leave out (rel=…)"
        )
    return f"{measure}{grade[0] if grade else ''}{at}{cutoff}"
