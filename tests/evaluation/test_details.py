"""Chance values of each metric, and the file of an evaluation's details."""

import json

import numpy as np
import pytest

from gemma_encoder.evaluation import details
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from tests.evaluation.conftest import one_hot, table, task


def predicted(of_task, outputs, examples, constant=None):
    return Predictions(of_task, "validation", outputs, examples, constant=constant)


def test_the_majority_of_the_training_labels_is_scored():
    of_task = task("classification", ("accuracy", "macro_f1", "f1", "matthews_correlation"))
    examples = table([0, 0, 0, 1])
    outputs = one_hot([0, 0, 1, 1])
    # The training labels are mostly of class 1, unlike the evaluated ones.
    assert details.chance_of(predicted(of_task, outputs, examples, [0.2, 0.8])) == {
        "accuracy": 0.25,
        "macro_f1": pytest.approx(0.2),
        "f1": pytest.approx(0.4),
        "matthews_correlation": 0.0,
    }
    without = details.chance_of(predicted(of_task, outputs, examples))
    assert without["accuracy"] == 0.75 and without["f1"] == 0.0


def test_the_mean_of_the_training_targets_is_scored():
    of_task = task("regression", ("pearson", "mae", "rmse", "r2"), label_range=(0.0, 5.0))
    examples = table([1, 3])
    chance = details.chance_of(predicted(of_task, np.array([1.0, 2.0]), examples, 3.0))
    assert chance == {"pearson": 0.0, "mae": 1.0, "rmse": pytest.approx(2**0.5), "r2": -1.0}


def test_a_random_option_is_right_once_in_as_many_as_there_are():
    infos = [
        {"option": text, "answers": ["the dog"]} for text in ("dog", "cat", "cow", "a dog", "hen")
    ]
    examples = table([1, 0, 0, 1, 0], queries=["1", "1", "1", "2", "2"], infos=infos)
    of_task = task("choice", ("accuracy", "exact_match", "token_f1"))
    expected = pytest.approx((1 / 3 + 1 / 2) / 2)
    values = details.chance_of(predicted(of_task, np.zeros(5), examples))
    assert values == dict.fromkeys(("accuracy", "exact_match", "token_f1"), expected)


def test_classes_at_once_are_scored_by_their_frequencies():
    of_task = Task("t", "multi_label", Template("{x}"), classes=("a", "b"))
    examples = ExampleTable()
    for label in ((0,), (0, 1), (0,)):
        examples.add(Example({"x": "x"}, label))
    values = details.chance_of(predicted(of_task, np.zeros((3, 2)), examples, [0.9, 0.1]))
    # Class a is always predicted, and has an F1 of 1; class b has 0.
    assert values["micro_f1"] == pytest.approx(2 * 3 / (3 + 4)) and values["macro_f1"] == 0.5


def test_a_declared_value_counts_where_none_is_computed():
    declared = task("classification", ("accuracy",), chance=0.9)
    values = details.chance_of(predicted(declared, one_hot([0, 1]), table([0, 1])))
    assert values == {"accuracy": 0.5}


def ranked(first_stage):
    """Two queries of four candidates: one relevant at rank 2 of the first stage, and none."""
    of_task = task("ranking", ("mrr@10", "recall@100"), chance=0.9)
    examples = table(
        [0, 1, 0, 0, 0, 0, 0, 0],
        queries=["q"] * 4 + ["r"] * 4,
        documents=["a", "b", "c", "d"] * 2,
    )
    scores = np.array([0, 9, 0, 0, 0, 0, 0, 0], np.float32)
    return Predictions(of_task, "validation", scores, examples, first_stage=first_stage)


def test_ranking_has_a_random_order_and_a_first_stage():
    """All are means over both queries, of which the second counts as zero."""
    predictions = ranked(first_stage=True)
    values = details.describe(predictions, 1, predictions.metrics())
    assert values["metrics"] == {"mrr@10": 0.5, "recall@100": 0.5}
    expected = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4 / 2
    assert values["chance"] == {"mrr@10": pytest.approx(expected), "recall@100": 0.5}
    assert values["first_stage"] == {"mrr@10": 0.25, "recall@100": 0.5}


INTERVALS = [
    (task("classification", ("accuracy", "f1")), one_hot([1] * 80), table([1] * 80)),
    (task("regression", ("pearson",), label_range=(0.0, 5.0)), np.arange(80.0) % 5, None),
    (task("ordinal", ("accuracy",), classes=("a", "b")), one_hot([1] * 80), table([1] * 80)),
]


@pytest.mark.parametrize(("of_task", "outputs", "examples"), INTERVALS)
def test_perfect_predictions_have_an_interval(of_task, outputs, examples):
    predictions = predicted(of_task, outputs, examples or table(outputs.tolist()))
    values = details.describe(predictions, 1, predictions.metrics())
    assert set(values["intervals"]) == set(of_task.metrics)
    for name, (low, high) in values["intervals"].items():
        assert values["metrics"][name] == pytest.approx(1) and high == 1
        assert 0.9 < low < 0.975
    assert details.intervals_of(predicted(of_task, outputs, table([-1] * 80))) == {}


def test_an_interval_of_ranking_is_over_queries():
    low, high = details.intervals_of(ranked(first_stage=False))["mrr@10"]
    assert low < 0.1 and high > 0.9  # two queries
    task_of_texts = task("language_model", ("perplexity",))
    assert details.intervals_of(predicted(task_of_texts, np.ones((2, 2)), table([0, 0]))) == {}


def test_without_a_first_stage_there_is_no_value_of_it():
    assert details.first_stage_of(ranked(first_stage=False)) == {}
    of_task = task("classification", ("accuracy",))
    assert details.first_stage_of(predicted(of_task, one_hot([0, 1]), table([0, 1]))) == {}


def test_there_is_no_chance_without_labels():
    of_task = task("classification", ("accuracy",), chance=0.5)
    assert details.chance_of(predicted(of_task, one_hot([0, 1]), table([-1, -1]), [1, 0])) == {}


def test_the_file_is_of_its_step(tmp_path):
    of_task = task("classification", ("accuracy",))
    predictions = predicted(of_task, one_hot([0, 1]), table([0, 0]), [0.75, 0.25])
    values = details.describe(predictions, 7, predictions.metrics())
    details.write_details(tmp_path, "t", "validation", values)
    stored = json.loads((tmp_path / "t.validation.metrics.json").read_text())
    assert stored["metrics"] == {"accuracy": 0.5} and stored["chance"] == {"accuracy": 1.0}
    assert stored["chance_from"] == "training labels" and stored["examples"] == 2
    assert stored["classes"][0] == {
        "class": "a",
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3, abs=1e-6),
        "support": 2,
    }
    assert details.read_details(tmp_path, "t", "validation", 7) == stored
    assert details.read_details(tmp_path, "t", "validation", 8) == {}
    assert details.read_details(tmp_path, "t", "test", 7) == {}


def test_errors_are_shown_in_any_unit():
    assert details.format_metric("mae", 8.4521e-6) == "8.45e-06"
    assert details.format_metric("rmse_matched", 0.5) == "0.500"
    assert details.format_metric("accuracy", 0.0001) == "0.000"
    assert details.format_metric("mine", float("nan")) == "undefined"
    assert details.format_bounds("mae", [1e-6, 2e-6]) == "1e-06 to 2e-06"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1e-5), (1.7e9, 1.7e9 + 100)])
def test_targets_of_any_size_are_exact(low, high):
    of_task = task("regression", ("mae",), label_range=(low, high))
    scores = np.linspace(0, 1, 11, dtype=np.float32)
    labels = [low + (high - low) * index / 10 for index in range(11)]
    examples = table(labels)
    outputs = of_task.kind.postprocess(of_task, scores[:, None])
    span = high - low
    predictions = predicted(of_task, outputs, examples, of_task.kind.baseline(of_task, labels))
    values = details.describe(predictions, 1, predictions.metrics())
    assert values["metrics"]["mae"] == pytest.approx(0, abs=1e-5 * span)
    assert values["chance"]["mae"] == pytest.approx(3 / 11 * span, rel=1e-3)
    assert values["intervals"]["mae"][1] <= 1e-5 * span


def test_intervals_are_computed_once(monkeypatch):
    predictions = predicted(task("regression", ("mae",)), np.array([1.0, 2.0]), table([1.0, 3.0]))
    first = details.intervals_of(predictions)
    monkeypatch.setattr(details, "units_of_examples", None)
    assert details.intervals_of(predictions) is first
