"""Uncertain predictions: what fits which kind, what is refused, and what files hold."""

import dataclasses
import json

import numpy as np
import pytest

from gemma_encoder import predict_file as bulk
from gemma_encoder.evaluation.certainty import Certainty, is_abstention
from gemma_encoder.evaluation.columns import prediction_records
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.uncertainty import Calibration
from tests.test_predict_file import TEXTS, Interruption, interrupt, read, write

CALIBRATION = Calibration(2.0, (0.6,) * 49 + (None,), "validation", 60, 20)


def make_task(kind):
    has_classes = kind in ("classification", "ordinal", "multi_label")
    classes = ("a", "b", "c") if has_classes else ()
    has_calibration = has_classes or kind in ("regression",)
    calibration = CALIBRATION if has_calibration else Calibration()
    return Task("t", kind, Template("{query} {document}"), classes=classes, calibration=calibration)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"abstain_below": 0.0}, "classification", "expected a probability above 0"),
        ({"abstain_below": 1.5}, "classification", "expected a probability above 0"),
        ({"abstain_below": float("nan")}, "classification", "expected a probability above 0"),
        ({"abstain_below": 0.5}, "regression", "of kind regression has no probabilities"),
        ({"abstain_below": 0.5}, "ranking", "of kind ranking has no probabilities"),
        ({"abstain_below": 0.5}, "choice", "of kind choice has no probabilities"),
        ({"abstain_below": 0.5}, "language_model", "of kind language_model has no probabilities"),
        ({"conformal": 0.9}, "ranking", "has no conformal predictions"),
        ({"conformal": 0.99}, "classification", "needs at least 99 examples"),
        ({"conformal": 0.3}, "classification", "expected a whole percentage"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, kind, message):
    with pytest.raises(InputError, match=message):
        Certainty(**options).check(make_task(kind))


@pytest.mark.parametrize(
    ("kind", "output", "answered"),
    [
        ("classification", [0.2, 0.1, 0.7], "c"),
        ("classification", [0.4, 0.3, 0.3], None),
        ("ordinal", [0.2, 0.6, 0.2], "b"),
        ("ordinal", [0.4, 0.2, 0.4], None),
        ("multi_label", [0.1, 0.2, 0.9], ["c"]),
        ("multi_label", [0.1, 0.2, 0.1], []),  # surely no class: an answer
        ("multi_label", [0.1, 0.55, 0.9], None),
    ],
)
def test_uncertain_predictions_are_null(kind, output, answered):
    task = make_task(kind)
    certainty = Certainty(abstain_below=0.6)
    certainty.check(task)
    (record,) = prediction_records(task, np.array([output]), certainty)
    assert record["prediction"] == answered and len(record["probabilities"]) == 3
    assert is_abstention(record) == (answered is None)


# --- Files ---


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(bulk, "TEXTS_PER_CHUNK", 5)


@pytest.fixture(scope="module")
def calibrated(predictor):
    """Returns the predictor with tasks that are calibrated on 60 examples, thresholds at 0.6."""
    tasks = [
        dataclasses.replace(task, calibration=CALIBRATION) if task.kind.conformal_columns else task
        for task in predictor.spec.tasks
    ]
    return Predictor(dataclasses.replace(predictor.spec, tasks=tuple(tasks)), predictor.parameters)


def middle_confidence(predictor, task):
    """Returns a probability below which a third of the predictions of TEXTS are."""
    return float(np.quantile(predictor.predict(TEXTS, task.name).max(axis=1), 1 / 3))


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_uncertain_predictions_of_a_file_are_null(calibrated, tmp_path, caplog, target):
    task = calibrated.task("toy_sentiment")
    bound = middle_confidence(calibrated, task)
    bulk.predict_file(
        calibrated,
        task,
        write(tmp_path, "a.csv"),
        tmp_path / target,
        certainty=Certainty(abstain_below=bound),
    )
    rows = read(tmp_path / target)
    outputs = calibrated.predict(TEXTS, task.name)
    expected = [task.classes[row.argmax()] if row.max() >= bound else None for row in outputs]
    assert [row["prediction"] or None for row in rows] == expected
    np.testing.assert_allclose(  # probabilities are written for all texts
        [float(row["probability_positive"]) for row in rows], outputs[:, 1], atol=1e-6
    )
    count = expected.count(None)
    assert 0 < count < len(TEXTS)
    assert f"{count} of {len(TEXTS)} predictions are null" in caplog.text


@pytest.mark.parametrize("target", ["o.csv", "o.parquet"])
def test_all_predictions_may_be_null(calibrated, tmp_path, caplog, target):
    task = calibrated.task("toy_sentiment")
    source = write(tmp_path, "a.csv")
    bulk.predict_file(
        calibrated, task, source, tmp_path / target, certainty=Certainty(abstain_below=1.0)
    )
    assert not any(row["prediction"] for row in read(tmp_path / target))
    assert f"{len(TEXTS)} of {len(TEXTS)} predictions are null" in caplog.text


def test_a_chunk_of_nulls_does_not_decide_a_type(calibrated, tmp_path):
    task = calibrated.task("toy_sentiment")
    outputs = calibrated.predict(TEXTS, task.name)
    order = outputs.max(axis=1).argsort()  # the least certain first, all in one chunk
    source = tmp_path / "a.txt"
    source.write_text("".join(f"{TEXTS[i]}\n" for i in order))
    certainty = Certainty(abstain_below=float(np.sort(outputs.max(axis=1))[8]))
    bulk.predict_file(calibrated, task, source, tmp_path / "o.parquet", certainty=certainty)
    predictions = [row["prediction"] for row in read(tmp_path / "o.parquet")]
    assert predictions[:5] == [None] * 5 and predictions[-1] in task.classes


def test_nulls_are_counted_over_an_interruption(calibrated, tmp_path, monkeypatch, caplog):
    task = calibrated.task("toy_sentiment")
    source = write(tmp_path, "a.csv")
    certainty = Certainty(abstain_below=1.0)
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        interrupt(calibrated, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(calibrated, task, source, output, certainty=certainty)
    with pytest.raises(InputError, match=r"another command \(abstain_below: 1.0 -> None\)"):
        bulk.predict_file(calibrated, task, source, output)
    bulk.predict_file(calibrated, task, source, output, certainty=certainty)
    assert f"{len(TEXTS)} of {len(TEXTS)} predictions are null" in caplog.text


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_conformal_sets_are_a_column(calibrated, tmp_path, target):
    task = calibrated.task("toy_sentiment")
    bulk.predict_file(
        calibrated, task, write(tmp_path, "a.csv"), tmp_path / target, certainty=Certainty(0.9)
    )
    sets = [row["prediction_set"] for row in read(tmp_path / target)]
    if target.endswith(".csv"):
        sets = [json.loads(value) for value in sets]
    outputs = calibrated.predict(TEXTS, task.name)
    assert sets == [
        [name for name, p in zip(task.classes, row, strict=True) if p >= 0.4] for row in outputs
    ]


def test_conformal_intervals_are_columns(calibrated, tmp_path):
    task = calibrated.task("toy_similarity")
    (tmp_path / "p.csv").write_text("first,second\none .,two .\nthree .,four .\n")
    columns = ("first", "second")
    output = tmp_path / "o.jsonl"
    bulk.predict_file(
        calibrated, task, tmp_path / "p.csv", output, columns, certainty=Certainty(0.9)
    )
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert row["low"] == pytest.approx(row["prediction"] - 0.6)
        assert row["high"] == pytest.approx(row["prediction"] + 0.6)


def test_an_uncalibrated_checkpoint_has_no_sets(predictor, tmp_path, caplog):
    task = predictor.task("toy_sentiment")
    source = write(tmp_path, "a.csv")
    with pytest.raises(InputError, match="holds no conformal calibration; .* --calibrate"):
        bulk.predict_file(predictor, task, source, certainty=Certainty(0.9))
    bulk.predict_file(predictor, task, source, certainty=Certainty(abstain_below=0.5))
    assert "'toy_sentiment' is not calibrated" in caplog.text


def test_a_repeated_column_cannot_hide_a_conformal_one(calibrated, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"sentence": "good .", "prediction_set": 1}\n')
    with pytest.raises(InputError, match="--keep=prediction_set: .* the output's own column"):
        bulk.predict_file(
            calibrated,
            calibrated.task("toy_sentiment"),
            source,
            keep=("prediction_set",),
            certainty=Certainty(0.9),
        )


def test_blank_texts_are_not_counted_as_uncertain(calibrated, tmp_path, caplog):
    source = tmp_path / "a.txt"
    source.write_text("good .\n\nbad .\n")
    task = calibrated.task("toy_sentiment")
    certainty = Certainty(0.9, abstain_below=0.01)
    output = tmp_path / "o.jsonl"
    bulk.predict_file(calibrated, task, source, output, blank="null", certainty=certainty)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prediction_set"] is None for row in rows] == [False, True, False]
    assert "0 of 3 predictions are null: their probability is below 0.01" in caplog.text
