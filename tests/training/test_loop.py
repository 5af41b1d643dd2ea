"""Whole runs: metrics and files, exact resume after a kill, and errors that lose nothing."""

import json
import re

import jax
import numpy as np
import pytest

from gemma_encoder import activity
from gemma_encoder.data import registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.tasks import toy_text
from gemma_encoder.evaluation import details
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.training import loop
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.workdir import claim_workdir
from gemma_encoder.weights import native


class Killed(BaseException):
    """Simulates SIGKILL, which no handler sees."""


@pytest.fixture
def kill_after(monkeypatch):
    """`kill_after(n)` kills the loop when it requests batch n + 1; None disables the kill."""
    original = loop.TrainStream.__next__
    state = {"left": None}

    def counted(self):
        if state["left"] is not None:
            if state["left"] == 0:
                raise Killed
            state["left"] -= 1
        return original(self)

    monkeypatch.setattr(loop.TrainStream, "__next__", counted)
    return lambda n: state.update(left=n)


def train_lines(workdir):
    """Returns the training lines of the log without timings."""
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "waiting" not in k}
        for line in read_metrics(workdir)
        if line["split"] == "train"
    ]


def test_a_run_leaves_metrics_predictions_and_a_checkpoint(micro, tmp_path):
    outcome = loop.train(micro(), tmp_path)
    assert outcome.step == 4 and outcome.checkpoint == native.find(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [2, 4]
    assert all(
        {"loss", "toy_sentiment/loss", "toy_similarity/loss", "toy_ranking/loss", "learning_rate"}
        <= line.keys()
        for line in train
    )
    final = {
        line["task"]: line for line in lines if line["split"] == "validation" and line["step"] == 4
    }
    assert final["toy_sentiment"]["accuracy"] == outcome.metrics["toy_sentiment"]["accuracy"]
    assert {"mrr@10", "ndcg@10"} <= final["toy_ranking"].keys()
    assert {"spearman", "pearson"} <= final["toy_similarity"].keys()
    assert final["toy_ranking"]["examples"] == 240  # 24 queries of ten documents
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [
        "digests.json",
        "toy_ranking.validation.metrics.json",
        "toy_ranking.validation.qrels",
        "toy_ranking.validation.queries.jsonl",
        "toy_ranking.validation.trec",
        "toy_ranking.validation.tsv",
        "toy_sentiment.validation.jsonl",
        "toy_sentiment.validation.metrics.json",
        "toy_sentiment.validation.mistakes.jsonl",
        "toy_similarity.validation.jsonl",
        "toy_similarity.validation.metrics.json",
        "toy_similarity.validation.mistakes.jsonl",
    ]
    assert list((tmp_path / "tensorboard").iterdir())
    # With no step left, it returns the same metrics and adds no line.
    again = loop.train(micro(), tmp_path)
    assert again.metrics == outcome.metrics
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines)
    evaluated = loop.evaluate(micro(), tmp_path)
    assert evaluated.metrics == outcome.metrics


def test_truncated_texts_are_counted_and_told(micro, tmp_path, capsys, caplog):
    """The first line says so early, the last one about the whole run; and the log has the share."""
    fields = {"max_length": 12, "max_eval_examples": 8, "log_every": "1 steps"}
    loop.train(micro(**fields), tmp_path / "short")
    shown = capsys.readouterr().err
    message = r"(\d+) of (\d+) {} \(\d+\.\d%\) exceed max_length=12 tokens and were truncated"
    [(early, before)] = re.findall(message.format("training texts so far"), shown)
    [(truncated, texts)] = re.findall(message.format("training texts"), shown)
    assert 0 < int(early) <= int(truncated) < int(texts) and int(before) < int(texts)
    assert re.search(
        r"toy_ranking: \d+ of \d+ texts of validation exceed max_length=12 tokens", caplog.text
    )
    loop.train(micro(**fields | {"max_length": 64}), tmp_path / "long")
    assert "truncated" not in capsys.readouterr().err


def test_a_run_says_what_it_compiles(micro, tmp_path, capsys):
    config = micro(tasks=("toy_sentiment",), max_eval_examples=4, train_for="2 steps")
    loop.train(config, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("compiling the training step …") == 1
    assert lines.count("compiling the evaluation …") == 1
    loop.evaluate(config, tmp_path)  # names it only if it takes long
    assert "compiling the evaluation …\n" not in capsys.readouterr().err


def test_computing_metrics_is_named_as_evaluating(micro, tmp_path, monkeypatch):
    """Intervals and metrics of large splits take long after their last batch."""
    names = []
    describe = details.describe

    def described(*arguments):
        names.append(str(activity.current()._activities[-1]))
        return describe(*arguments)

    monkeypatch.setattr(details, "describe", described)
    loop.train(micro(tasks=("toy_sentiment",), max_eval_examples=4, train_for="1 steps"), tmp_path)
    assert names == ["evaluating toy_sentiment on validation"]


def test_killed_and_resumed_equals_straight_to_the_bit(micro, tmp_path, kill_after, background):
    """Checkpoints are written in the background; tests/test_main.py tests the other case."""
    config = micro(
        train_for="16 steps",
        log_every="1 steps",
        checkpoint_every="4 steps",
        evaluate_every="8 steps",
        max_eval_examples=8,
        model__attention_dropout=0.1,
    )
    straight = loop.train(config, tmp_path / "straight")
    kill_after(10)  # between the checkpoints of steps 8 and 12: steps 9 and 10 are repeated
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "killed")
    killed_lines = train_lines(tmp_path / "killed")
    assert killed_lines[-1]["step"] in (9, 10)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "spl')  # a line that the kill truncated
    kill_after(None)
    resumed = loop.train(config, tmp_path / "killed")
    assert train_lines(tmp_path / "straight") == train_lines(tmp_path / "killed")
    assert [line["step"] for line in train_lines(tmp_path / "killed")] == list(range(1, 17))
    assert straight.metrics == resumed.metrics
    checkpoints = [outcome.checkpoint for outcome in (straight, resumed)]
    parameters = [
        native.load_parameters(path, native.load_inference_spec(path).encoder)
        for path in checkpoints
    ]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, parameters))


def test_a_workdir_of_another_config_is_refused_and_left_alone(micro, tmp_path):
    claim_workdir(tmp_path, TrainConfig.from_config_dict(micro()))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "file").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"holds a run of another config.*optimizer.learning_rate: 0.002 -> 0.5"
    ):
        loop.train(micro(optimizer__learning_rate=0.5), tmp_path)
    # Fields of logging and devices may change.
    again = micro(log_every="1 steps", mesh=(1, -1, 1), early_stopping__patience=2)
    claim_workdir(tmp_path, TrainConfig.from_config_dict(again))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_tokenizer_that_changed_is_refused(micro, tmp_path, monkeypatch):
    model = tmp_path / "my.model"
    model.write_bytes(Tokenizer.load("small").model)
    config = micro(tasks=("toy_sentiment",), tokenizer=str(model), train_for="1 steps")
    loop.train(config, tmp_path / "run")
    # Still a valid model, with an additional empty field.
    model.write_bytes(model.read_bytes() + b"\x1a\x00")
    with pytest.raises(
        InputError, match=r"my.model is not the tokenizer that the run in .* was started with"
    ):
        loop.train(config, tmp_path / "run")


def test_an_unwritable_workdir_is_refused(micro, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        loop.train(micro(), tmp_path / "file" / "workdir")


def test_rows_must_fit_the_mesh(micro, tmp_path):
    with pytest.raises(InputError, match="batch.rows=6 must be a multiple of data x fsdp = 8"):
        loop.train(micro(batch__rows=6), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(micro, tmp_path):
    with pytest.raises(
        InputError, match=r"the loss of step \d+ is (nan|inf).*lower optimizer.learning_rate"
    ):
        loop.train(
            micro(
                optimizer__learning_rate=1e30,
                optimizer__clip_norm=0.0,
                warmup="0",
                train_for="6 steps",
            ),
            tmp_path,
        )


def test_evaluation_needs_a_checkpoint_trained_on_the_task(micro, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint to evaluate"):
        loop.evaluate(micro(), tmp_path)
    loop.train(micro(tasks=("toy_sentiment",), train_for="1 steps"), tmp_path)
    with pytest.raises(
        InputError, match="was not trained on 'toy_ranking'; it was trained on toy_sentiment"
    ):
        loop.evaluate(micro(tasks=("toy_ranking",)), tmp_path)
    (tmp_path / "predictions").rename(tmp_path / "moved")
    (tmp_path / "predictions").write_text("")
    with pytest.raises(InputError, match="the evaluation of .* failed: .*predictions'; free disk"):
        loop.evaluate(micro(tasks=("toy_sentiment",)), tmp_path)


def test_a_workdir_may_be_a_relative_path(micro, tmp_path, monkeypatch):
    from gemma_encoder.inference import Predictor

    monkeypatch.chdir(tmp_path)
    config = micro(tasks=("toy_sentiment",), train_for="1 steps")
    outcome = loop.train(config, "runs/here")
    assert loop.evaluate(config, "runs/here").metrics == outcome.metrics
    assert Predictor.load("runs/here").predict(["a fine film ."]).shape == (1, 2)


def test_only_the_newest_checkpoints_remain(micro, tmp_path):
    loop.train(
        micro(tasks=("toy_sentiment",), checkpoint_every="1 steps", evaluate_every="0"), tmp_path
    )
    assert native.checkpoint_steps(tmp_path) == [3, 4]


def test_reader_states_are_saved_per_reader(micro, tmp_path):
    outcome = loop.train(
        micro(tasks=("toy_sentiment",), batch__readers=2, train_for="1 steps"), tmp_path
    )
    assert sorted(path.name for path in (outcome.checkpoint / "data").glob("reader_*")) == [
        "reader_00000",
        "reader_00001",
    ]
    assert Checkpoints(tmp_path).latest_step() == 1


def test_shuffled_labels_leave_a_model_at_chance(micro, tmp_path, monkeypatch):
    task = Task(
        "toy_shuffled",
        "classification",
        Template("{sentence}"),
        ("accuracy",),
        ("negative", "positive"),
        chance=0.5,
    )

    def records(split):
        rng = np.random.default_rng(0)
        rows = toy_text.sentiment(split, 400)
        labels = [label for _, label in rows]
        if split == "train":
            rng.shuffle(labels)
        return [[Example(fields, label)] for (fields, _), label in zip(rows, labels, strict=True)]

    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("toy_shuffled", lambda options: MemorySource(task, options, records))
    outcome = loop.train(
        micro(
            tasks=("toy_shuffled",), train_for="30 steps", max_train_examples=0, max_eval_examples=0
        ),
        tmp_path,
    )
    # 400 coin flips: three standard deviations are 0.075.
    assert abs(outcome.metrics["toy_shuffled"]["accuracy"] - 0.5) < 0.075
