"""Calibrating a checkpoint: stored whole or not at all, used later, never for new weights."""

import json
import os
import re
import shutil

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.cli import evaluate as program
from gemma_encoder.cli import inspect
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import calibrate, loop
from gemma_encoder.weights import native

CONFIG = {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, micro):
    """Trains the toy tasks for a few steps; returns the workdir, which tests must not change."""
    CONFIG["config"] = micro()
    workdir = tmp_path_factory.mktemp("trained")
    loop.train(CONFIG["config"], workdir)
    return workdir


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory):
    """Returns a calibrated copy of the workdir, and the evaluation that calibrated it."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("calibrated") / "run")
    return workdir, loop.evaluate(CONFIG["config"], workdir, calibrate=True)


@pytest.fixture
def own_copy(calibrated, tmp_path):
    return shutil.copytree(calibrated[0], tmp_path / "run")


def inference_json(workdir):
    return native.find(workdir) / "inference" / "inference.json"


def test_it_is_stored_with_its_origin(trained, calibrated):
    workdir, outcome = calibrated
    tasks = {task.name: task for task in native.load_inference_spec(native.find(workdir)).tasks}
    stored = tasks["toy_sentiment"].calibration
    count = len(outcome.predictions["toy_sentiment"][0].table.labels)
    assert (stored.split, stored.examples, stored.step) == ("validation", count, 4)
    assert stored.temperature != 1 and len(stored.thresholds) == 50
    assert tasks["toy_similarity"].calibration.temperature == 1
    assert tasks["toy_similarity"].calibration.is_fitted
    assert not tasks["toy_ranking"].calibration.is_fitted
    # Nothing else of the file changed.
    before = json.loads(inference_json(trained).read_text())
    after = json.loads(inference_json(workdir).read_text())
    for task in after["tasks"]:
        task.pop("calibration", None)
    assert after == before
    assert sorted(os.listdir(inference_json(workdir).parent)) == sorted(
        os.listdir(inference_json(trained).parent)
    )


def test_the_user_reads_what_was_fitted(calibrated):
    notes = "\n".join(calibrated[1].notes)
    assert "calibrated toy_sentiment: temperature " in notes
    assert "noise floor" in notes and "log loss" in notes
    assert "calibrated toy_similarity: " in notes
    assert "not calibrated: toy_ranking: a ranking task has neither" in notes


def test_later_evaluations_and_predictions_use_it(trained, calibrated):
    workdir, first = calibrated
    again = loop.evaluate(CONFIG["config"], workdir)
    plain = loop.evaluate(CONFIG["config"], trained)
    for outcome in (first, again):
        assert outcome.metrics == plain.metrics  # accuracy and correlations do not change
        assert outcome.predictions["toy_sentiment"][0].task.temperature != 1
    outputs = {
        name: outcome.predictions["toy_sentiment"][0].outputs
        for name, outcome in {"first": first, "again": again, "plain": plain}.items()
    }
    np.testing.assert_array_equal(outputs["first"], outputs["again"])
    assert np.abs(outputs["again"] - outputs["plain"]).max() > 1e-4
    texts = again.predictions["toy_sentiment"][0].table.fields[:5]
    np.testing.assert_allclose(
        ge.Predictor.load(workdir).predict(texts, "toy_sentiment"), outputs["again"][:5], atol=1e-5
    )


def test_inspect_shows_it_with_its_origin(trained, calibrated, capsys):
    assert inspect.main([str(calibrated[0])]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"calibration toy_sentiment: temperature [\d.]+, conformal levels 0.5 to 0.\d+; fitted on "
        r"\d+ examples of validation at step 4\n",
        shown,
    )
    assert "calibration toy_ranking" not in shown
    assert inspect.main([str(trained)]) == 0
    assert "calibration toy_sentiment: none\n" in capsys.readouterr().out


def test_calibrating_twice_fits_the_same(own_copy):
    before = inference_json(own_copy).read_text()
    loop.evaluate(CONFIG["config"], own_copy, calibrate=True)
    assert inference_json(own_copy).read_text() == before


def test_another_split_is_evaluated_with_it(own_copy, changed, micro):
    config = changed(micro(), {"evaluate_split": "test"})
    outcome = loop.evaluate(config, own_copy, calibrate=True)
    predictions = outcome.predictions["toy_sentiment"][0]
    assert predictions.split == "test"
    assert predictions.task.calibration.split == "validation"


def test_a_killed_write_leaves_the_checkpoint_readable(trained, tmp_path, monkeypatch):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = inference_json(workdir).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.evaluate(CONFIG["config"], workdir, calibrate=True)
    assert inference_json(workdir).read_bytes() == before
    native.load_inference_spec(native.find(workdir))


def test_further_training_drops_it_and_says_so(own_copy, changed, micro, caplog):
    config = changed(micro(), {"train_for": "6 steps"})
    (own_copy / "config.json").unlink()  # a longer run is another config
    with caplog.at_level("WARNING"):
        loop.train(config, own_copy)
    assert "the calibration of toy_sentiment, toy_similarity belongs to step 4" in caplog.text
    new = native.load_inference_spec(native.find(own_copy))
    assert new.step == 6
    assert not any(task.calibration.is_fitted for task in new.tasks)
    old = native.load_inference_spec(native.find(own_copy).parent / "4")
    assert any(task.calibration.is_fitted for task in old.tasks)


def test_a_config_without_such_tasks_is_refused(own_copy, changed, micro):
    config = changed(micro(), {"tasks": ("toy_ranking",)})
    before = inference_json(own_copy).read_bytes()
    with pytest.raises(InputError, match="--calibrate: no task can be calibrated; .*toy_ranking"):
        loop.evaluate(config, own_copy, calibrate=True)
    assert inference_json(own_copy).read_bytes() == before


def test_a_task_without_validation_is_left_out(trained):
    recipe = loop.build(CONFIG["config"])
    for source in recipe.sources:
        source.splits = ("train", "test")
    with pytest.raises(InputError, match="toy_sentiment: it has no validation split"):
        calibrate._calibratable(recipe.sources, {task.name for task in recipe.tasks})


def test_the_flag_is_passed_on(monkeypatch, trained):
    passed = {}

    def evaluate(config, workdir, **options):
        passed.update(options)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr("gemma_encoder.cli.summary.summarize", lambda *_: 0)
    arguments = ["--config=quickstart:smoke", f"--workdir={trained}"]
    expected = {"calibrate": True, "quantization": None, "compute_dtype": None}
    assert program.main([*arguments, "--calibrate"]) == 0 and passed == expected
    assert program.main(arguments) == 0 and passed == expected | {"calibrate": False}
