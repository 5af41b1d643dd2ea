"""Recomputes a run's metrics from its prediction files, so that they can be resampled."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_encoder.evaluation.prediction_files import FOLDER, prediction_file
from gemma_encoder.evaluation.units import Units, units_of_examples, units_of_queries
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.report.runs import (
    RunFiles,
    read_jsonl,
    read_probabilities,
    read_trec_qrels,
    read_trec_run,
)
from gemma_encoder.weights.card import COUNTS


@dataclasses.dataclass
class Scored(Units):
    """Predictions of a run on a split, in a form that can be resampled.

    Attributes:
        task: name of the task.
        split: full name of the split.
    """

    task: str
    split: str


def score(run: RunFiles) -> list[Scored]:
    """Returns all predictions of a run from whose files its metrics can be recomputed."""
    scored = []
    for (name, split), line in run.latest().items():
        for part, full_split in run.parts(name, split).items():
            plain_names = _plain_names(line, part)
            if (run.workdir / FOLDER / f"{name}.{full_split}.trec").exists():
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
    folder = run.workdir / FOLDER
    qrels_file = folder / f"{task}.{split}.qrels"
    if not qrels_file.exists():
        return []
    qrels = read_trec_qrels(qrels_file)
    documents = read_trec_run(folder / f"{task}.{split}.trec")
    units = units_of_queries(names, qrels, documents)
    return [Scored(**vars(units), task=task, split=split)]


def _scored_examples(run: RunFiles, task: Task, split: str, names: Mapping[str, str]) -> Scored:
    lines = read_jsonl(pathlib.Path(prediction_file(run.workdir / FOLDER, task.name, split)))
    kind = task.kind
    table = ExampleTable(
        [kind.read_label(line) for line in lines],
        [line.get("query", "") for line in lines],
        [line.get("document", "") for line in lines],
        lines,
    )
    labels = kind.metric_labels(task, table.labels)
    predictions = np.array([kind.read_line(line) for line in lines])
    units = units_of_examples(task, names, labels, predictions, table, read_probabilities(lines))
    return Scored(**vars(units), task=task.name, split=split)
