"""Details of an evaluation: chance values beside metrics, and scores of each class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from gemma_encoder.evaluation import metrics
from gemma_encoder.evaluation.class_scores import class_scores
from gemma_encoder.evaluation.prediction_files import (
    ADVICE,
    check_prediction_files,
    write_prediction_files,
)
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.evaluation.units import units_of_examples, units_of_queries
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.inputs.number_text import format_number

TRAINING = "training labels"
EVALUATED = "evaluated labels"


def chance_of(predictions: Predictions) -> dict[str, float]:
    """Returns the metrics of predictions that ignore the texts.

    For ranking, the expected metrics of candidates in random order; else see
    `metrics.chance_metrics`.
    """
    task = predictions.task
    if task.kind.ranks:
        return predictions.random_order_metrics()
    return metrics.chance_metrics(task, predictions.table, predictions.constant)


def first_stage_of(predictions: Predictions) -> dict[str, float]:
    """Returns the metrics of the first stage's order; empty unless the task ranks one."""
    return predictions.first_stage_metrics() if predictions.task.kind.ranks else {}


def intervals_of(predictions: Predictions) -> dict[str, list[float]]:
    """Returns the bounds [low, high] of each metric's 95 % interval, see `evaluation.bootstrap`.

    Metrics that take no weights, such as those of several classes at once, are left out: their
    resamples take long. The report has them.
    """
    if predictions.intervals is None:
        predictions.intervals = _compute_intervals(predictions)
    return predictions.intervals


def _compute_intervals(predictions: Predictions) -> dict[str, list[float]]:
    task = predictions.task
    names = {name: name for name in task.metrics}
    if task.kind.ranks:
        qrels = predictions.relevance_grades()
        if not qrels:
            return {}
        units = units_of_queries(names, qrels, predictions.run())
    elif metrics.is_labeled(task, predictions.table):
        labels = task.kind.metric_labels(task, predictions.table.labels)
        decided = task.kind.decide(task, predictions.outputs)
        units = units_of_examples(
            task, names, labels, decided, predictions.table, predictions.outputs
        )
    else:
        return {}
    intervals = {name: units.interval(name) for name in units.weighted}
    return {
        name: [float(f"{bound:.6g}") for bound in (interval.low, interval.high)]
        for name, interval in intervals.items()
        if interval.exists
    }


def format_metric(name: str, value: float | None, sign: str = "") -> str:
    """Formats a metric, errors of a regression in any unit; "undefined" for null and NaN.

    Args:
        name: logged name of the metric.
        value: its value, a bound, or a difference.
        sign: "+" for a sign in front of positive values, too.
    """
    if value is None or math.isnan(value):
        return "undefined"
    in_units = metrics.plain_name(name) in ("mae", "rmse")
    return format_number(value, sign) if in_units else f"{value:{sign}.3f}"


def format_bounds(name: str, bounds: Sequence[float]) -> str:
    """Formats the bounds of a metric's interval."""
    return " to ".join(format_metric(name, bound) for bound in bounds)


def describe(predictions: Predictions, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Returns the details of an evaluated split, for JSON.

    Args:
        predictions: predictions of the split.
        step: training step of the parameters.
        values: the metrics, under their plain names.

    Returns:
        "step", "examples", "metrics"; "intervals", [low, high] by metric; "chance", by metric;
        "chance_from", the labels that the constant prediction fits; "first_stage", the metrics of
        the first stage's order, empty without one; and "classes", the scores of each class.
    """
    return {
        "step": step,
        "examples": len(predictions.table.labels),
        "metrics": dict(values),
        "intervals": intervals_of(predictions),
        "chance": chance_of(predictions),
        "chance_from": EVALUATED if predictions.constant is None else TRAINING,
        "first_stage": first_stage_of(predictions),
        "classes": class_scores(predictions.task, predictions.outputs, predictions.table),
    }


def details_file(folder: epath.Path, task: str, split: str) -> epath.Path:
    """Path of the details of a task's split."""
    return folder / f"{task}.{split}.metrics.json"


def write_details(folder: epath.Path, task: str, split: str, values: Mapping[str, Any]) -> None:
    """Writes the details of a task's split."""
    name = details_file(folder, task, split).name
    write_prediction_files(folder, {name: [to_json(values, indent=1) + "\n"]})


def read_details(folder: epath.Path, task: str, split: str, step: int) -> dict[str, Any]:
    """Reads the details of a task's split at a step; empty if there are none of that step.

    Raises:
        InputError: the file was changed, cut or deleted.
    """
    path = details_file(folder, task, split)
    check_prediction_files(folder, [path.name])
    values = read_object(path, ADVICE) if path.exists() else {}
    return values if values.get("step") == step else {}
