"""Precision, recall, F1 and support of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation.metrics import is_labeled
from gemma_encoder.inputs.task import ExampleTable, Task

COLUMNS = ("class", "precision", "recall", "f1", "support")
SHOWN = 20  # classes that a table shows


def class_scores(task: Task, outputs: np.ndarray, table: ExampleTable) -> list[dict[str, Any]]:
    """Returns the scores of each class, in the order of the classes.

    Empty without labels, or if the kind has no classes. A quotient without a denominator, such as
    the precision of a class that was never predicted, is 0, as in the metric F1.
    """
    if not task.kind.has_classes or not is_labeled(task, table):
        return []
    labels = task.kind.metric_labels(task, table.labels)
    predictions = task.kind.decide(task, outputs)
    if labels.ndim == 2:  # probabilities of several classes at once
        predictions = predictions >= 0.5
    count = len(task.classes)
    if labels.ndim == 1:
        labels, predictions = labels.astype(int), predictions.astype(int)
        matching = labels[labels == predictions]
        correct, predicted, support = (
            np.bincount(values, minlength=count) for values in (matching, predictions, labels)
        )
    else:
        correct, predicted, support = (
            values.sum(axis=0) for values in (labels * predictions, predictions, labels)
        )
    totals = (predicted, support, (predicted + support) / 2)
    shares = [np.divide(correct, total, out=np.zeros(count), where=total > 0) for total in totals]
    rounded = [np.round(values, 6).tolist() for values in shares]
    rows = zip(task.classes, *rounded, np.asarray(support, int).tolist(), strict=True)
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def selected_classes(scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the scores to show: all in their order, or if there are many, those of the worst.

    The worst classes are those with the lowest F1, of equal ones the most frequent. Classes without
    examples are last.
    """
    if len(scores) <= SHOWN:
        return list(scores)
    worst_first = sorted(scores, key=lambda row: (not row["support"], row["f1"], -row["support"]))
    return worst_first[:SHOWN]


def format_scores(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Formats scores as rows of `COLUMNS`; names of classes without line breaks."""
    return [
        (
            " ".join(row["class"].split()),
            *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")),
            f"{row['support']:,}",
        )
        for row in scores
    ]


def others_note(count: int) -> str:
    """Describes the classes that `selected_classes` left out of a table; "" if there are none."""
    return f"the {SHOWN} of lowest F1; {count - SHOWN:,} more" if count > SHOWN else ""
