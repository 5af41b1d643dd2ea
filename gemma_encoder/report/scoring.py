"""Recomputes a run's metrics from its prediction files, so that they can be resampled."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from gemma_encoder.evaluation import bootstrap, metrics, ranking
from gemma_encoder.evaluation.predictions import prediction_file
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_trec_qrels, read_trec_run
from gemma_encoder.weights.card import COUNTS


@dataclasses.dataclass
class Scored:
    """Predictions of a run on a split, in a form that can be resampled.

    Attributes:
        task: name of the task.
        split: full name of the split.
        units: names of the independent units: examples, questions, pairs or queries.
        metrics: functions by name, each from the indices [n] of the units that count, with
            repetitions, to the metric's value.
    """

    task: str
    split: str
    units: list[str]
    metrics: dict[str, Callable[[np.ndarray], float]]


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
    for logged_name, metric in names.items():
        by_query = ranking.by_query(metric, qrels, documents)
        values = np.array([by_query[query] for query in queries])
        functions[logged_name] = functools.partial(_mean_of, values)
    return [Scored(task, split, queries, functions)]


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
    return Scored(task.name, split, list(units), functions)
