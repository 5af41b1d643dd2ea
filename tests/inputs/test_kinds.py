"""Kinds: the behavior of each, and a scan that no other module branches on a kind."""

import copy
import json
import pathlib
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Kind, cumulative_logits
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CLASSES = ("low", "middle", "high")
finite = st.floats(-30, 30, width=32)


def task(kind, **changes):
    classes = CLASSES if kinds.get(kind).has_classes else ()
    return Task("t", kind, Template("{x}"), classes=classes, **changes)


def every_task():
    return [task(name, label_range=(0.0, 5.0)) for name in kinds.names()]


# --- No branches on kinds elsewhere ---

NAMES = "|".join(kinds.names())
BRANCHES = (
    re.compile(r"(?<!\bhead)\.kind\s*(==|is\b)"),  # heads have kinds of their own
    re.compile(r"\b(task|own|options|owner)\.kind\s*(!=|\bin\b|\bnot in\b)"),
    re.compile(rf"\b(if|elif|while|and|or|not|else)\b[^#\n]*[\"']({NAMES})[\"']"),
    re.compile(rf"(==|!=)\s*[\"']({NAMES})[\"']"),
    re.compile(rf"[\"']({NAMES})[\"']\s*(==|!=)"),
)


def test_no_other_module_branches_on_a_kind():
    branches = []
    for folder in ("gemma_encoder", "experiments", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in ("kinds.py", "list_kinds.py"):
                continue
            of_index = path.parent.name == "retrieval"  # an index has a kind, too
            for index, line in enumerate(path.read_text().splitlines(), 1):
                patterns = BRANCHES[1:] if of_index else BRANCHES
                if any(pattern.search(line.split("#")[0]) for pattern in patterns):
                    branches.append(f"{path.relative_to(ROOT)}:{index}: {line.strip()}")
    assert not branches


@pytest.mark.parametrize(
    "line",
    [
        'if task.kind == "ranking":',
        'labels = 1 if own.kind in ("choice",) else 0',
        "if task.kind is ranking:",
        'x = a if kind == "regression" else b',
        'assert "ordinal" == kind',
    ],
)
def test_the_patterns_match_branches(line):
    assert any(pattern.search(line) for pattern in BRANCHES)


def test_a_kind_is_one_object():
    ranking = kinds.get("ranking")
    assert kinds.get(ranking) is ranking
    assert copy.deepcopy(ranking) is ranking
    assert pickle.loads(pickle.dumps(ranking)) is ranking
    assert str(ranking) == "ranking"


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(InputError, match="unknown task kind 'ordinall'; did you mean 'ordinal'"):
        kinds.get("ordinall")


def test_a_name_is_registered_once():
    class Again(Kind):
        name = "ranking"

    with pytest.raises(InputError, match="kind 'ranking' is already registered"):
        kinds.register(Again())


def test_every_kind_has_a_loss_and_metrics():
    from gemma_encoder.evaluation import metrics
    from gemma_encoder.model.heads import HEADS
    from gemma_encoder.training.losses import LOSSES

    for name in kinds.names():
        kind = kinds.get(name)
        assert kind.default_loss in LOSSES[name]
        assert kind.head in HEADS
        assert kind.default_metrics
        metrics.check_metrics(kind, kind.default_metrics)


# --- Outputs ---


@given(arrays.arrays(np.float32, (4, 3), elements=finite))
def test_probabilities_sum_to_one(scores):
    for name in ("classification", "ordinal"):
        of_kind = task(name)
        used = scores[:, : of_kind.num_outputs]
        outputs = of_kind.kind.postprocess(of_kind, used)
        assert outputs.shape == (4, 3)
        assert (outputs >= 0).all()
        np.testing.assert_allclose(outputs.sum(axis=-1), 1, atol=1e-6)  # float32 of a few terms


@given(arrays.arrays(np.float32, (5,), elements=finite))
def test_cumulative_logits_never_increase(scores):
    """Logits of P(class > k) decrease in k, strictly unless a gap is below float32 precision."""
    logits = cumulative_logits(scores)
    assert (np.diff(logits) <= 0).all()
    gaps = np.logaddexp(0, scores[1:].astype(np.float64))
    np.testing.assert_allclose(-np.diff(logits), gaps, rtol=1e-4, atol=1e-4)
    assert logits[2] == scores[0]  # the middle one


def test_the_first_ordinal_score_shifts_all_classes():
    ordinal = task("ordinal")
    outputs = [
        ordinal.kind.postprocess(ordinal, np.array([[score, 1.0]], np.float32))[0]
        for score in (-9.0, 0.5, 9.0)
    ]
    assert [int(ordinal.kind.decide(ordinal, row)) for row in outputs] == [0, 1, 2]
    expected = [float(row @ np.arange(3)) for row in outputs]
    assert expected == sorted(expected)


def test_the_median_class_has_the_least_expected_error():
    ordinal = task("ordinal")
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 200)
    distances = np.abs(np.arange(3)[:, None] - np.arange(3))
    expected = probabilities @ distances
    decided = ordinal.kind.decide(ordinal, probabilities)
    np.testing.assert_allclose(expected[np.arange(200), decided], expected.min(axis=1), atol=1e-12)


def test_multi_label_classes_are_decided_independently():
    multi_label = task("multi_label")
    outputs = multi_label.kind.postprocess(multi_label, np.array([[0.1, -0.1, 3.0]], np.float32))
    assert multi_label.kind.columns(multi_label, outputs)["prediction"] == [["low", "high"]]
    assert multi_label.kind.show(multi_label, outputs[0]) == "low 0.52, high 0.95"
    assert multi_label.kind.show(multi_label, np.zeros(3)) == "no class"


# --- Labels ---


@pytest.mark.parametrize("name", ["classification", "ordinal"])
@pytest.mark.parametrize("label", [-1, 3, 0.5, float("nan")])
def test_a_class_out_of_range_is_refused(name, label):
    with pytest.raises(InputError, match=r"task 't', record 3: label .* from 0 to 2 \(low, middle"):
        task(name).check_label(label, "record 3")


@pytest.mark.parametrize("label", [(0, 3), (-1,), (0.5,), 7.0])
def test_a_multi_label_class_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=r"task 't', record 3: label .* indices from 0 to 2"):
        task("multi_label").target(label, "record 3")


def test_a_multi_label_target_is_multi_hot():
    multi_label = task("multi_label")
    assert multi_label.target_width == 3
    label, vector = multi_label.target((0, 2), "x")
    assert label == 0.0
    np.testing.assert_array_equal(vector, [1, 0, 1])
    np.testing.assert_array_equal(multi_label.target((), "x")[1], [0, 0, 0])
    assert not multi_label.is_unlabeled(()) and multi_label.is_unlabeled(-1.0)


def test_kinds_with_classes_need_two_different_names():
    for name in kinds.names():
        kind = kinds.get(name)
        classes = ("a", "b")
        if kind.has_classes:
            for wrong in ((), ("a",), ("a", "a")):
                with pytest.raises(InputError, match=f"kind {name} names at least two classes"):
                    Task("t", name, Template("{x}"), classes=wrong)
        else:
            with pytest.raises(InputError, match=f"kind {name} has no classes"):
                Task("t", name, Template("{x}"), classes=classes)


def test_classes_read_from_a_file_are_ordered():
    classification = kinds.get("classification")
    ordinal = kinds.get("ordinal")
    assert classification.order_classes({"b", "a", "10"}, "f") == ("10", "a", "b")
    assert ordinal.order_classes({"10", "9", "1"}, "f") == ("1", "9", "10")
    with pytest.raises(InputError, match=r"f.csv: the order .* list them, lowest first"):
        ordinal.order_classes({"good", "bad"}, "f.csv")


# --- Prediction files ---


def an_output(of_kind, rng):
    scores = rng.standard_normal((6, of_kind.num_outputs)).astype(np.float32)
    if of_kind.kind.counts_tokens:  # counts are whole numbers
        scores = np.round(np.abs(scores) * 10) + 1
    return of_kind.kind.postprocess(of_kind, scores)


def labels_of(of_kind):
    if of_kind.kind.label_column == "classes":
        return [(), (0,), (1, 2), (0, 1, 2), (2,), (1,)]
    return [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", kinds.names())
def test_a_line_is_json_and_restores_prediction_and_label(name):
    of_kind = task(name, label_range=(0.0, 5.0))
    outputs = an_output(of_kind, np.random.default_rng(1))
    labels = labels_of(of_kind)
    decided = of_kind.kind.decide(of_kind, outputs)
    for index, label in enumerate(labels):
        line = of_kind.kind.line(of_kind, outputs[index], label)
        line = json.loads(json.dumps(line))
        # Probabilities are rounded to six digits.
        np.testing.assert_allclose(of_kind.kind.read_line(line), decided[index], atol=1e-6)
        if of_kind.kind.summarize_labels(of_kind, labels):
            assert of_kind.kind.read_label(line) == label


@pytest.mark.parametrize("name", kinds.names())
def test_mistakes_are_wrong_and_described(name):
    of_kind = task(name, label_range=(0.0, 5.0))
    outputs = an_output(of_kind, np.random.default_rng(2))
    labels = labels_of(of_kind)
    severity = of_kind.kind.severity(of_kind, outputs, labels)
    assert (severity is None) == (not of_kind.kind.mistake_measure)
    if severity is None:
        return
    truth = of_kind.kind.metric_labels(of_kind, labels)
    decided = of_kind.kind.decide(of_kind, outputs)
    if of_kind.target_width:
        decided = decided >= 0.5
    for index in range(6):
        wrong = bool(np.any(decided[index] != truth[index]))
        assert (severity[index] > -np.inf) == wrong
        line = of_kind.kind.line(of_kind, outputs[index], labels[index])
        assert all(isinstance(text, str) for text in of_kind.kind.mistake(of_kind, line))


@pytest.mark.parametrize("name", kinds.names())
def test_a_baseline_has_a_value_of_every_metric(name):
    from gemma_encoder.evaluation import metrics
    from gemma_encoder.inputs.task import Example, ExampleTable

    of_kind = task(name, label_range=(0.0, 5.0))
    table = ExampleTable()
    for label in labels_of(of_kind):
        table.add(Example({"x": "y"}, label, "q", "d"))
    values = metrics.baseline(of_kind, table)
    if of_kind.kind.is_list or of_kind.kind.counts_tokens:
        assert values == {}
    else:
        assert set(values) == set(of_kind.metrics)
    if name == "classification":
        assert values["accuracy"] == 0.5


def test_attributions_name_their_target():
    scores = np.array([0.1, 0.7, 0.2], np.float32)
    multi_label = task("multi_label")
    single_label = task("classification")
    weights, target, value = single_label.kind.direction(single_label, scores, None)
    assert (target, value) == ("middle", pytest.approx(0.7))
    np.testing.assert_allclose(weights, [-0.5, 1, -0.5])
    weights, target, _ = multi_label.kind.direction(multi_label, scores, "high")
    assert target == "high" and weights.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="did you mean 'high'"):
        single_label.kind.direction(single_label, scores, "hig")
    for name in ("regression", "ranking", "ordinal"):
        with pytest.raises(InputError, match="leave the target out"):
            task(name).kind.direction(task(name), scores, "high")


def test_a_kind_with_a_former_method_is_refused():
    class Old(kinds.Classification):
        name = "old"

        def is_unlabelled(self, task, label):
            return label == -5

    with pytest.raises(InputError, match="is_unlabelled is now is_unlabeled; rename it"):
        kinds.register(Old())
    assert "old" not in kinds.names()
