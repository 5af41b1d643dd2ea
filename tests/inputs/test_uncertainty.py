"""Stored calibrations: round trips, levels, refusals; confidences of decisions."""

import dataclasses
import json

import numpy as np
import pytest

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.uncertainty import LEVELS, NO_CALIBRATION, Calibration, check_level

TASK = Task("mood", "classification", Template("{text}"), classes=("sad", "calm", "glad"))
FITTED = Calibration(1.5, (*LEVELS[:-1], None), "validation", 60, 20)
CALIBRATED = dataclasses.replace(TASK, calibration=FITTED)


def test_a_calibrated_task_survives_json():
    restored = Task.from_dict(json.loads(json.dumps(CALIBRATED.to_dict())))
    assert restored == CALIBRATED and hash(restored) == hash(CALIBRATED)
    assert restored.uncalibrated() == TASK


def test_an_uncalibrated_task_is_described_as_before():
    description = TASK.to_dict()
    assert "calibration" not in description
    assert Task.from_dict(description).calibration == NO_CALIBRATION


@pytest.mark.parametrize(
    "damage", [{"temperature": 0}, {"temperature": float("nan")}, {"thresholds": [0.5]}, {"x": 1}]
)
def test_a_damaged_calibration_is_refused(damage):
    description = CALIBRATED.to_dict()
    description["calibration"] |= damage
    with pytest.raises(InputError, match="calibration"):
        Task.from_dict(description)


def test_levels_are_whole_percentages():
    assert [check_level(level) for level in (0.5, 0.57, 0.99)] == [0, 7, 49]
    for level in (0.49, 0.999, 1.0, 90, -0.5, 0.905, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected a whole percentage"):
            check_level(level)


def test_a_level_without_a_calibration_is_refused():
    with pytest.raises(InputError, match="task 'mood': the checkpoint holds no conformal"):
        TASK.check_conformal(0.9)
    with pytest.raises(InputError, match="task 'mood': .* 0.99 needs at least 99 examples"):
        CALIBRATED.check_conformal(0.99)
    with pytest.raises(InputError, match="kind ranking has no conformal predictions"):
        Task("r", "ranking", Template("{query} {document}")).check_conformal(0.9)


def test_sets_hold_the_probable_classes():
    outputs = np.array([[0.05, 0.15, 0.8], [0.3, 0.3, 0.4]], np.float32)
    assert CALIBRATED.conformal(outputs, 0.9) == {
        "prediction_set": [["calm", "glad"], ["sad", "calm", "glad"]]
    }
    assert CALIBRATED.conformal(outputs, 0.5) == {"prediction_set": [["glad"], []]}


def test_intervals_surround_the_predictions():
    task = Task(
        "size", "regression", Template("{text}"), label_range=(0.0, 5.0), calibration=FITTED
    )
    ends = task.conformal(np.array([1.0, 4.5], np.float32), 0.5)
    np.testing.assert_allclose((ends["low"], ends["high"]), ([0.5, 4.0], [1.5, 5.0]))


@pytest.mark.parametrize(
    ("kind", "outputs", "confidence"),
    [
        ("classification", [0.2, 0.1, 0.7], 0.7),
        ("ordinal", [0.4, 0.25, 0.35], 0.25),  # of the median class
        ("multi_label", [0.1, 0.2, 0.9], 0.8),  # the decision against the second class
    ],
)
def test_the_confidence_is_that_of_the_decision(kind, outputs, confidence):
    task = Task("t", kind, Template("{text}"), classes=("a", "b", "c"))
    assert task.kind.confidence(task, np.array([outputs]))[0] == pytest.approx(confidence)


@pytest.mark.parametrize("kind", ["regression", "ranking", "choice", "language_model"])
def test_kinds_without_probabilities_have_no_confidence(kind):
    task = Task("t", kind, Template("{text}"))
    assert task.kind.confidence(task, np.zeros((2, 2))) is None


def test_a_calibration_describes_its_origin():
    assert NO_CALIBRATION.describe(kinds.get("classification")) == ""
    assert FITTED.describe(kinds.get("classification")) == (
        "temperature 1.5, conformal levels 0.5 to 0.98; fitted on 60 examples of validation at "
        "step 20"
    )


def test_one_example_is_described_in_the_singular():
    thresholds = (0.5, *[None] * (len(LEVELS) - 1))
    one = Calibration(1.0, thresholds, "validation", 1, 2)
    assert one.describe(kinds.get("classification")) == (
        "temperature 1, conformal level 0.5; fitted on 1 example of validation at step 2"
    )
    assert "temperature" not in one.describe(kinds.get("regression"))
