"""Early stopping: counting, the end of a run, and resuming after interruptions."""

import os
import signal

import pytest

from gemma_encoder.evaluation import evaluator
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import loop
from gemma_encoder.training.early_stopping import Patience
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.weights import native

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "lowest", "min_delta", "stops_at"),
    [
        ([0.5, 0.6, 0.7, 0.8], False, 0.0, None),
        ([0.5, 0.6, 0.6, 0.6], False, 0.0, 4),  # equal is no improvement
        ([0.5, 0.4, 0.6, 0.5, 0.5], False, 0.0, 5),  # an improvement restarts the count
        ([5.0, 4.0, 4.5, 4.1, 3.0], True, 0.0, 4),
        ([0.5, 0.4], True, 0.0, None),
        ([0.5, 0.6, 0.7, 0.8], False, 0.25, 3),  # small gains do not add up within the patience
        ([0.5, 0.6, 0.8, 0.9, 1.1], False, 0.25, None),  # against the best, not the last
        ([NAN, NAN, 0.5], False, 0.0, 2),
        ([NAN, 0.5, NAN, 0.6], False, 0.0, None),
    ],
)
def test_patience(values, lowest, min_delta, stops_at):
    patience = Patience(2, min_delta, lowest)
    for step, value in enumerate(values, start=1):
        patience.add(step, value)
        if patience.is_exhausted:
            break
    assert (step if patience.is_exhausted else None) == stops_at


class Killed(BaseException):
    """Simulates SIGKILL, which no handler sees."""


class Kill(Hook):
    """Kills the run before a step."""

    def __init__(self, step):
        self.step = step

    def before_step(self, run, step):
        if step == self.step:
            raise Killed


@pytest.fixture
def accuracies(monkeypatch):
    """`accuracies({step: value})` sets the evaluated accuracy; returns the evaluated steps."""
    run = evaluator.Evaluator.run

    def give(values):
        steps = []

        def evaluated(self, parameters, step, write=None, *scored_before):
            evaluation = run(self, parameters, step)
            steps.append(step)
            evaluation.metrics["toy_sentiment"]["accuracy"] = values[step]
            if write is not None:
                write(step, "validation", evaluation.metrics["toy_sentiment"], "toy_sentiment")
            return evaluation

        monkeypatch.setattr(evaluator.Evaluator, "run", evaluated)
        return steps

    return give


def fields(**changes):
    return {
        "tasks": ("toy_sentiment",),
        "max_eval_examples": 4,
        "train_for": "12 steps",
        "log_every": "1 steps",
        "evaluate_every": "2 steps",
        "checkpoint_every": "3 steps",
        "early_stopping__patience": 2,
    } | changes


VALUES = {2: 0.7, 3: 0.1, 4: 0.6, 6: 0.65, 8: 0.1, 10: 0.1, 12: 0.1}


def untimed(workdir):
    """Returns the log lines of a run without timings."""
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "waiting" not in k}
        for line in read_metrics(workdir)
    ]


@pytest.fixture
def straight(micro, tmp_path, accuracies):
    """Workdir and result of an uninterrupted run that stopped early."""
    accuracies(VALUES)
    return tmp_path / "straight", loop.train(micro(**fields()), tmp_path / "straight")


def test_a_run_that_stopped_early_is_complete_and_stays_so(
    micro, straight, accuracies, monkeypatch, capsys
):
    workdir, outcome = straight
    reason = (
        "stopped early at step 6: 2 evaluations in a row did not improve toy_sentiment/accuracy "
        "on the best 0.7000 of step 2 by more than 0"
    )
    assert (outcome.step, outcome.preempted, outcome.stop_reason) == (6, False, reason)
    assert outcome.metrics == {"toy_sentiment": {"accuracy": 0.65}}
    assert outcome.checkpoint == native.find(workdir)
    assert native.checkpoint_steps(workdir) == [3, 6]
    lines = untimed(workdir)
    assert [line["step"] for line in lines if line["split"] == "validation"] == [2, 4, 6]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 7))
    assert outcome.predictions["toy_sentiment"]
    evaluated = accuracies(VALUES)
    monkeypatch.setattr(Trainer, "step", None)  # no step is taken
    again = loop.train(micro(**fields()), workdir)
    assert (again.step, again.metrics, again.stop_reason) == (6, outcome.metrics, reason)
    assert evaluated == [6] and reason in capsys.readouterr().err
    assert untimed(workdir) == lines and native.checkpoint_steps(workdir) == [3, 6]


def test_more_patience_resumes_the_run(micro, straight, accuracies):
    workdir, _ = straight
    accuracies(VALUES)
    outcome = loop.train(micro(**fields(early_stopping__patience=3)), workdir)
    assert outcome.step == 8 and "3 evaluations in a row" in outcome.stop_reason


def test_early_stopping_saves_the_last_step(micro, tmp_path, accuracies):
    accuracies({2: 0.7, 4: 0.6})
    outcome = loop.train(micro(**fields(early_stopping__patience=1, log_every="3 steps")), tmp_path)
    assert outcome.step == 4 and native.checkpoint_steps(tmp_path) == [3, 4]
    assert outcome.best == (4, 0.6)  # among the steps that were saved with a value
    assert [line["step"] for line in read_metrics(tmp_path) if line["split"] == "train"] == [3, 4]


def test_kills_and_extra_evaluations_change_nothing(micro, tmp_path, straight):
    """Killed before step 6, resumed from 3: step 4 is evaluated and counted again."""
    workdir = tmp_path / "killed"
    with pytest.raises(Killed):
        loop.train(micro(**fields()), workdir, hooks=[Kill(6)])
    assert native.checkpoint_steps(workdir) == [3]
    loop.evaluate(micro(**fields()), workdir)  # a line at step 3, where none was due
    assert [line["step"] for line in untimed(workdir) if line["split"] == "validation"] == [2, 3]
    outcome = loop.train(micro(**fields()), workdir)
    assert outcome.step == 6 and outcome.stop_reason == straight[1].stop_reason
    lines = untimed(workdir)
    due = [line for line in lines if (line["step"], line["split"]) != (3, "validation")]
    assert due == untimed(straight[0])


def test_preemption_in_the_deciding_evaluation_changes_nothing(
    micro, tmp_path, straight, monkeypatch
):
    workdir = tmp_path / "preempted"
    predict = evaluator.Evaluator._predict
    calls = []

    def preempted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:  # at step 6
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "_predict", preempted)
        outcome = loop.train(micro(**fields()), workdir)
    assert outcome.preempted and outcome.step == 6
    outcome = loop.train(micro(**fields()), workdir)
    assert not outcome.preempted and outcome.step == 6
    assert outcome.stop_reason == straight[1].stop_reason
    assert sorted(map(str, untimed(workdir))) == sorted(map(str, untimed(straight[0])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": "0"}, "evaluate_every='0' none is due before the last of 12 steps"),
        ({"evaluate_every": "100 percent"}, "evaluate_every='100 percent' none is due before"),
        ({"early_stopping__patience": -1}, "early_stopping.patience must be at least 0, got -1"),
        ({"early_stopping__min_delta": -0.5}, "early_stopping.min_delta must be .*, got -0.5"),
    ],
)
def test_invalid_options_are_refused_before_the_first_step(micro, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(micro(**fields(**changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_without_labels_is_refused(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_encoder.evaluation.predictions.Predictions.metrics", lambda self: {})
    with pytest.raises(
        InputError,
        match="needs toy_sentiment/accuracy, which the split 'validation' does not have",
    ):
        loop.train(micro(**fields()), tmp_path)
    assert native.checkpoint_steps(tmp_path) == [2]
