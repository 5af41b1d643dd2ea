"""The calibration section of a report: its measures, plots and origin, from files only."""

import dataclasses
import re

import numpy as np
import pytest

from gemma_encoder import report
from gemma_encoder.evaluation import calibration
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.report import plots
from tests.test_report import Page, write_run

CLASSES = ("low", "middle", "high")


def predict(kind, count=200, calibrated=False):
    """Returns predictions of a task whose scores are twice too large."""
    rng = np.random.default_rng(0)
    task = Task(f"{kind}_task", kind, Template("{text}"), classes=CLASSES)
    scores = rng.normal(0, 1, (count, task.num_outputs)).astype(np.float32)
    outputs = task.kind.postprocess(task, scores)
    if task.kind.one_class:
        labels = (rng.random((count, 1)) > np.cumsum(outputs, axis=1)[:, :-1]).sum(axis=1)
        labels = labels.astype(float).tolist()
    else:
        labels = [tuple(map(int, np.flatnonzero(row))) for row in rng.random((count, 3)) < outputs]
    table = ExampleTable()
    for label in labels:
        table.add(Example({"text": "x"}, label))
    scores *= 2
    if calibrated:
        fitted = calibration.calibrate(task, "validation", scores, labels, 20)
        task = dataclasses.replace(task, calibration=fitted)
    return Predictions(task, "validation", task.kind.postprocess(task, scores), table)


def section(tmp_path, *predictions):
    """Returns the text of the section, and the page's markup of it."""
    markup = report.render_report([write_run(tmp_path / "run", predictions)])
    inside = markup.split("<h2>Calibration</h2>")[1].split("</section>")[0]
    return Page(inside).text, inside


@pytest.mark.parametrize("kind", ["classification", "ordinal", "multi_label"])
def test_it_shows_measures_and_plots(tmp_path, kind):
    predictions = predict(kind)
    text, markup = section(tmp_path, predictions)
    values = calibration.quality(
        predictions.task, predictions.outputs.astype(float), predictions.table.labels
    )
    for value in (values.calibration_error, values.floor.mean, values.brier, values.log_loss):
        assert f"{value:.3f}" in text
    assert "Not calibrated: gemma-encoder evaluate --calibrate" in text
    assert markup.count("<svg") == 2
    assert "reliability" in text and "risk and coverage" in text


def test_it_names_what_a_calibration_was_fitted_on(tmp_path):
    text, _ = section(tmp_path, predict("classification", calibrated=True))
    assert "fitted on 200 examples of validation at step 20" in text
    assert "These are the examples it was fitted on" in text


def test_other_kinds_and_unlabeled_splits_have_none(tmp_path):
    unlabeled = predict("classification")
    unlabeled.table.labels[:] = [-1.0] * 200
    page = report.render_report([write_run(tmp_path / "run", [unlabeled])])
    assert "<h2>Calibration</h2>" not in page


def test_a_reliability_plot_has_a_dot_for_each_bin():
    bins = calibration.reliability(np.array([0.1, 0.5, 0.5, 1.0]), np.array([0, 1, 0, 1]), 10)
    plot = plots.reliability_plot("title", bins, "x", "y")
    assert plot.count("<circle") == 3 and plot.count("<rect") == 6
    heights = [float(value) for value in re.findall(r'cy="([\d.]+)"', plot)]
    assert heights == sorted(heights, reverse=True)
