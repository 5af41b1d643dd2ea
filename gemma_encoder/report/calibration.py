"""Calibration section: can the probabilities be trusted, and what does abstaining gain."""

import pathlib
from collections.abc import Sequence

import numpy as np

from gemma_encoder.evaluation import calibration
from gemma_encoder.evaluation.prediction_files import FOLDER, prediction_file
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.report import plots
from gemma_encoder.report.markup import html_table, titled
from gemma_encoder.report.predictions import task_splits
from gemma_encoder.report.runs import RunFiles, read_jsonl, read_probabilities

POINTS = 200  # of a risk–coverage curve
COLUMNS = (
    "examples",
    "calibration error",
    "noise floor",
    "Brier score",
    "log loss",
    "area under risk",
)
NOTE = (
    f"Calibration error: the expected one, with {calibration.BINS} bins of equal width. Noise "
    "floor: its mean and its 95th percentile if the probabilities were right, by simulation; an "
    "error above the percentile is significant. Reliability: dots are bins, shaded bars the "
    "central 95 % of frequencies if the probabilities are right, columns the number of texts; dots "
    "below the diagonal mean overconfidence. Risk: the share of wrong decisions among the most "
    "confident texts, those that --abstain_below answers."
)


def calibration_section(run: RunFiles, several: bool) -> str:
    """Returns measures, reliability and risk–coverage plots of each task with probabilities."""
    parts = []
    for task, split in task_splits(run):
        if not calibration.has_probabilities(task):
            continue
        path = pathlib.Path(prediction_file(run.workdir / FOLDER, task.name, split))
        lines = read_jsonl(path)
        labels = [task.kind.read_label(line) for line in lines]
        if not lines or any(task.is_unlabeled(label) for label in labels):
            continue
        outputs = read_probabilities(lines)
        parts.append(f"<h3>{html_text(titled(run, several, task.name, split))}</h3>")
        parts.append(_measures(task, split, outputs, labels))
        parts.append(f'<div class="plots">{_plots(task, outputs, labels)}</div>')
    if not parts:
        return ""
    return "".join([*parts, f'<p class="muted">{html_text(NOTE)}</p>'])


def _measures(task: Task, split: str, outputs: np.ndarray, labels: Sequence[Label]) -> str:
    values = calibration.quality(task, outputs, labels)
    floor = f"{values.floor.mean:.3f} (95 %: {values.floor.high:.3f})"
    row = [
        values.examples,
        f"{values.calibration_error:.3f}",
        floor,
        f"{values.brier:.3f}",
        f"{values.log_loss:.3f}",
        f"{values.area_under_risk:.3f}",
    ]
    return html_table(COLUMNS, [row]) + f"<p>{html_text(_origin(task, split))}</p>"


def _origin(task: Task, split: str) -> str:
    """Describes the calibration that the newest checkpoint holds."""
    fitted = task.calibration
    if not fitted.is_fitted:
        return "Not calibrated: gemma-encoder evaluate --calibrate fits a temperature."
    text = f"The checkpoint's calibration: {fitted.describe(task.kind)}."
    if split in fitted.split.split(" and "):
        return f"{text} These are the examples it was fitted on: on others, errors are larger."
    return f"{text} It is in these probabilities if they were evaluated after it was fitted."


def _plots(task: Task, outputs: np.ndarray, labels: Sequence[Label]) -> str:
    bins = calibration.reliability(*task.kind.events(task, outputs, labels))
    x_label, y_label = "probability of the decision", "share of right decisions"
    if not task.kind.one_class:
        x_label, y_label = "probability of a class", "share of texts with the class"
    reliability = plots.reliability_plot(f"{task.name}: reliability", bins, x_label, y_label)
    coverage, risk = calibration.risk_coverage(
        task.kind.confidence(task, outputs), task.kind.is_right(task, outputs, labels)
    )
    shown = np.unique(np.linspace(0, len(risk) - 1, POINTS).round().astype(int))
    points = list(zip(coverage[shown].tolist(), risk[shown].tolist(), strict=True))
    curve = plots.line_plot(
        f"{task.name}: risk and coverage",
        {task.name: points},
        "share of wrong decisions",
        {task.name: 0},
        "coverage: share of texts answered, the most confident first",
    )
    return reliability + curve
