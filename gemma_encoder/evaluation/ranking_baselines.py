"""Values of ranking metrics that need no model: the candidates in random order.

Values are exact expectations over all orders of a query's candidates, each equally likely. They are
means over the queries that `ranking.compute_ranking_metrics` counts, by the same rules: every
judged query counts, one without candidates or without a relevant document as zero, as in trec_eval
with -c; and relevant documents that are not among the candidates are missed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.evaluation import ranking


class _Query(NamedTuple):
    """Candidates of a query.

    Attributes:
        size: number of candidates.
        retrieved: number of relevant documents among them.
        relevant: number of relevant documents.
        gains: grades of the candidates, 0 for the unjudged.
        ideal: all grades, the highest first.
    """

    size: int
    retrieved: int
    relevant: int
    gains: np.ndarray
    ideal: np.ndarray


def random_order(
    metrics: Sequence[str],
    qrels: Mapping[str, Mapping[str, float]],
    candidates: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """Returns the expected metrics of candidates in random order; empty without qrels.

    Args:
        metrics: names as in `ranking.compute_ranking_metrics`.
        qrels: relevance grade of each judged document of each query.
        candidates: documents of each query.
    """
    if not qrels:
        return {}
    return {name: _mean(name, qrels, candidates) for name in metrics}


def _mean(
    name: str,
    qrels: Mapping[str, Mapping[str, float]],
    candidates: Mapping[str, Sequence[str]],
) -> float:
    plain, lowest = ranking.split_name(name)
    values = []
    for query, grades in qrels.items():
        documents = candidates.get(query, ())
        gains = np.array([max(grades.get(document, 0), 0) for document in documents])
        retrieved = sum(grades.get(document, 0) >= lowest for document in documents)
        relevant = sum(grade >= lowest for grade in grades.values())
        ideal = np.array(sorted((max(grade, 0) for grade in grades.values()), reverse=True))
        item = _Query(len(documents), retrieved, relevant, gains, ideal)
        values.append(EXPECTED[plain](item) if retrieved else 0.0)
    return float(np.mean(values))


def expected_reciprocal_rank(size: int, relevant: int, cutoff: int = 10) -> float:
    """Returns the expected reciprocal rank, cut off, of documents in random order.

    Σ_k 1/k · P(the first relevant document has rank k), for k up to the cutoff.

    Args:
        size: number of documents.
        relevant: number of relevant ones.
        cutoff: last rank that counts.
    """
    if not relevant:
        return 0.0
    ways = math.comb(size, relevant)
    return sum(
        math.comb(size - k, relevant - 1) / ways / k for k in range(1, min(cutoff, size) + 1)
    )


def _ndcg(query: _Query, cutoff: int = 10) -> float:
    """Returns the mean gain times the sum of discounts, relative to the ideal order."""
    discounts = 1 / np.log2(np.arange(2, cutoff + 2))
    ideal = query.ideal[:cutoff] @ discounts[: len(query.ideal)]
    return float(query.gains.mean() * discounts[: query.size].sum() / ideal) if ideal else 0.0


def _average_precision(query: _Query) -> float:
    """Returns Σ_k P(rank k is relevant) · E[precision at k | rank k is relevant] / relevant.

    Of the k − 1 documents above a relevant one, a share (retrieved − 1) / (size − 1) is relevant.
    """
    ranks = np.arange(1, query.size + 1)
    share = (query.retrieved - 1) / max(query.size - 1, 1)
    precision = (1 + (ranks - 1) * share) / ranks
    return float(query.retrieved / query.size * precision.sum() / query.relevant)


def _recall(query: _Query, cutoff: int = 100) -> float:
    """Returns the share of relevant documents that are candidates, times the share shown."""
    return query.retrieved / query.relevant * min(cutoff, query.size) / query.size


# By the names of `ranking.METRICS`.
EXPECTED: Mapping[str, Callable[[_Query], float]] = {
    "mrr@10": lambda query: expected_reciprocal_rank(query.size, query.retrieved),
    "ndcg@10": _ndcg,
    "map": _average_precision,
    "recall@100": _recall,
}
