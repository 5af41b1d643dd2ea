"""Scores of each class against scikit-learn's report and values computed by hand."""

import numpy as np
import pytest
import sklearn.metrics

from gemma_encoder.evaluation import class_scores
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from tests.evaluation.conftest import one_hot, table, task

CLASSES = ("a", "b", "c")


def of_kind(kind, classes=CLASSES):
    return Task("t", kind, Template("{x}"), classes=classes)


@pytest.mark.parametrize("kind", ["classification", "ordinal"])
def test_scores_equal_those_of_scikit_learn(kind):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    predictions = np.where(rng.random(50) < 0.6, labels, rng.integers(0, 2, 50))
    rows = class_scores.class_scores(of_kind(kind), np.eye(3)[predictions], table(labels))
    report = sklearn.metrics.classification_report(
        labels, predictions, target_names=CLASSES, output_dict=True, zero_division=0.0
    )
    for row in rows:
        expected = report[row["class"]]
        for name in ("precision", "recall"):
            assert row[name] == pytest.approx(expected[name], abs=1e-6)
        assert row["f1"] == pytest.approx(expected["f1-score"], abs=1e-6)
        assert row["support"] == expected["support"]


def test_several_classes_at_once_are_scored_by_hand():
    examples = ExampleTable()
    for label in ((0, 1), (0,), ()):
        examples.add(Example({"x": "x"}, label))
    outputs = np.array([[0.9, 0.2, 0.1], [0.8, 0.7, 0.1], [0.1, 0.1, 0.6]])
    rows = class_scores.class_scores(of_kind("multi_label"), outputs, examples)
    assert [tuple(row.values()) for row in rows] == [
        ("a", 1.0, 1.0, 1.0, 2),
        ("b", 0.0, 0.0, 0.0, 1),
        ("c", 0.0, 0.0, 0.0, 0),
    ]


def test_a_class_without_examples_has_a_row():
    rows = class_scores.class_scores(of_kind("classification"), np.eye(3)[[0, 0]], table([0, 1]))
    assert [row["support"] for row in rows] == [1, 1, 0]
    assert [row["class"] for row in rows] == list(CLASSES)


def test_there_are_none_without_classes_or_labels():
    regression = task("regression", ("mae",))
    assert class_scores.class_scores(regression, np.ones(2), table([0, 1])) == []
    unlabeled = task("classification", ("accuracy",))
    assert class_scores.class_scores(unlabeled, one_hot([0, 1]), table([-1, -1])) == []


def test_of_many_classes_the_worst_are_shown():
    count = 1000
    labels = np.arange(count).repeat(2)
    predictions = labels.copy()
    predictions[2 * 17] = 3  # one of two examples of class 17
    predictions[[2 * 400, 2 * 400 + 1]] = 5  # both of class 400
    names = tuple(f"class {index}" for index in range(count))
    rows = class_scores.class_scores(
        of_kind("classification", names), np.eye(count)[predictions], table(labels)
    )
    shown = class_scores.selected_classes(rows)
    assert len(rows) == count and len(shown) == class_scores.SHOWN
    assert [row["class"] for row in shown[:3]] == ["class 400", "class 5", "class 17"]
    assert class_scores.others_note(count) == "the 20 of lowest F1; 980 more"
    assert class_scores.format_scores(shown[:1]) == [("class 400", "0.000", "0.000", "0.000", "2")]


def test_names_of_classes_stay_on_their_line():
    made = of_kind("classification", ("two\nlines", "b"))
    rows = class_scores.class_scores(made, np.eye(2), table([0, 1]))
    assert [row[0] for row in class_scores.format_scores(rows)] == ["two lines", "b"]
