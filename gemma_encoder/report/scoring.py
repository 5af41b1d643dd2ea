"""Measures a run's predictions again, so that metrics can be resampled."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_encoder.evaluation import bootstrap, metrics, ranking
from gemma_encoder.evaluation.predictions import prediction_file
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_trec_qrels, read_trec_run
from gemma_encoder.weights.card import COUNTS


@dataclasses.dataclass
class Scored:
    """What a run said of a split, ready to be resampled: metrics are functions of which units (examples, questions, queries) count."""

    task: str
    split: str
    units: list[str]
    metrics: dict[str, Any]  # from [n] numbers of units to a value


def score(run: RunFiles) -> list[Scored]:
    """Everything that the run predicted and that can be measured again from its files."""
    found = []
    for (name, split), line in run.latest().items():
        for part, whole in run.parts(name, split).items():
            wanted = [
                metric
                for metric in line
                if metric not in COUNTS and (not part or metric.endswith(f"_{part}"))
            ]
            plain = {
                metric: metric.removesuffix(f"_{part}") if part else metric for metric in wanted
            }
            if (run.workdir / "predictions" / f"{name}.{whole}.trec").exists():
                found += _scored_run(run, name, whole, plain)
            elif name in run.tasks and not run.tasks[name].kind.ranks:
                found.append(_scored_examples(run, run.tasks[name], whole, plain))
    return found


def _scored_run(run: RunFiles, task: str, split: str, names: Mapping[str, str]) -> list[Scored]:
    folder = run.workdir / "predictions"
    if not (folder / f"{task}.{split}.qrels").exists():
        return []
    qrels, documents = (
        read_trec_qrels(folder / f"{task}.{split}.qrels"),
        read_trec_run(folder / f"{task}.{split}.trec"),
    )
    queries = list(qrels)
    functions = {}
    for shown, metric in names.items():
        values = ranking.by_query(metric, qrels, documents)
        array = np.array([values[query] for query in queries])
        functions[shown] = lambda chosen, array=array: float(array[chosen].mean())
    return [Scored(task, split, queries, functions)]


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
    # Labels are part of a unit's name, so that runs on different data are never paired.
    units = (
        table.groups() if grouped else {f"{i} {label}": [i] for i, label in enumerate(table.labels)}
    )
    groups = [np.array(members) for members in units.values()]

    def measure(chosen: np.ndarray, metric: str) -> float:
        members, draws = bootstrap.draw_groups(groups, chosen) if grouped else (chosen, chosen)
        infos = [lines[i] for i in members] if kind.is_list else []
        drawn = ExampleTable(
            query_ids=[str(draw) for draw in draws] if grouped else [], infos=infos
        )
        return metrics.METRICS[kind.name][metric](labels[members], predictions[members], drawn)

    functions = {
        shown: lambda chosen, metric=metric: measure(chosen, metric)
        for shown, metric in names.items()
    }
    return Scored(task.name, split, list(units), functions)
