"""Metrics of many resamples at once: each takes how often every example was drawn, and gives the metric of every resample.

The same values as `metrics.METRICS` gives on the examples drawn, a thousand times faster.

R resamples, n examples, C classes.
"""

from collections.abc import Callable

import numpy as np

Weighted = Callable[
    [np.ndarray, np.ndarray, np.ndarray], np.ndarray
]  # counts [R, n], labels [n], predictions [n] -> [R]


def mean(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of values [n] in each resample, [R]."""
    return counts @ np.asarray(values, np.float64) / counts.sum(axis=1)


def accuracy(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The share that is right, [R]."""
    return mean(counts, labels == predictions)


def _confusion(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """How many examples of each class were given each class, [R, C, C]."""
    classes = int(max(labels.max(), predictions.max())) + 1
    cells = np.eye(classes * classes)[labels.astype(int) * classes + predictions.astype(int)]
    return (counts @ cells).reshape(len(counts), classes, classes)


def _f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of each class, [R, C]; 0 where a class is neither there nor predicted."""
    right = np.einsum("rcc->rc", confusion)
    total = confusion.sum(axis=1) + confusion.sum(axis=2)
    return np.divide(2 * right, total, out=np.zeros_like(right), where=total > 0)


def f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """F1 of class 1, [R]."""
    found = _f1(_confusion(counts, labels, predictions))
    return found[:, 1] if found.shape[1] > 1 else np.zeros(len(counts))


def macro_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The mean of F1 over the classes that a resample holds or predicts, [R]."""
    confusion = _confusion(counts, labels, predictions)
    there = (confusion.sum(axis=1) + confusion.sum(axis=2)) > 0
    return _f1(confusion).sum(axis=1) / there.sum(axis=1)


def matthews_correlation(
    counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray
) -> np.ndarray:
    """Matthews' correlation, of any number of classes, [R]; 0 where one side is constant."""
    confusion = _confusion(counts, labels, predictions)
    total, right = confusion.sum(axis=(1, 2)), np.einsum("rcc->r", confusion)
    true, said = confusion.sum(axis=2), confusion.sum(axis=1)
    above = right * total - (true * said).sum(axis=1)
    below = np.sqrt((total**2 - (said**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1)))
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def pearson(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Pearson's correlation, [R]; 0 where one side is constant."""
    x, y = (np.asarray(values, np.float64) for values in (labels, predictions))
    return _correlation(
        counts, *(np.broadcast_to(values - values.mean(), counts.shape) for values in (x, y))
    )


def spearman(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Spearman's correlation, ties at their middle rank, [R]; 0 where one side is constant."""
    return _correlation(counts, _ranks(counts, labels), _ranks(counts, predictions))


def _ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The middle rank of each example among those drawn, [R, n]; of examples that were not drawn it means nothing."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    drawn = np.add.reduceat(
        counts[:, order], starts, axis=1, dtype=np.float64
    )  # of each different value
    middle = np.cumsum(drawn, axis=1) - drawn / 2 + 0.5
    return middle[:, group]


def _correlation(counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y [R, n], each example counted as often as it was drawn, [R]."""
    total = counts.sum(axis=1, dtype=np.float64)
    mean_x, mean_y = (np.einsum("rn,rn->r", counts, values) / total for values in (x, y))
    above, x_squares, y_squares = (
        np.einsum("rn,rn,rn->r", counts, *pair) / total for pair in ((x, y), (x, x), (y, y))
    )
    x_spread, y_spread = x_squares - mean_x**2, y_squares - mean_y**2
    varied = (x_spread > 1e-12 * x_squares) & (
        y_spread > 1e-12 * y_squares
    )  # what is left of a constant is rounding
    return np.divide(
        above - mean_x * mean_y,
        np.sqrt(np.abs(x_spread * y_spread)),
        out=np.zeros_like(above),
        where=varied,
    )


METRICS: dict[str, Weighted] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1a": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
}
