"""Runs on small GLUE and SuperGLUE data: split parts, diagnostics, and multiple choice."""

import json

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.evaluation import leaderboards, submission
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.training.metrics_log import read_metrics

MIXTURE = ("glue_mnli", "glue_ax", "superglue_record", "superglue_rte", "superglue_axg")


def check_parts_are_scored_apart(outcome, workdir):
    """The parts of a split are scored as two separate runs on them would be."""
    by_split = {predictions.split: predictions for predictions in outcome.predictions["glue_mnli"]}
    for part in ("matched", "mismatched"):
        path = workdir / "predictions" / f"glue_mnli.validation_{part}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert outcome.metrics["glue_mnli"][f"accuracy_{part}"] == np.mean(
            [line["prediction"] == line["label"] for line in lines]
        )
        classes = by_split[f"validation_{part}"].outputs.argmax(axis=1)
        assert [line["prediction"] for line in lines] == list(classes)


def check_predictor_agrees(workdir, tested):
    """A predictor scores options as the evaluation did, and diagnostics by the shared head."""
    predictor = Predictor.load(workdir)
    for task in ("superglue_record", "superglue_axg"):
        predictions = tested.predictions[task][0]
        examples = predictions.table.fields[:10]
        np.testing.assert_allclose(
            predictor.predict(examples, task),
            predictions.outputs[: len(examples)],
            rtol=1e-4,
            atol=1e-5,
        )
    premises = [("a claim", "a premise")]
    np.testing.assert_array_equal(
        predictor.predict(premises, "superglue_axg"), predictor.predict(premises, "superglue_rte")
    )


def test_a_mixture_of_benchmarks_trains_evaluates_and_predicts(micro, benchmarks, tmp_path):
    config = micro(
        tasks=MIXTURE,
        train_for="2 steps",
        evaluate_every="100 percent",
        mixture__mixing="equal",
        batch__examples_per_step=16,
    )
    outcome = loop.train(config, tmp_path)
    assert {task: list(values) for task, values in outcome.metrics.items()} == {
        "glue_mnli": ["accuracy_matched", "accuracy_mismatched"],
        "superglue_record": ["token_f1", "exact_match"],
        "superglue_rte": ["accuracy"],
    }
    lines = read_metrics(tmp_path)
    (mnli,) = [line for line in lines if line.get("task") == "glue_mnli"]
    assert (
        mnli["split"] == "validation"
        and mnli["examples"] == 8
        and mnli["accuracy_mismatched"] == outcome.metrics["glue_mnli"]["accuracy_mismatched"]
    )
    train = [line for line in lines if line["split"] == "train"][-1]
    assert {"glue_mnli/loss", "superglue_record/loss"} <= train.keys()
    assert "glue_ax/loss" not in train
    check_parts_are_scored_apart(outcome, tmp_path)

    # Test splits: predictions for a submission; metrics only where labels are published.
    config.evaluate_split = "test"
    tested = loop.evaluate(config, tmp_path)
    assert {task: list(values) for task, values in tested.metrics.items()} == {
        task: [] for task in MIXTURE
    } | {"superglue_axg": ["accuracy", "gender_parity"]}
    assert [predictions.split for predictions in tested.predictions["glue_mnli"]] == [
        "test_matched",
        "test_mismatched",
    ]
    files = {
        file.task: file
        for file in leaderboards.BENCHMARKS["glue"] + leaderboards.BENCHMARKS["superglue"]
        if file.task in MIXTURE
    }
    for file in files.values():
        assert submission._prediction_paths(file, [tmp_path])
    check_predictor_agrees(tmp_path, tested)


CHOICE = Task(
    "toy_choice",
    "choice",
    Template("{question} {option}", truncation=("option",)),
    ("accuracy",),
    chance=1 / 3,
)


def test_a_choice_is_learned_from_lists(micro, tmp_path, monkeypatch):
    """The correct one of three options has a certain word; its position is random."""

    def records(split):
        rng = np.random.default_rng(len(split))
        lists = []
        for question in range(48):
            correct = int(rng.integers(3))
            options = []
            for i in range(3):
                word = "red" if i == correct else "blue"
                fields = {"question": f"question {question}", "option": f"a {word} box"}
                options.append(Example(fields, float(i == correct), f"q{question}", str(i)))
            lists.append(options)
        return lists

    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("toy_choice", lambda options: MemorySource(CHOICE, options, records))
    config = micro(
        tasks=("toy_choice",),
        train_for="20 steps",
        log_every="1 steps",
        max_train_examples=0,
        max_eval_examples=0,
        batch__examples_per_step=8,
    )
    outcome = loop.train(config, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path) if line["split"] == "train"]
    assert losses[-1] < losses[0] / 4
    assert outcome.metrics["toy_choice"]["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate_split": "validaton"},
            "unknown evaluate_split 'validaton'; did you mean 'validation",
        ),
        ({"tasks": ("glue", "glue_cola")}, "none twice"),
        ({"tasks": ("gleu",)}, "unknown task 'gleu'"),
        ({"tasks": ("glue_ax",)}, "unknown evaluate_split 'validation'.*test"),
        ({"losses__choice": "softmx"}, "unknown choice loss 'softmx'; did you mean 'softmax'"),
    ],
)
def test_unknown_names_are_refused(micro, benchmarks, changes, message):
    with pytest.raises(InputError, match=message):
        build(micro(**({"tasks": ("superglue_copa",)} | changes)))


def test_a_diagnostic_alone_cannot_be_trained(micro, benchmarks, tmp_path):
    with pytest.raises(
        InputError,
        match="'glue_ax' has no train split, and no other task trains its head 'glue_mnli'",
    ):
        loop.train(micro(tasks=("glue_sst2", "glue_ax")), tmp_path)


def test_whole_benchmarks_warn_of_tasks_not_trained(micro, benchmarks, caplog):
    built = build(micro(tasks=("glue", "superglue")))
    # AX, AX-b and AX-g have no head of their own.
    assert len(built.tasks) == 20 and len(built.encoder.heads) == 17
    # Eight records per task, ten of MultiRC, and 64 of SST-2 by max_train_examples.
    assert built.epoch() == 8 * 8 + 64 + 7 * 8 + 10
    assert "glue_ax has no train split and is only evaluated, by the head glue_mnli" in caplog.text
    assert (
        "superglue_axb has no validation split and is not evaluated; its splits, for "
        "--config.evaluate_split: test" in caplog.text
    )


def test_a_head_is_shared_by_equal_classes_only(micro, benchmarks, monkeypatch):
    conflicting = Task(
        "other",
        "classification",
        Template("{x}"),
        ("accuracy",),
        classes=("not_entailment", "entailment"),
        head="superglue_rte",
    )
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("other", lambda options: MemorySource(conflicting, options, lambda split: []))
    with pytest.raises(
        InputError, match="'superglue_rte' and 'other' cannot share the head 'superglue_rte'"
    ):
        build(micro(tasks=("superglue_rte", "other")))
