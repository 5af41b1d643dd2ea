"""Sections about a run's predictions: confusion, worst mistakes, wins and losses by query."""

import pathlib

import numpy as np

from gemma_encoder.evaluation import ranking
from gemma_encoder.evaluation.predictions import mistake_file, prediction_file
from gemma_encoder.report import plots
from gemma_encoder.report.markup import escape, html_table, titled
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_trec_qrels, read_trec_run
from gemma_encoder.weights.card import COUNTS

MISTAKES = 20  # that are shown of a task
EXTREMES = 5  # queries won and lost by most


def confusion_section(run: RunFiles, several: bool) -> str:
    """A confusion matrix for each split of each task with one class per text."""
    parts = []
    for (name, split), _ in run.latest().items():
        task = run.tasks.get(name)
        if task is None or not task.kind.one_class:
            continue
        for whole in run.parts(name, split).values():
            lines = [
                line
                for line in read_jsonl(
                    pathlib.Path(prediction_file(run.workdir / "predictions", name, whole))
                )
                if not task.is_unlabeled(line["label"])
            ]
            if not lines:
                continue
            matrix = np.zeros((len(task.classes), len(task.classes)), int)
            np.add.at(
                matrix,
                ([line["label"] for line in lines], [line["prediction"] for line in lines]),
                1,
            )
            shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            head = "".join(
                f"<th>{escape(label)}</th>" for label in ("label \\ predicted", *task.classes)
            )
            rows = "".join(
                f"<tr><th>{escape(label)}</th>"
                + "".join(
                    f'<td class="cell" style="background:color-mix(in srgb, {plots.COLORS[0]} {60 * shares[i, j]:.0f}%, transparent)">'
                    f"{matrix[i, j]}<br>{shares[i, j]:.1%}</td>"
                    for j in range(len(task.classes))
                )
                + "</tr>"
                for i, label in enumerate(task.classes)
            )
            parts.append(
                f'<h3>{escape(titled(run, several, name, whole))}</h3><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
            )
    return "".join(parts)


def mistakes_section(run: RunFiles, several: bool) -> str:
    """The worst mistakes of each task whose kind has mistakes."""
    parts = []
    for (name, split), _ in run.latest().items():
        task = run.tasks.get(name)
        if task is None or not task.kind.mistake_measure:
            continue
        for whole in run.parts(name, split).values():
            path = pathlib.Path(mistake_file(run.workdir / "predictions", name, whole))
            title = f"<h3>{escape(titled(run, several, name, whole))}</h3>"
            if not path.exists():
                parts.append(
                    f'{title}<p class="muted">Not kept by this run; gemma-encoder evaluate writes them.</p>'
                )
                continue
            rows = [
                [" | ".join(line["fields"].values()), *task.kind.mistake(task, line)]
                for line in read_jsonl(path)[:MISTAKES]
            ]
            head = ["text", "label", "prediction", task.kind.mistake_measure]
            parts.append(title + (html_table(head, rows) if rows else "<p>None.</p>"))
    return "".join(parts)


def first_stage_section(run: RunFiles, several: bool) -> str:
    """Queries won and lost against the first stage, for each ranking task."""
    parts = []
    folder = run.workdir / "predictions"
    for (name, split), line in run.latest().items():
        for whole in run.parts(name, split).values():
            before = folder / f"{name}.{whole}.first_stage.trec"
            if not before.exists() or not (folder / f"{name}.{whole}.qrels").exists():
                continue
            metric = next(metric for metric in line if metric not in COUNTS)
            qrels = read_trec_qrels(folder / f"{name}.{whole}.qrels")
            old, new = (
                ranking.by_query(metric, qrels, read_trec_run(path))
                for path in (before, folder / f"{name}.{whole}.trec")
            )
            texts = {
                row["query"]: row["text"]
                for row in read_jsonl(folder / f"{name}.{whole}.queries.jsonl")
            }
            change = {query: new[query] - old[query] for query in qrels}
            won, lost = (sum(sign * value > 0 for value in change.values()) for sign in (1, -1))
            ordered = sorted(change, key=lambda query: (-change[query], query))
            extremes = [query for query in ordered[:EXTREMES] if change[query] > 0] + [
                query for query in ordered[-EXTREMES:] if change[query] < 0
            ]
            rows = [
                [
                    query,
                    texts.get(query, ""),
                    f"{old[query]:.3f}",
                    f"{new[query]:.3f}",
                    f"{change[query]:+.3f}",
                ]
                for query in extremes
            ]
            means = f"{metric}: first stage {np.mean(list(old.values())):.3f}, this run {np.mean(list(new.values())):.3f}"
            parts.append(
                f"<h3>{escape(titled(run, several, name, whole))}</h3><p>{escape(means)}. "
                f"{won} queries won, {len(change) - won - lost} tied, {lost} lost.</p>"
                + f'<div class="plots">{plots.difference_plot(f"{metric}, change by query", list(change.values()), "queries, best first")}</div>'
                + html_table(["query", "text", "first stage", "this run", "change"], rows)
            )
    return "".join(parts)
