"""Metrics over all predictions of a split at once: scikit-learn's and scipy's, by the names that the field uses."""

import warnings
from collections.abc import Callable

import numpy as np

from gemma_encoder.inputs.errors import unknown
from gemma_encoder.inputs.task import Task


def _sklearn(name: str, **options) -> Callable[[np.ndarray, np.ndarray], float]:
    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, predictions, **options))

    return metric


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        import scipy.stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
            value = float(getattr(scipy.stats, name)(labels, predictions).statistic)
        return 0.0 if np.isnan(value) else value  # a constant prediction orders nothing

    return metric


# Classification metrics see class indices, regression metrics see targets and predictions in the task's own units.
CLASSIFICATION = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0.0),  # of class 1
    "macro_f1": _sklearn("f1_score", average="macro", zero_division=0.0),
    "matthews_correlation": _sklearn("matthews_corrcoef"),
}
REGRESSION = {"pearson": _correlation("pearsonr"), "spearman": _correlation("spearmanr")}


def compute(task: Task, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """The task's metrics.

    Args:
        task: a classification or regression task.
        labels: [N], class indices or targets in the task's own units.
        outputs: [N, C] class probabilities, or [N] predicted targets in the task's own units.
    """
    table = CLASSIFICATION if task.kind == "classification" else REGRESSION
    predictions = outputs.argmax(axis=-1) if task.kind == "classification" else outputs
    values = {}
    for name in task.metrics:
        if name not in table:
            raise unknown(f"{task.kind} metric", name, table)
        values[name] = table[name](labels, predictions)
    return values
