"""Whole runs on GLUE and SuperGLUE in small: parts of a split apart, diagnostics on another task's head, questions with options."""

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
    assert {
        "glue_mnli/loss",
        "superglue_record/loss",
    } <= train.keys() and "glue_ax/loss" not in train

    # The parts of a split are scored as two runs on them would be.
    predictions = {found.split: found for found in outcome.predictions["glue_mnli"]}
    for part in ("matched", "mismatched"):
        said = [
            json.loads(line)
            for line in (tmp_path / "predictions" / f"glue_mnli.validation_{part}.jsonl")
            .read_text()
            .splitlines()
        ]
        assert outcome.metrics["glue_mnli"][f"accuracy_{part}"] == np.mean(
            [line["prediction"] == line["label"] for line in said]
        )
        assert [line["prediction"] for line in said] == list(
            predictions[f"validation_{part}"].outputs.argmax(axis=1)
        )

    # Test splits: predictions for a submission, metrics only of the diagnostics whose labels are published.
    config.evaluate_split = "test"
    tested = loop.evaluate(config, tmp_path)
    assert {task: list(values) for task, values in tested.metrics.items()} == {
        task: [] for task in MIXTURE
    } | {"superglue_axg": ["accuracy", "gender_parity"]}
    assert [found.split for found in tested.predictions["glue_mnli"]] == [
        "test_matched",
        "test_mismatched",
    ]
    files = {
        file.task: file
        for file in leaderboards.BENCHMARKS["glue"] + leaderboards.BENCHMARKS["superglue"]
        if file.task in MIXTURE
    }
    for file in files.values():
        assert submission._find(file, [tmp_path])

    # A predictor scores each option as evaluation did, and diagnostics by the head that they share.
    predictor = Predictor.load(tmp_path)
    for task in ("superglue_record", "superglue_axg"):
        found = tested.predictions[task][0]
        shown = found.table.fields[:10]
        np.testing.assert_allclose(
            predictor.predict(shown, task), found.outputs[: len(shown)], rtol=1e-4, atol=1e-5
        )
    premises = [("a claim", "a premise")]
    np.testing.assert_array_equal(
        predictor.predict(premises, "superglue_axg"), predictor.predict(premises, "superglue_rte")
    )


CHOICE = Task(
    "toy_choice",
    "choice",
    Template("{question} {option}", truncation=("option",)),
    ("accuracy",),
    chance=1 / 3,
)


def test_a_choice_is_learnt_from_lists(micro, tmp_path, monkeypatch):
    """The right one of three options is the one with a certain word; its place is random."""

    def records(split):
        rng = np.random.default_rng(len(split))
        lists = []
        for number in range(48):
            right = int(rng.integers(3))
            words = ["red" if place == right else "blue" for place in range(3)]
            lists.append(
                [
                    Example(
                        {"question": f"question {number}", "option": f"a {w} box"},
                        float(w == "red"),
                        f"q{number}",
                        str(i),
                    )
                    for i, w in enumerate(words)
                ]
            )
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
def test_refusals(micro, benchmarks, changes, message):
    with pytest.raises(InputError, match=message):
        build(micro(**({"tasks": ("superglue_copa",)} | changes)))


def test_a_diagnostic_alone_cannot_be_trained(micro, benchmarks, tmp_path):
    with pytest.raises(
        InputError,
        match="'glue_ax' has no train split, and no other task trains its head 'glue_mnli'",
    ):
        loop.train(micro(tasks=("glue_sst2", "glue_ax")), tmp_path)


def test_whole_benchmarks_build_and_say_what_is_not_trained(micro, benchmarks, caplog):
    built = build(micro(tasks=("glue", "superglue")))
    assert (
        len(built.tasks) == 20 and len(built.encoder.heads) == 17
    )  # AX, AX-b and AX-g have no head of their own
    assert (
        built.epoch() == 8 * 8 + 64 + 7 * 8 + 10
    )  # eight records each, ten of MultiRC, and the 64 of SST-2 that max_train_examples takes
    assert "glue_ax has no train split and is only evaluated, by the head glue_mnli" in caplog.text
    assert (
        "superglue_axb has no validation split and is not evaluated; its splits, for --config.evaluate_split: test"
        in caplog.text
    )


def test_a_head_is_shared_by_equal_classes_only(micro, benchmarks, monkeypatch):
    other = Task(
        "other",
        "classification",
        Template("{x}"),
        ("accuracy",),
        classes=("not_entailment", "entailment"),
        head="superglue_rte",
    )
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("other", lambda options: MemorySource(other, options, lambda split: []))
    with pytest.raises(
        InputError, match="'superglue_rte' and 'other' cannot share the head 'superglue_rte'"
    ):
        build(micro(tasks=("superglue_rte", "other")))
