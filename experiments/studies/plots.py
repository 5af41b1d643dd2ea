"""Plots of a report, as PNG files: rows of studies with intervals, and re-ranking by query."""

import pathlib
from collections.abc import Sequence

from gemma_encoder.experiments.studies.reranking import WEIGHTS, Comparison
from gemma_encoder.experiments.studies.statistics import Cell
from gemma_encoder.whole_files import whole_file

# Colors.
BASELINE = "#b3590a"
ROW = "#2563a8"
CHANCE = "#777777"


def _figure(columns: int, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        1, columns, figsize=(4.6 * columns + 1.4, height), squeeze=False, layout="constrained"
    )


def plot_study(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Plots the rows of a study, with one panel per task.

    A panel has the mean and 95 % interval of every row that was run, its seeds as small dots, and
    chance as a line.
    """
    names = [
        row.name
        for row in cells[0].study.rows_at(cells[0].scale)
        if any(row.name in cell.runs for cell in cells)
    ]
    figure, axes = _figure(len(cells), 1.2 + 0.34 * len(names))
    for cell, axis in zip(cells, axes[0], strict=True):
        _plot_cell(cell, axis, names)
        labels = names if axis is axes[0][0] else [""] * len(names)
        axis.set_yticks(range(len(names)), labels)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(cell.task, fontsize=11)
        axis.set_xlabel(cell.metric)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _plot_cell(cell: Cell, axis, names: Sequence[str]) -> None:
    for y, row in enumerate(names):
        if row not in cell.runs:
            continue
        interval = cell.estimate(row)
        values = cell.values(row)
        color = BASELINE if row == cell.study.baseline else ROW
        axis.plot([interval.low, interval.high], [y, y], color=color, linewidth=2)
        axis.plot(interval.value, y, "o", color=color, markersize=7)
        axis.plot(values, [y + 0.22] * len(values), ".", color=color, alpha=0.6, markersize=5)
    if (chance := cell.chance()) is not None:
        axis.axvline(chance, color=CHANCE, linestyle="--", linewidth=1)


def plot_reranking(comparison: Comparison, path: pathlib.Path) -> None:
    """Plots the sorted differences of queries to the first stage, and MRR@10 by weight."""
    figure, axes = _figure(2, 3.4)
    left, right = axes[0]
    ordered = sorted(comparison.differences.values(), reverse=True)
    colors = [ROW if value > 0 else BASELINE for value in ordered]
    left.bar(range(len(ordered)), ordered, color=colors, width=0.9)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xlabel("queries, sorted")
    left.set_ylabel("MRR@10, re-ranker − first stage")
    right.plot(WEIGHTS, comparison.curve, "o-", color=ROW, label="one weight for all queries")
    right.axhline(comparison.first_stage, color=CHANCE, linestyle="--", label="first stage")
    right.axhline(
        comparison.interpolated, color=BASELINE, linestyle=":", label="weights by cross-validation"
    )
    right.set_xlabel("weight of the first stage")
    right.set_ylabel("MRR@10")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(comparison.row, fontsize=11)
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
