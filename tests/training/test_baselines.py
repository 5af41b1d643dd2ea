"""Constants of the training labels, and the initial bias of regression heads."""

import types

import jax
import numpy as np
import pytest

from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model import sharding
from gemma_encoder.model.config import HeadConfig
from gemma_encoder.training import baselines, loop
from gemma_encoder.training.build import build
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.weights import native


def regression(name="t", head="", label_range=(0.0, 10.0)):
    return Task(name, "regression", Template("{x}"), label_range=label_range, head=head)


def source(task, labels):
    return MemorySource(
        task, DataOptions(), lambda split: [[Example({"x": "y"}, label)] for label in labels]
    )


def test_constants_fit_the_training_labels_best():
    classes = Task("c", "classification", Template("{x}"), classes=("a", "b"))
    several = Task("m", "multi_label", Template("{x}"), classes=("a", "b"))
    sources = [
        source(classes, [0, 1, 1, 1]),
        source(several, [(0, 1), (0,)]),
        source(regression(), [2.0, 5.0]),
    ]
    assert baselines.best_constants(sources) == {
        "c": [0.25, 0.75],
        "m": [1.0, 0.5],
        "t": pytest.approx(3.5),
    }


def test_a_large_split_is_sampled_over_its_length():
    """Sorted by label, the first records alone would give a mean near 0."""
    labels = np.linspace(0, 10, 3 * baselines.SAMPLE).tolist()
    of_split = source(regression(), labels)
    sample = baselines.training_labels(of_split)
    assert len(sample) == baselines.SAMPLE
    assert np.mean(sample) == pytest.approx(5, abs=0.05)
    assert sample == baselines.training_labels(of_split)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(InputError, match="train record 2: target 11 is out of range"):
        baselines.best_constants([source(regression(), [1.0, 11.0])])


def test_an_evaluated_task_has_the_constant_of_its_head():
    mnli = Task("mnli", "classification", Template("{x}"), classes=("a", "b"))
    ax = Task("ax", "classification", Template("{x}"), classes=("a", "b"), head="mnli")
    other = Task("other", "classification", Template("{x}"), classes=("a", "b"))
    values = baselines.constants_of((ax, mnli, other), (mnli,), {"mnli": [0.1, 0.9]})
    assert values == {"ax": [0.1, 0.9], "mnli": [0.1, 0.9]}


def with_targets(micro, tmp_path, targets, **changes):
    path = tmp_path / "train.jsonl"
    lines = [f'{{"text": "text {i}", "label": {value}}}\n' for i, value in enumerate(targets)]
    path.write_text("".join(lines))
    return micro(
        tasks=("own",),
        own__kind="regression",
        own__train=str(path),
        own__validation=str(path),
        own__label_range=(0.0, 5.0),
        train_for="2 steps",
        **changes,
    )


def head(parameters, name="own"):
    return jax.tree.map(np.asarray, parameters["heads"][name]["out"])


def initialized(config):
    trainer = Trainer(
        build(config, for_training=True), sharding.make_mesh(config.mesh), total=2, warmup=0
    )
    trainer.initialize()
    return trainer


def test_training_starts_at_the_mean_target(micro, tmp_path):
    trainer = initialized(with_targets(micro, tmp_path, [3, 4, 5, 5]))
    assert head(trainer.state.parameters)["bias"] == pytest.approx(4.25 / 5)
    values = trainer.evaluate().metrics["own"]
    # Every prediction is the mean.
    assert values["mae"] == pytest.approx(0.75, abs=1e-4)
    assert values["r2"] == pytest.approx(0, abs=1e-4)


def test_each_head_of_a_mixture_starts_at_its_own_mean():
    tasks = (
        regression("low"),
        regression("high", label_range=(0.0, 100.0)),
        regression("also_low", head="low"),
    )

    encoder = types.SimpleNamespace(heads={name: HeadConfig(1) for name in ("low", "high")})
    rates = np.array([0.5, 0.2, 0.3])
    constants = {"low": 2.0, "high": 90.0, "also_low": 4.0}
    values = baselines.head_constants(tasks, rates, constants, encoder)
    assert values["heads/low/out/bias"] == pytest.approx((0.5 * 0.2 + 0.3 * 0.4) / 0.8)
    assert values["heads/high/out/bias"] == pytest.approx(0.9)


def test_a_rounded_mean_stays_in_the_range():
    task = regression(label_range=(0.0, 0.1))
    constants = baselines.best_constants([source(task, [0.1, 0.1, 0.1])])
    assert constants["t"] > 0.1  # the mean of three is rounded up
    assert task.kind.initial_score(task, constants["t"]) == 1


def test_a_restored_head_keeps_its_bias(micro, tmp_path):
    config = with_targets(micro, tmp_path, [3, 4, 5, 5])
    outcome = loop.train(config, tmp_path / "run")
    spec = native.load_inference_spec(outcome.checkpoint)
    trained = head(native.load_parameters(outcome.checkpoint, spec.encoder))
    warm = with_targets(micro, tmp_path, [0, 0, 0, 1], model__warm_start=str(tmp_path / "run"))
    started = head(initialized(warm).state.parameters)
    np.testing.assert_array_equal(started["bias"], trained["bias"])
    np.testing.assert_array_equal(started["kernel"], trained["kernel"])


def test_other_heads_start_as_before(micro):
    trainer = initialized(micro(tasks=("toy_sentiment", "toy_ranking")))
    for name in ("toy_sentiment", "toy_ranking"):
        start = head(trainer.state.parameters, name)
        assert not start["bias"].any() and start["kernel"].any()


def test_a_checkpoint_records_constants_and_details(micro, tmp_path):
    config = with_targets(
        micro,
        tmp_path,
        [3, 4, 5, 5],
        best_metric="own/mae",
        evaluate_every="1 steps",
        checkpoint_every="1 steps",
    )
    outcome = loop.train(config, tmp_path / "run")
    logged = [line["mae"] for line in read_metrics(tmp_path / "run") if "mae" in line]
    assert len(logged) == 2 and outcome.best[1] == min(logged)
    record = native.load_inference_spec(outcome.checkpoint).record
    assert record["constants"] == {"own": 4.25}
    stored = record["details"]["own"]["validation"]
    assert stored["chance"]["mae"] == pytest.approx(0.75)
    assert stored["metrics"] == pytest.approx(outcome.metrics["own"])
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    config.own.validation = str(other)
    (predictions,) = loop.evaluate(config, tmp_path / "run").predictions["own"]
    assert predictions.constant == 4.25  # of the training labels, not of the new file's
