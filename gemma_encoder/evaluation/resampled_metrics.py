"""Metrics of many bootstrap resamples at once, from the weight of every example.

Where weights are whole numbers, values equal those of `metrics.METRICS` on examples that are
repeated as often, computed a thousand times faster.

Shapes: R resamples, n examples, C classes. Counts [R, n] are the weights, see `bootstrap.weights`.
"""

from collections.abc import Callable

import numpy as np

# (counts [R, n], labels [n], predictions [n]) -> [R]
Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def mean(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the mean of values [n] in each resample, [R]."""
    return counts @ np.asarray(values, np.float64) / counts.sum(axis=1, dtype=np.float64)


def accuracy(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns the accuracy, [R]."""
    return mean(counts, labels == predictions)


def _confusion(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns confusion matrices, [R, C, C]: labels by predictions."""
    classes = int(max(labels.max(), predictions.max())) + 1
    cells = np.eye(classes * classes)[labels.astype(int) * classes + predictions.astype(int)]
    return (counts @ cells).reshape(len(counts), classes, classes)


def _f1(confusion: np.ndarray) -> np.ndarray:
    """Returns F1 of each class, [R, C]; 0 for a class without labels and predictions."""
    correct = np.einsum("rcc->rc", confusion)
    total = confusion.sum(axis=1) + confusion.sum(axis=2)
    return np.divide(2 * correct, total, out=np.zeros_like(correct), where=total > 0)


def f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns F1 of class 1, [R]."""
    per_class = _f1(_confusion(counts, labels, predictions))
    return per_class[:, 1] if per_class.shape[1] > 1 else np.zeros(len(counts))


def macro_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns F1 averaged over the classes with labels or predictions in a resample, [R]."""
    confusion = _confusion(counts, labels, predictions)
    present = (confusion.sum(axis=1) + confusion.sum(axis=2)) > 0
    return _f1(confusion).sum(axis=1) / present.sum(axis=1)


def matthews_correlation(
    counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray
) -> np.ndarray:
    """Returns Matthews' correlation of C classes, [R]; 0 if labels or predictions are constant."""
    confusion = _confusion(counts, labels, predictions)
    total = confusion.sum(axis=(1, 2))
    correct = np.einsum("rcc->r", confusion)
    labeled = confusion.sum(axis=2)
    predicted = confusion.sum(axis=1)
    covariance = correct * total - (labeled * predicted).sum(axis=1)
    predicted_variance = total**2 - (predicted**2).sum(axis=1)
    labeled_variance = total**2 - (labeled**2).sum(axis=1)
    # The variance of a constant is rounding error.
    varies = (predicted_variance > 1e-12 * total**2) & (labeled_variance > 1e-12 * total**2)
    scale = np.sqrt(np.abs(predicted_variance * labeled_variance))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=varies)


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
    "pearson": pearson,
    "spearman": spearman,
    "mae": mae,
    "rmse": rmse,
    "r2": r2,
}
