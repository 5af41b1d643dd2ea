"""Metrics as functions of independent units, so that they can be resampled for intervals.

Shapes: n units (examples, questions, pairs or queries), R resamples.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap, metrics, ranking, resampled_metrics
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import ExampleTable, Task

# Metrics that are means of one value a unit: of an example, or of a question or pair.
_MEANS = {
    "classification": ("exact_match", "gender_parity"),
    "choice": ("accuracy", "exact_match", "token_f1"),
}
# Kinds whose metrics have the meaning of those in `resampled_metrics`.
_WEIGHTED_KINDS = ("classification", "regression", "ordinal")


@dataclasses.dataclass
class Units:
    """Metrics of a split as functions of its units.

    Attributes:
        units: names of the independent units: examples, questions, pairs or queries.
        metrics: functions by name, each from the indices [n] of the units that count, with
            repetitions, to the metric's value.
        weighted: functions by name, each from weights [R, n] of the units to the metric's values
            [R], for the metrics that take weights.
        bounds: worst and best value by name, see `bootstrap.bounds`.
        effective: `bootstrap.effective_units` by name; all units for names that are missing.
    """

    units: list[str]
    metrics: dict[str, Callable[[np.ndarray], float]]
    weighted: dict[str, Callable[[np.ndarray], np.ndarray]]
    bounds: dict[str, bootstrap.Bounds | None]
    effective: dict[str, float] = dataclasses.field(default_factory=dict, kw_only=True)

    def resampled(self, metric: str) -> np.ndarray:
        """Returns the metric on each resample of the units, [R]."""
        count = len(self.units)
        if metric in self.weighted:
            return bootstrap.weighted(self.weighted[metric], count)
        return bootstrap.resampled(self.metrics[metric], count)

    def interval(self, metric: str) -> bootstrap.Interval:
        """Returns the metric with its 95 % interval."""
        value = self.metrics[metric](np.arange(len(self.units)))
        return self.interval_of(metric, value, self.resampled(metric))

    def interval_of(self, metric: str, value: float, resampled: np.ndarray) -> bootstrap.Interval:
        """Returns the interval of a metric's value from its resampled values [R].

        The calibration error has none: resampling adds to it, so that most resampled values exceed
        the value itself; `calibration.noise_floor` tells what chance adds.
        """
        if metrics.plain_name(metric) == "calibration_error":
            return bootstrap.Interval(value, np.nan, np.nan)
        units = self.effective.get(metric, len(self.units))
        limits = self.bounds[metric]
        mass = 0.0 if limits is None else bootstrap.prior_mass(value, resampled, units, limits)
        return bootstrap.interval(value, resampled, units, limits, mass)


def paired_difference(
    scored: Units,
    metric: str,
    values: tuple[float, float],
    resampled: tuple[np.ndarray, np.ndarray],
) -> bootstrap.Interval:
    """Returns the difference of a metric between two systems on the same units.

    Args:
        scored: the units of either system.
        metric: name of the metric.
        values: of the system, and of the one that it is compared with.
        resampled: their values on the same resamples.
    """
    limits = bootstrap.bounds_of_difference(scored.bounds[metric])
    change = values[0] - values[1]
    return bootstrap.interval(change, resampled[0] - resampled[1], len(scored.units), limits)


def units_of_queries(
    names: Mapping[str, str], qrels: Mapping[str, Mapping[str, float]], run: ranking.Run
) -> Units:
    """Returns ranking metrics as functions of the judged queries.

    Args:
        names: names in `ranking.METRICS`, by the names under which they are logged.
        qrels: relevance grade of each judged document of each query.
        run: ranking of each query's candidates.
    """
    values = {name: ranking.by_query(metric, qrels, run) for name, metric in names.items()}
    return units_of_values(names, list(qrels), values)


def units_of_values(
    names: Mapping[str, str], queries: Sequence[str], values: Mapping[str, Mapping[str, float]]
) -> Units:
    """Returns ranking metrics as functions of queries whose values are computed.

    Args:
        names: names in `ranking.METRICS`, by the names under which they are logged.
        queries: the judged queries.
        values: value of each query, by logged name.
    """
    functions = {}
    weighted = {}
    for name, by_query in values.items():
        of_queries = np.array([by_query[query] for query in queries])
        functions[name] = functools.partial(_mean_of, of_queries)
        weighted[name] = functools.partial(resampled_metrics.mean, values=of_queries)
    return Units(list(queries), functions, weighted, _bounds(names))


def _mean_of(values: np.ndarray, indices: np.ndarray) -> float:
    return float(values[indices].mean())


def _bounds(names: Mapping[str, str]) -> dict[str, bootstrap.Bounds | None]:
    return {logged_name: bootstrap.bounds(metric) for logged_name, metric in names.items()}


def units_of_examples(
    task: Task,
    names: Mapping[str, str],
    labels: np.ndarray,
    predictions: np.ndarray,
    table: ExampleTable,
    probabilities: np.ndarray,
) -> Units:
    """Returns metrics as functions of the examples, or of the questions or pairs they belong to.

    Args:
        task: the task.
        names: names in `metrics.METRICS`, by the names under which they are logged.
        labels: of `Kind.metric_labels`.
        predictions: of `Kind.decide`.
        table: the examples.
        probabilities: of classes, [N, C]; C is 0 for a kind without them.
    """
    kind = task.kind
    if any(table.query_ids):
        units = table.groups()
    else:
        # Unit names contain the label, so that runs on different data are never paired.
        units = {f"{i} {label}": [i] for i, label in enumerate(table.labels)}
    groups = [np.array(members) for members in units.values()]
    infos = table.infos if kind.is_list else []
    functions = {}
    weighted = {}
    for logged_name, metric in names.items():
        function = metrics.METRICS[kind.name][metric]
        if isinstance(function, metrics.ProbabilityMetric):
            functions[logged_name] = functools.partial(
                _of_probabilities, function, task, groups, probabilities, table.labels
            )
            continue
        functions[logged_name] = functools.partial(
            _of_drawn, function, groups, labels, predictions, infos, any(table.query_ids)
        )
        if metric in _MEANS.get(kind.name, ()):
            values = np.array([functions[logged_name](np.array([i])) for i in range(len(units))])
            weighted[logged_name] = functools.partial(resampled_metrics.mean, values=values)
        elif kind.name in _WEIGHTED_KINDS and metric in resampled_metrics.METRICS:
            weighted[logged_name] = functools.partial(
                _of_weights, metric, groups, labels, predictions
            )
    effective = {}
    if kind.has_classes and not any(table.query_ids):
        effective = {
            logged_name: bootstrap.effective_units(metric, labels, predictions)
            for logged_name, metric in names.items()
        }
    return Units(list(units), functions, weighted, _bounds(names), effective=effective)


def _of_drawn(
    metric: metrics.Metric,
    groups: Sequence[np.ndarray],
    labels: np.ndarray,
    predictions: np.ndarray,
    infos: Sequence[Mapping[str, Any]],
    grouped: bool,
    drawn: np.ndarray,
) -> float:
    """Returns a metric of the examples of drawn units [n]; a unit that is drawn twice is two."""
    members, draws = bootstrap.draw_groups(groups, drawn) if grouped else (drawn, ())
    table = ExampleTable(
        query_ids=[str(draw) for draw in draws], infos=[infos[i] for i in members if infos]
    )
    return metric(labels[members], predictions[members], table)


def _of_probabilities(
    metric: metrics.ProbabilityMetric,
    task: Task,
    groups: Sequence[np.ndarray],
    probabilities: np.ndarray,
    labels: Sequence[Label],
    drawn: np.ndarray,
) -> float:
    """Returns a metric of the probabilities for the examples of drawn units [n]."""
    members = np.concatenate([groups[unit] for unit in drawn])
    return metric.measure(task, probabilities[members], [labels[index] for index in members])


def _of_weights(
    metric: str,
    groups: Sequence[np.ndarray],
    labels: np.ndarray,
    predictions: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Returns a metric of examples for weights [R, n] of their units, [R]."""
    unit = np.empty(len(labels), int)
    for index, members in enumerate(groups):
        unit[members] = index
    return resampled_metrics.METRICS[metric](weights[:, unit], labels, predictions)
