"""Metrics of many bootstrap resamples at once, from the weight of every example.

Where weights are whole numbers, values equal those of `metrics.METRICS` on examples that are
repeated as often, computed a thousand times faster.

Shapes: R resamples, n examples, C classes. Counts [R, n] are the weights, see `bootstrap.weights`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# (counts [R, n], labels [n], predictions [n]) -> [R]
Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def mean(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the mean of values [n] in each resample, [R]."""
    return counts @ np.asarray(values, np.float64) / counts.sum(axis=1, dtype=np.float64)


def accuracy(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns the accuracy, [R]."""
    return mean(counts, labels == predictions)


class _ClassCounts(NamedTuple):
    """Weights by class in each resample, [R, C]; C counts the classes that examples have.

    The whole confusion matrix would need C² columns: a terabyte with a thousand classes.

    Attributes:
        correct: of examples with this label and prediction.
        labeled: of examples with this label.
        predicted: of examples with this prediction.
    """

    correct: np.ndarray
    labeled: np.ndarray
    predicted: np.ndarray


def _class_counts(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> _ClassCounts:
    classes, group = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    label, prediction = np.split(group, 2)

    def by_class(group: np.ndarray, included: np.ndarray) -> np.ndarray:
        # A sparse product is no faster, and importing scipy.sparse takes 0.15 s of each start.
        group = group[included]
        rows = [np.bincount(group, weights[included], len(classes)) for weights in counts]
        return np.stack(rows).astype(np.float64, copy=False)

    everywhere = np.ones(len(label), bool)
    return _ClassCounts(
        by_class(label, label == prediction),
        by_class(label, everywhere),
        by_class(prediction, everywhere),
    )


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns F1 of class 1, [R]."""
    labeled = labels == 1
    predicted = predictions == 1
    weight = counts.astype(np.float64)
    return _quotient(2 * (weight @ (labeled & predicted)), weight @ labeled + weight @ predicted)


def macro_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns F1 averaged over the classes with labels or predictions in a resample, [R]."""
    by_class = _class_counts(counts, labels, predictions)
    total = by_class.labeled + by_class.predicted
    return _quotient(2 * by_class.correct, total).sum(axis=1) / (total > 0).sum(axis=1)


def matthews_correlation(
    counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray
) -> np.ndarray:
    """Returns Matthews' correlation of C classes, [R]; 0 if labels or predictions are constant."""
    by_class = _class_counts(counts, labels, predictions)
    total = counts.sum(axis=1, dtype=np.float64)
    correct = by_class.correct.sum(axis=1)
    covariance = correct * total - (by_class.labeled * by_class.predicted).sum(axis=1)
    predicted_variance = total**2 - (by_class.predicted**2).sum(axis=1)
    labeled_variance = total**2 - (by_class.labeled**2).sum(axis=1)
    # The variance of a constant is rounding error.
    varies = (predicted_variance > 1e-12 * total**2) & (labeled_variance > 1e-12 * total**2)
    scale = np.sqrt(np.abs(predicted_variance * labeled_variance))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=varies)


def kappa(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns Cohen's kappa with squared distances, [R]; 0 if both sides are one class.

    1 − E[(label − prediction)²] / E[(label − another example's prediction)²].
    """
    label_mean, label_square = (mean(counts, labels.astype(float) ** power) for power in (1, 2))
    mean_of, square_of = (mean(counts, predictions.astype(float) ** power) for power in (1, 2))
    observed = mean(counts, _errors(labels, predictions) ** 2)
    by_chance = label_square + square_of - 2 * label_mean * mean_of
    varies = by_chance > 1e-12 * (label_square + square_of)
    return np.where(varies, 1 - observed / np.where(varies, by_chance, 1), 0.0)


def pearson(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation, [R]; 0 if labels or predictions are constant."""
    return _correlation(counts, _centered(counts, labels), _centered(counts, predictions))


def spearman(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation with average ranks of ties, [R].

    0 if labels or predictions are constant.
    """
    return _correlation(counts, _ranks(counts, labels), _ranks(counts, predictions))


def mae(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns the mean absolute error, [R]."""
    return mean(counts, np.abs(_errors(labels, predictions)))


def rmse(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns the root of the mean squared error, [R]."""
    return np.sqrt(mean(counts, _errors(labels, predictions) ** 2))


def r2(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns the coefficient of determination, [R]; 0 if labels are constant."""
    centered = np.asarray(labels, np.float64) - np.mean(labels, dtype=np.float64)
    squares = mean(counts, centered**2)
    variance = squares - mean(counts, centered) ** 2
    error = mean(counts, _errors(labels, predictions) ** 2)
    # The variance of a constant is rounding error.
    varies = variance > 1e-12 * squares
    return np.where(varies, 1 - error / np.where(varies, variance, 1), 0.0)


def _errors(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.asarray(predictions, np.float64) - np.asarray(labels, np.float64)


def _centered(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns values [n] minus their mean, broadcast to [R, n]."""
    values = np.asarray(values, np.float64)
    return np.broadcast_to(values - values.mean(), counts.shape)


def _ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the average rank of each example among the drawn ones, [R, n].

    Ranks of examples that were not drawn are undefined.
    """
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    # Number of draws of each distinct value.
    drawn = np.add.reduceat(counts[:, order], starts, axis=1, dtype=np.float64)
    middle = np.cumsum(drawn, axis=1) - drawn / 2 + 0.5
    return middle[:, group]


def _correlation(counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation of x and y [R, n], weighted by the draw counts, [R]."""
    total = counts.sum(axis=1, dtype=np.float64)
    mean_x = np.einsum("rn,rn->r", counts, x) / total
    mean_y = np.einsum("rn,rn->r", counts, y) / total
    mean_xy = np.einsum("rn,rn,rn->r", counts, x, y) / total
    mean_xx = np.einsum("rn,rn,rn->r", counts, x, x) / total
    mean_yy = np.einsum("rn,rn,rn->r", counts, y, y) / total
    variance_x = mean_xx - mean_x**2
    variance_y = mean_yy - mean_y**2
    # The variance of a constant is rounding error.
    varies = (variance_x > 1e-12 * mean_xx) & (variance_y > 1e-12 * mean_yy)
    return np.divide(
        mean_xy - mean_x * mean_y,
        np.sqrt(np.abs(variance_x * variance_y)),
        out=np.zeros_like(mean_xy),
        where=varies,
    )


METRICS: dict[str, Weighted] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1a": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "quadratic_weighted_kappa": kappa,
    "mean_absolute_error": mae,
    "pearson": pearson,
    "spearman": spearman,
    "mae": mae,
    "rmse": rmse,
    "r2": r2,
}
