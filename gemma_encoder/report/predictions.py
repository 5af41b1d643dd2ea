"""Sections about a run's predictions: confusion matrices, worst mistakes, changes by query."""

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import class_scores, ranking
from gemma_encoder.evaluation.details import details_file
from gemma_encoder.evaluation.prediction_files import FOLDER, mistake_file, prediction_file
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.report import plots
from gemma_encoder.report.markup import html_table, titled
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_trec_qrels, read_trec_run
from gemma_encoder.weights.card import COUNTS

MISTAKES = 20  # mistakes shown per task
EXTREMES = 5  # queries shown with the largest gains, and with the largest losses


def confusion_section(run: RunFiles, several: bool) -> str:
    """Returns a confusion matrix for each split of each single-label task.

    With many classes, it is a list of the most frequent confusions.
    """
    parts = []
    for task, split in task_splits(run):
        if not task.kind.one_class:
            continue
        path = pathlib.Path(prediction_file(run.workdir / FOLDER, task.name, split))
        lines = read_jsonl(path)
        labeled = [line for line in lines if not task.is_unlabeled(line["label"])]
        if labeled:
            parts.append(f"<h3>{html_text(titled(run, several, task.name, split))}</h3>")
            many = len(task.classes) > class_scores.SHOWN
            parts.append((_confusion_list if many else _confusion_table)(task, labeled))
    return "".join(parts)


def classes_section(run: RunFiles, several: bool) -> str:
    """Returns precision, recall, F1 and support of each class, or of the worst of many."""
    parts = []
    for task, split in run.latest():
        for full_split, details in run.details(task, split).items():
            scores = details.get("classes")
            if not scores:
                continue
            shown = class_scores.selected_classes(scores)
            table = html_table(class_scores.COLUMNS, class_scores.format_scores(shown))
            parts.append(f"<h3>{html_text(titled(run, several, task, full_split))}</h3>{table}")
            if note := class_scores.others_note(len(scores)):
                file = details_file(run.workdir / FOLDER, task, full_split).name
                parts.append(f'<p class="muted">{note} in predictions/{html_text(file)}.</p>')
    return "".join(parts)


def _confusion_list(task: Task, lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the most frequent pairs of a label and another prediction."""
    pairs = collections.Counter(
        (line["label"], line["prediction"]) for line in lines if line["label"] != line["prediction"]
    )
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        [task.classes[label], task.classes[predicted], count]
        for (label, predicted), count in ordered[: class_scores.SHOWN]
    ]
    if not rows:
        return "<p>No class was confused with another.</p>"
    more = f" {len(ordered) - len(rows):,} more pairs." if len(ordered) > len(rows) else ""
    note = f"The most frequent confusions.{more}"
    head = ["label", "predicted", "examples"]
    return html_table(head, rows) + f'<p class="muted">{note}</p>'


def _confusion_table(task: Task, lines: Sequence[Mapping[str, Any]]) -> str:
    labels = [line["label"] for line in lines]
    predicted = [line["prediction"] for line in lines]
    matrix = np.zeros((len(task.classes), len(task.classes)), int)
    np.add.at(matrix, (labels, predicted), 1)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    columns = ("label \\ predicted", *task.classes)
    head = "".join(f"<th>{html_text(column)}</th>" for column in columns)
    rows = []
    for i, label in enumerate(task.classes):
        cells = [_confusion_cell(matrix[i, j], shares[i, j]) for j in range(len(task.classes))]
        rows.append(f"<tr><th>{html_text(label)}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _confusion_cell(count: int, share: float) -> str:
    color = f"color-mix(in srgb, {plots.COLORS[0]} {60 * share:.0f}%, transparent)"
    return f'<td class="cell" style="background:{color}">{count}<br>{share:.1%}</td>'


def mistakes_section(run: RunFiles, several: bool) -> str:
    """Returns the worst mistakes of each task whose kind defines mistakes."""
    parts = []
    for task, split in task_splits(run):
        measure = task.kind.mistake_measure
        if not measure:
            continue
        parts.append(f"<h3>{html_text(titled(run, several, task.name, split))}</h3>")
        path = pathlib.Path(mistake_file(run.workdir / FOLDER, task.name, split))
        if not path.exists():
            parts.append(
                '<p class="muted">This run has no mistakes on disk; '
                "run gemma-encoder evaluate to write them.</p>"
            )
            continue
        rows = [
            [" | ".join(line["fields"].values()), *task.kind.mistake(task, line)]
            for line in read_jsonl(path)[:MISTAKES]
        ]
        head = ["text", "label", "prediction", measure]
        parts.append(html_table(head, rows) if rows else "<p>None.</p>")
    return "".join(parts)


def first_stage_section(run: RunFiles, several: bool) -> str:
    """Returns the changes by query against the first stage, for each ranking task."""
    parts = []
    folder = run.workdir / FOLDER
    for (name, split), line in run.latest().items():
        for full_split in run.parts(name, split).values():
            stem = f"{name}.{full_split}"
            first_stage = folder / f"{stem}.first_stage.trec"
            if first_stage.exists() and (folder / f"{stem}.qrels").exists():
                metric = next((metric for metric in line if metric not in COUNTS), None)
                if metric is None:  # no query is judged
                    continue
                parts.append(f"<h3>{html_text(titled(run, several, name, full_split))}</h3>")
                parts.append(_first_stage_changes(folder, stem, metric))
    return "".join(parts)


def _first_stage_changes(folder: pathlib.Path, stem: str, metric: str) -> str:
    """Returns means, won and lost queries, a plot of all changes and a table of the largest."""
    qrels = read_trec_qrels(folder / f"{stem}.qrels")
    before = ranking.by_query(metric, qrels, read_trec_run(folder / f"{stem}.first_stage.trec"))
    after = ranking.by_query(metric, qrels, read_trec_run(folder / f"{stem}.trec"))
    change = {query: after[query] - before[query] for query in qrels}
    won = sum(value > 0 for value in change.values())
    lost = sum(value < 0 for value in change.values())
    mean_before = np.mean(list(before.values()))
    mean_after = np.mean(list(after.values()))
    means = f"{metric}: first stage {mean_before:.3f}, this run {mean_after:.3f}"
    plot = plots.difference_plot(
        f"{metric}, change by query", list(change.values()), "queries, best first"
    )
    queries = read_jsonl(folder / f"{stem}.queries.jsonl")
    texts = {row["query"]: row["text"] for row in queries}
    rows = [
        [
            query,
            texts.get(query, ""),
            f"{before[query]:.3f}",
            f"{after[query]:.3f}",
            f"{change[query]:+.3f}",
        ]
        for query in _extremes(change)
    ]
    return (
        f"<p>{html_text(means)}. "
        f"{won} queries won, {len(change) - won - lost} tied, {lost} lost.</p>"
        f'<div class="plots">{plot}</div>'
        + html_table(["query", "text", "first stage", "this run", "change"], rows)
    )


def _extremes(change: Mapping[str, float]) -> list[str]:
    """Returns the queries with the largest gains, then those with the largest losses."""
    ordered = sorted(change, key=lambda query: (-change[query], query))
    gains = [query for query in ordered[:EXTREMES] if change[query] > 0]
    losses = [query for query in ordered[-EXTREMES:] if change[query] < 0]
    return gains + losses


def task_splits(run: RunFiles) -> Iterator[tuple[Task, str]]:
    """Yields (task, full split name) for each predicted split of the run's training tasks."""
    for name, split in run.latest():
        task = run.tasks.get(name)
        if task is None:
            continue
        for full_split in run.parts(name, split).values():
            yield task, full_split
