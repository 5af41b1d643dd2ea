"""A re-ranker beside its first stage: query by query, and both interpolated with a weight that no query chooses for itself.

The first stage gives ranks only. Each query's scores and −log of its ranks are standardised over its candidates, and documents are
ordered by (1 − w) · score + w · (−log rank), ties in the first stage's order. w is chosen on the other four of five folds of queries.

Q queries, C candidates.
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
    """A row against the first stage.

    Attributes:
        row: its name.
        first_stage, reranked, interpolated: MRR@10, means over queries and seeds.
        gain, interpolated_gain: differences to the first stage, with paired intervals.
        wins, ties, losses: queries of all seeds that the re-ranker answers better, as well, worse.
        weights: those that the folds chose, of all seeds.
        differences: to the first stage, of each query, the mean over seeds.
        curve: MRR@10 by weight when all queries share it, the mean over seeds; chosen by nobody.
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
    """A row of a ranking cell against the first stage that its own results hold."""
    results = list(cell.runs[row].values())
    outcomes = [result["outcomes"][cell.metric] for result in results]
    first = np.array(outcomes[0]["first_stage"][cell.metric])
    reranked = np.array([outcome["values"][cell.metric] for outcome in outcomes])
    tables = [by_weight(outcome) for outcome in outcomes]
    chosen = [cross_validated(table) for table in tables]
    interpolated = np.array([values for values, _ in chosen])
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
        weights=tuple(weight for _, weights in chosen for weight in weights),
        differences=dict(zip(outcomes[0]["queries"], change.mean(axis=0).tolist(), strict=True)),
        curve=tuple(np.mean([table.mean(axis=1) for table in tables], axis=0).tolist()),
    )


def paired(differences: np.ndarray) -> Interval:
    """The mean of differences [S, Q], with an interval that resamples seeds and queries jointly."""
    counts = bootstrap.counts(differences.shape[1])
    values = np.stack([resampled_metrics.mean(counts, row) for row in differences])
    return bootstrap.percentile_interval(
        differences.mean(),
        np.take_along_axis(values, seed_draws(len(differences)), axis=0).mean(axis=0),
    )


def by_weight(outcome: Mapping[str, Any]) -> np.ndarray:
    """The reciprocal rank of each query at each weight, [W, Q]."""
    return np.array(
        [
            _by_weight(np.array(scores), np.array(grades))
            for scores, grades in zip(outcome["scores"], outcome["grades"], strict=True)
        ]
    ).T


def _by_weight(scores: np.ndarray, grades: np.ndarray) -> list[float]:
    if not len(scores):
        return [0.0] * len(WEIGHTS)
    ours, theirs = _standardized(scores), _standardized(-np.log(np.arange(1, len(scores) + 1)))
    return [reciprocal_rank((1 - weight) * ours + weight * theirs, grades) for weight in WEIGHTS]


def _standardized(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def reciprocal_rank(scores: np.ndarray, grades: np.ndarray) -> float:
    """1 / the rank of the first relevant document within the cutoff, else 0; equal scores stay in the first stage's order."""
    found = np.flatnonzero(grades[np.argsort(-scores, kind="stable")][:CUTOFF] > 0)
    return 1 / (int(found[0]) + 1) if len(found) else 0.0


def cross_validated(table: np.ndarray) -> tuple[np.ndarray, Sequence[float]]:
    """The reciprocal rank of each query at the weight that is best for the other folds, [Q], and each fold's weight.

    Args:
        table: the reciprocal rank of each query at each weight, [W, Q].
    """
    fold = np.arange(table.shape[1]) % FOLDS
    values, weights = np.zeros(table.shape[1]), []
    for number in range(min(FOLDS, table.shape[1])):
        others = table[:, fold != number]
        best = int(others.mean(axis=1).argmax()) if others.size else 0
        values[fold == number] = table[best, fold == number]
        weights.append(WEIGHTS[best])
    return values, weights
