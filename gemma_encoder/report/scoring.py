"""Recomputes a run's metrics from its prediction files, so that they can be resampled."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gemma_encoder.evaluation import bootstrap, metrics, ranking, resampled_metrics
from gemma_encoder.evaluation.predictions import prediction_file
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_trec_qrels, read_trec_run
from gemma_encoder.weights.card import COUNTS

# Metrics that are means of one value a unit: of an example, or of a question or pair.
_MEANS = {
    "classification": ("exact_match", "gender_parity"),
    "choice": ("accuracy", "exact_match", "token_f1"),
}
# Kinds whose metrics have the meaning of those in `resampled_metrics`.
_WEIGHTED_KINDS = ("classification", "regression", "ordinal")


@dataclasses.dataclass
class Scored:
    """Predictions of a run on a split, in a form that can be resampled.

    Attributes:
        task: name of the task.
        split: full name of the split.
        units: names of the independent units: examples, questions, pairs or queries.
        metrics: functions by name, each from the indices [n] of the units that count, with
            repetitions, to the metric's value.
        weighted: functions by name, each from weights [R, n] of the units to the metric's values
            [R], for the metrics that take weights.
        bounds: worst and best value by name, see `bootstrap.bounds`.
    """

    task: str
    split: str
    units: list[str]
    metrics: dict[str, Callable[[np.ndarray], float]]
    weighted: dict[str, Callable[[np.ndarray], np.ndarray]]
    bounds: dict[str, bootstrap.Bounds | None]

    def resampled(self, metric: str) -> np.ndarray:
        """Returns the metric on each resample of the units, [R]."""
        count = len(self.units)
        if metric in self.weighted:
            return bootstrap.weighted(self.weighted[metric], count)
        return bootstrap.resampled(self.metrics[metric], count)


def score(run: RunFiles) -> list[Scored]:
    """Returns all predictions of a run from whose files its metrics can be recomputed."""
    scored = []
    for (name, split), line in run.latest().items():
        for part, full_split in run.parts(name, split).items():
            plain_names = _plain_names(line, part)
            if (run.workdir / "predictions" / f"{name}.{full_split}.trec").exists():
                scored += _scored_ranking(run, name, full_split, plain_names)
            elif name in run.tasks and not run.tasks[name].kind.ranks:
                task = run.tasks[name]
                scored.append(_scored_examples(run, task, full_split, plain_names))
    return scored


def _plain_names(line: Mapping[str, object], part: str) -> dict[str, str]:
    """Returns a part's metrics in a log line: their names without the part, by logged name."""
    logged = [name for name in line if name not in COUNTS]
    if not part:
        return {name: name for name in logged}
    suffix = f"_{part}"
    return {name: name.removesuffix(suffix) for name in logged if name.endswith(suffix)}


def _scored_ranking(run: RunFiles, task: str, split: str, names: Mapping[str, str]) -> list[Scored]:
    folder = run.workdir / "predictions"
    qrels_file = folder / f"{task}.{split}.qrels"
    if not qrels_file.exists():
        return []
    qrels = read_trec_qrels(qrels_file)
    documents = read_trec_run(folder / f"{task}.{split}.trec")
    queries = list(qrels)
    functions = {}
    weighted = {}
    for logged_name, metric in names.items():
        by_query = ranking.by_query(metric, qrels, documents)
        values = np.array([by_query[query] for query in queries])
        functions[logged_name] = functools.partial(_mean_of, values)
        weighted[logged_name] = functools.partial(resampled_metrics.mean, values=values)
    return [Scored(task, split, queries, functions, weighted, _bounds(names))]


def _bounds(names: Mapping[str, str]) -> dict[str, bootstrap.Bounds | None]:
    return {logged_name: bootstrap.bounds(metric) for logged_name, metric in names.items()}


def _mean_of(values: np.ndarray, indices: np.ndarray) -> float:
    return float(values[indices].mean())


def _scored_examples(run: RunFiles, task: Task, split: str, names: Mapping[str, str]) -> Scored:
    lines = read_jsonl(pathlib.Path(prediction_file(run.workdir / "predictions", task.name, split)))
    kind = task.kind
    table = ExampleTable(
        [kind.read_label(line) for line in lines],
        [line.get("query", "") for line in lines],
        [line.get("document", "") for line in lines],
        lines,
    )
    labels = kind.metric_labels(task, table.labels)
    predictions = np.array([kind.read_line(line) for line in lines])
    grouped = any(table.query_ids)
    if grouped:
        units = table.groups()
    else:
        # Unit names contain the label, so that runs on different data are never paired.
        units = {f"{i} {label}": [i] for i, label in enumerate(table.labels)}
    groups = [np.array(members) for members in units.values()]

    def measure(metric: str, indices: np.ndarray) -> float:
        if grouped:
            members, draws = bootstrap.draw_groups(groups, indices)
            query_ids = [str(draw) for draw in draws]
        else:
            members = indices
            query_ids = []
        infos = [lines[i] for i in members] if kind.is_list else []
        drawn = ExampleTable(query_ids=query_ids, infos=infos)
        return metrics.METRICS[kind.name][metric](labels[members], predictions[members], drawn)

    functions = {
        logged_name: functools.partial(measure, metric) for logged_name, metric in names.items()
    }
    weighted = {}
    for logged_name, metric in names.items():
        if metric in _MEANS.get(kind.name, ()):
            values = np.array([functions[logged_name](np.array([i])) for i in range(len(units))])
            weighted[logged_name] = functools.partial(resampled_metrics.mean, values=values)
        elif kind.name in _WEIGHTED_KINDS and metric in resampled_metrics.METRICS:
            weighted[logged_name] = functools.partial(
                _of_weights, metric, groups, labels, predictions
            )
    return Scored(task.name, split, list(units), functions, weighted, _bounds(names))


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
