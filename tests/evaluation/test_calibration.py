"""Calibration on generated data with known probabilities, and against scikit-learn."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.evaluation import calibration, metrics
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import cumulative_logits
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.uncertainty import Calibration

KINDS = ("classification", "ordinal", "multi_label")
CLASSES = ("a", "b", "c", "d")


def make_task(kind, classes=CLASSES, **fields):
    return Task("t", kind, Template("{x}"), classes=classes, **fields)


def scaled(task, temperature):
    return dataclasses.replace(task, calibration=Calibration(temperature))


def generate(kind, count, temperature=1.0, classes=CLASSES, seed=0):
    """Draws labels from the probabilities of scores, and returns the scores times `temperature`.

    Ordinal scores are returned unscaled, with labels drawn at that temperature.
    """
    rng = np.random.default_rng(seed)
    task = make_task(kind, classes)
    scores = rng.normal(0, 2, (count, task.num_outputs))
    drawn_at = temperature if task.num_outputs < len(classes) else 1.0
    outputs = task.kind.postprocess(scaled(task, drawn_at), scores)
    if task.kind.one_class:
        labels = (rng.random((count, 1)) > np.cumsum(outputs, axis=1)).sum(axis=1)
        labels = np.minimum(labels, len(classes) - 1).astype(float).tolist()
    else:
        labels = [tuple(np.flatnonzero(row)) for row in rng.random(outputs.shape) < outputs]
    return task, np.float32(scores * temperature / drawn_at), labels


# --- Temperature ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_fitted_temperature_is_within_5_percent(kind, temperature):
    task, scores, labels = generate(kind, 10_000, temperature)
    fitted = calibration.fit_temperature(task, scores, labels)
    # The standard error is about 2 % at this number of examples.
    assert fitted == pytest.approx(temperature, rel=0.05)


def test_two_classes_have_a_temperature():
    task, scores, labels = generate("classification", 10_000, 1.7, ("no", "yes"))
    assert calibration.fit_temperature(task, scores, labels) == pytest.approx(1.7, rel=0.05)


def test_scores_beyond_the_range_of_float32_are_fitted():
    task, scores, labels = generate("classification", 10_000, 30.0)
    assert calibration.fit_temperature(task, scores, labels) == pytest.approx(30, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_that_are_all_right_leave_it_at_1(kind):
    task = make_task(kind)
    scores = np.random.default_rng(0).normal(0, 2, (50, task.num_outputs)).astype(np.float32)
    outputs = task.kind.postprocess(task, scores)
    if task.kind.one_class:
        labels = task.kind.decide(task, outputs).tolist()
    else:
        labels = [tuple(np.flatnonzero(row >= 0.5)) for row in outputs]
    assert calibration.fit_temperature(task, scores, labels) is None
    assert calibration.calibrate(task, "validation", scores, labels, 7).temperature == 1


def test_uninformative_scores_leave_it_at_1():
    task, scores, _ = generate("classification", 500)
    labels = (3 - scores.argmax(axis=1)).tolist()  # worse than chance
    assert calibration.fit_temperature(task, scores, labels) is None


@pytest.mark.parametrize("kind", KINDS)
@given(temperature=st.floats(0.05, 20))
def test_decisions_do_not_depend_on_the_temperature(kind, temperature):
    task, scores, _ = generate(kind, 200)
    plain = task.kind.postprocess(task, scores)
    divided = task.kind.postprocess(scaled(task, temperature), scores)
    assert divided.dtype == np.float32
    if task.kind.one_class:
        decided = task.kind.decide(task, divided)
        np.testing.assert_array_equal(decided, task.kind.decide(task, plain))
    else:
        np.testing.assert_array_equal(divided >= 0.5, plain >= 0.5)


def test_temperature_1_leaves_the_bits_unchanged():
    scores = np.random.default_rng(0).normal(0, 5, (500, 4)).astype(np.float32)
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    task = make_task("classification")
    np.testing.assert_array_equal(
        task.kind.postprocess(scaled(task, 1.0), scores),
        shifted / shifted.sum(axis=-1, keepdims=True),
    )
    task = make_task("multi_label")
    np.testing.assert_array_equal(
        task.kind.postprocess(scaled(task, 1.0), scores), np.exp(-np.logaddexp(0, -scores))
    )
    task = make_task("ordinal")
    above = np.exp(-np.logaddexp(0, -cumulative_logits(scores[:, :3])))
    np.testing.assert_array_equal(
        task.kind.postprocess(scaled(task, 1.0), scores[:, :3])[:, 0], -(above[:, 0] - 1)
    )


# --- Calibration error, Brier score, log loss ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [100, 2000])
def test_a_calibrated_model_is_near_its_noise_floor(kind, count):
    errors = []
    for seed in range(20):
        task, scores, labels = generate(kind, count, seed=seed)
        probabilities, outcomes = task.kind.events(
            task, task.kind.postprocess(task, scores), labels
        )
        errors.append(calibration.expected_calibration_error(probabilities, outcomes))
    floor = calibration.noise_floor(probabilities)
    # The mean of 20 errors has a standard error of about 6 %.
    assert np.mean(errors) == pytest.approx(floor.mean, rel=0.2)
    assert floor.mean < floor.high
    assert np.mean(np.array(errors) > floor.high) <= 0.25  # 5 of 20, expected 1


def test_an_overconfident_model_is_above_its_noise_floor():
    task, scores, labels = generate("classification", 2000, 2.5)
    before = calibration.quality(task, task.kind.postprocess(task, scores), labels)
    assert before.calibration_error > 2 * before.floor.high
    fitted = dataclasses.replace(
        task, calibration=calibration.calibrate(task, "validation", scores, labels, 1)
    )
    after = calibration.quality(fitted, task.kind.postprocess(fitted, scores), labels)
    assert after.calibration_error < after.floor.high
    assert after.log_loss < before.log_loss and after.brier < before.brier


def test_the_calibration_error_by_hand():
    # Bins of width 1/2: |0.25 - 0.5| for two events, |0.8 - 1| for one.
    error = calibration.expected_calibration_error([0.2, 0.3, 0.8], [True, False, True], 2)
    assert error == pytest.approx((2 * 0.25 + 0.2) / 3)
    low, high = calibration.reliability(np.array([0.2, 0.3, 0.8]), [True, False, True], 2)
    assert (low.count, low.probability, low.frequency) == (2, 0.25, 0.5)
    assert (high.low, high.high, high.count, high.frequency) == (0.5, 1.0, 1, 1.0)


def test_a_probability_of_1_is_in_the_last_bin():
    (only,) = calibration.reliability(np.ones(3), np.array([True, True, False]))
    assert (only.count, only.high) == (3, 1.0) and only.frequency == pytest.approx(2 / 3)
    assert calibration.noise_floor(np.ones(3)) == (0.0, 0.0)


@pytest.mark.parametrize("classes", [("no", "yes"), CLASSES])
def test_brier_score_and_log_loss_equal_scikit_learns(classes):
    task, scores, labels = generate("classification", 300, 2.0, classes)
    outputs = task.kind.postprocess(task, scores).astype(float)
    names = range(len(classes))
    used = outputs[:, 1] if len(classes) == 2 else outputs
    assert calibration.brier_score(task, outputs, labels) == pytest.approx(
        sklearn.metrics.brier_score_loss(labels, used, labels=list(names)), rel=1e-6
    )
    assert calibration.log_loss(task, outputs, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, outputs, labels=list(names)), rel=1e-5
    )


def test_several_labels_are_scored_class_by_class():
    task, scores, labels = generate("multi_label", 300)
    outputs = task.kind.postprocess(task, scores).astype(float)
    truth = task.kind.metric_labels(task, labels)
    briers = [sklearn.metrics.brier_score_loss(truth[:, i], outputs[:, i]) for i in range(4)]
    losses = [sklearn.metrics.log_loss(truth[:, i], outputs[:, i]) for i in range(4)]
    assert calibration.brier_score(task, outputs, labels) == pytest.approx(np.mean(briers))
    assert calibration.log_loss(task, outputs, labels) == pytest.approx(np.sum(losses), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_measures_of_probabilities_are_metrics(kind):
    """They read probabilities, which a temperature changes, in place of decisions."""
    names = ("brier_score", "calibration_error", "log_loss")
    of_kind = Task("t", kind, Template("{x}"), names, classes=("a", "b", "c"))
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (60, of_kind.num_outputs)).astype(np.float32)
    labels = [(0, 2) if kind == "multi_label" else float(i % 3) for i in range(60)]
    examples = ExampleTable()
    for label in labels:
        examples.add(Example({"x": "x"}, label))
    warm = dataclasses.replace(of_kind, calibration=Calibration(2.0))
    values = [
        metrics.compute_metrics(at, at.kind.postprocess(at, scores), examples)
        for at in (of_kind, warm)
    ]
    expected = calibration.quality(warm, warm.kind.postprocess(warm, scores), labels)
    assert values[1] == {
        "brier_score": expected.brier,
        "calibration_error": expected.calibration_error,
        "log_loss": expected.log_loss,
    }
    assert values[0]["log_loss"] > values[1]["log_loss"]  # these labels are random
    assert all(metrics.lowest_is_best(name) for name in names)


# --- Risk and coverage ---


def test_risk_and_coverage_by_hand():
    coverage, risk = calibration.risk_coverage([0.6, 0.9, 0.8], [False, True, False])
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 2 / 3])
    assert calibration.area_under_risk([0.6, 0.9, 0.8], [False, True, False]) == pytest.approx(
        (0 + 1 / 2 + 2 / 3) / 3
    )


@given(st.permutations([True, True, False, False, True]))
def test_equal_confidences_have_the_overall_risk(is_right):
    _, risk = calibration.risk_coverage(np.full(5, 0.7), np.array(is_right))
    np.testing.assert_allclose(risk, 0.4)


# --- Conformal prediction ---


def is_within_binomial_bounds(covered, level):
    """Returns True unless the share is outside the central 99.9 % of a binomial distribution."""
    low, high = scipy.stats.binom.interval(0.999, len(covered), level)
    return low <= np.sum(covered) <= high


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_conformal_sets_cover_at_their_level(kind, level, temperature):
    covered = []
    for seed in range(20):  # splits: a single threshold has its own error
        task, scores, labels = generate(kind, 1200, temperature, seed=seed)
        fitted = dataclasses.replace(
            task,
            calibration=calibration.calibrate(task, "validation", scores[:999], labels[:999], 1),
        )
        outputs = task.kind.postprocess(fitted, scores[999:])
        sets = fitted.conformal(outputs, level)["prediction_set"]
        for members, label in zip(sets, labels[999:], strict=True):
            true = label if isinstance(label, tuple) else (int(label),)
            covered.append({CLASSES[i] for i in true} <= set(members))
    if kind == "multi_label":  # texts without a class are covered by any set: at least the level
        assert np.mean(covered) >= scipy.stats.binom.ppf(0.001, len(covered), level) / len(covered)
    else:
        assert is_within_binomial_bounds(covered, level)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_conformal_intervals_cover_at_their_level(level):
    task = Task("t", "regression", Template("{x}"), label_range=(0.0, 10.0))
    covered = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.random((1200, 1)).astype(np.float32)
        labels = (10 * scores[:, 0] + rng.standard_t(3, 1200)).tolist()
        fitted = dataclasses.replace(
            task,
            calibration=calibration.calibrate(task, "validation", scores[:999], labels[:999], 1),
        )
        assert fitted.temperature == 1
        ends = fitted.conformal(task.kind.postprocess(fitted, scores[999:]), level)
        covered += ((ends["low"] <= labels[999:]) & (labels[999:] <= ends["high"])).tolist()
    assert is_within_binomial_bounds(covered, level)


@pytest.mark.parametrize(
    ("count", "level", "rank"), [(9, 0.9, 9), (10, 0.8, 9), (99, 0.95, 95), (4, 0.8, 4)]
)
def test_the_threshold_is_a_rank_of_the_scores(count, level, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert calibration.conformal_threshold(scores, level) == rank


def test_a_level_needs_enough_examples():
    assert calibration.conformal_threshold(np.zeros(8), 0.9) is None
    task, scores, labels = generate("classification", 8)
    fitted = calibration.calibrate(task, "validation", scores, labels, 1)
    restored = Calibration(**json.loads(json.dumps(dataclasses.asdict(fitted))))
    with pytest.raises(InputError, match="0.9 needs at least 9 examples.* on 8 of validation"):
        restored.threshold(0.9)
    assert math.isfinite(restored.threshold(0.8))


@pytest.mark.parametrize("kind", ["ranking", "choice", "language_model"])
def test_other_kinds_have_nothing_to_calibrate(kind):
    task = Task("t", kind, Template("{query} {document}"))
    assert not calibration.can_calibrate(task)
    with pytest.raises(InputError, match="has nothing to calibrate"):
        calibration.calibrate(task, "validation", np.zeros((3, 2)), [0, 1, 0], 1)
