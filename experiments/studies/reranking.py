"""Comparison of a re-ranker with its first stage, by query and interpolated.

The first stage has ranks, but no scores. Each query's scores and −log ranks are standardized over
its candidates, and documents are ordered by (1 − w) · score + w · (−log rank), with ties in
first-stage order. The weight w of a fold of queries is selected on the other four of five folds.

Shapes: S seeds, Q queries, C candidates, W weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap, resampled_metrics
from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.experiments.studies.statistics import Cell, seed_draws

WEIGHTS = tuple(i / 10 for i in range(11))
FOLDS = 5
CUTOFF = 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of a row with the first stage.

    Attributes:
        row: name of the row.
        first_stage, reranked, interpolated: MRR@10, means over queries and seeds.
        gain, interpolated_gain: differences to the first stage, with paired intervals.
        wins, ties, losses: number of queries of all seeds with a better, equal or worse result.
        weights: weights selected for the folds, of all seeds.
        differences: difference to the first stage by query, mean over seeds.
        curve: MRR@10 by weight, shared by all queries and without selection, mean over seeds.
    """

    row: str
    first_stage: float
    reranked: float
    interpolated: float
    gain: Interval
    interpolated_gain: Interval
    wins: int
    ties: int
    losses: int
    weights: tuple[float, ...]
    differences: Mapping[str, float]
    curve: tuple[float, ...]


def compare_to_first_stage(cell: Cell, row: str) -> Comparison:
    """Compares a row of a ranking cell with the first stage in the row's own results."""
    results = list(cell.runs[row].values())
    outcomes = [result["outcomes"][cell.metric] for result in results]
    first = np.array(outcomes[0]["first_stage"][cell.metric])
    reranked = np.array([outcome["values"][cell.metric] for outcome in outcomes])
    tables = [by_weight(outcome) for outcome in outcomes]
    validated = [cross_validated(table) for table in tables]
    interpolated = np.array([values for values, _ in validated])
    change = reranked - first
    return Comparison(
        row=row,
        first_stage=float(first.mean()),
        reranked=float(reranked.mean()),
        interpolated=float(interpolated.mean()),
        gain=paired(change),
        interpolated_gain=paired(interpolated - first),
        wins=int((change > 1e-9).sum()),
        ties=int((abs(change) <= 1e-9).sum()),
        losses=int((change < -1e-9).sum()),
        weights=tuple(weight for _, weights in validated for weight in weights),
        differences=dict(zip(outcomes[0]["queries"], change.mean(axis=0).tolist(), strict=True)),
        curve=tuple(np.mean([table.mean(axis=1) for table in tables], axis=0).tolist()),
    )


def paired(differences: np.ndarray) -> Interval:
    """Returns the mean of differences [S, Q], with seeds and queries resampled jointly."""
    units = differences.shape[1]
    weights = bootstrap.weights(units)
    values = np.stack([resampled_metrics.mean(weights, row) for row in differences])
    drawn = np.take_along_axis(values, seed_draws(len(differences)), axis=0)
    limits = bootstrap.bounds_of_difference(bootstrap.bounds("mrr@10"))
    return bootstrap.interval(differences.mean(), drawn.mean(axis=0), units, limits)


def by_weight(outcome: Mapping[str, Any]) -> np.ndarray:
    """Returns the reciprocal rank of each query at each weight, [W, Q]."""
    queries = zip(outcome["scores"], outcome["grades"], strict=True)
    return np.array(
        [_by_weight(np.array(scores), np.array(grades)) for scores, grades in queries]
    ).T


def _by_weight(scores: np.ndarray, grades: np.ndarray) -> list[float]:
    if not len(scores):
        return [0.0] * len(WEIGHTS)
    reranker = _standardized(scores)
    first_stage = _standardized(-np.log(np.arange(1, len(scores) + 1)))
    return [
        reciprocal_rank((1 - weight) * reranker + weight * first_stage, grades)
        for weight in WEIGHTS
    ]


def _standardized(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def reciprocal_rank(scores: np.ndarray, grades: np.ndarray) -> float:
    """Returns 1 / rank of the first relevant document within the cutoff, else 0.

    Ties stay in first-stage order.
    """
    ranked = grades[np.argsort(-scores, kind="stable")][:CUTOFF]
    relevant = np.flatnonzero(ranked > 0)
    return 1 / (int(relevant[0]) + 1) if len(relevant) else 0.0


def cross_validated(table: np.ndarray) -> tuple[np.ndarray, Sequence[float]]:
    """Selects a weight for each fold of queries on the other folds.

    Args:
        table: reciprocal rank of each query at each weight, [W, Q].

    Returns:
        The reciprocal rank of each query at its fold's weight, [Q], and the weight of each fold.
    """
    folds = np.arange(table.shape[1]) % FOLDS
    values = np.zeros(table.shape[1])
    weights = []
    for fold in range(min(FOLDS, table.shape[1])):
        inside = folds == fold
        outside = table[:, ~inside]
        best = int(outside.mean(axis=1).argmax()) if outside.size else 0
        values[inside] = table[best, inside]
        weights.append(WEIGHTS[best])
    return values, weights
