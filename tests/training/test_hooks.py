"""Hooks: order of calls, users' hooks, failing hooks, and stopping a run."""

import errno

import jax
import numpy as np
import pytest

from gemma_encoder.evaluation import evaluator
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import hooks, loop
from gemma_encoder.training.accumulator import MetricsAccumulator
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.hooks import Hook, register_hook
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.weights import native

FIELDS = {
    "tasks": ("toy_sentiment",),
    "max_eval_examples": 4,
    "log_every": "1 steps",
    "evaluate_every": "100 percent",
}
EVALUATED = FIELDS | {"train_for": "6 steps", "evaluate_every": "2 steps"}


def untimed(workdir):
    """Returns the log lines of a run without timings."""
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "waiting" not in k}
        for line in read_metrics(workdir)
    ]


def losses(workdir):
    return [(line["step"], line["loss"]) for line in read_metrics(workdir) if "loss" in line]


class Recorder(Hook):
    """Records its calls, and the state of the run when it is due."""

    def __init__(self, every=2):
        self.every = every
        self.calls = []
        self.losses = {}

    def on_start(self, run):
        self.calls.append(("start", run.step))

    def before_step(self, run, step):
        self.calls.append(("before", step))

    def is_due(self, run, step):
        return step % self.every == 0

    def on_due(self, run, step):
        evaluated = run.evaluation.step if run.evaluation else None
        logged = read_metrics(run.workdir)[-1]["step"]
        self.calls.append(("due", step, logged, evaluated, run.saved_step))
        self.losses[step] = float(run.metrics.loss)

    def on_end(self, run):
        self.calls.append(("end", run.step))


class Failing(Hook):
    """Raises in one of its methods."""

    def __init__(self, event, step):
        self.event = event
        self.step = step

    def _fail(self, event, step):
        if (event, step) == (self.event, self.step):
            raise ZeroDivisionError("nothing to divide by")

    def before_step(self, run, step):
        self._fail("before_step", step)

    def is_due(self, run, step):
        return True

    def on_due(self, run, step):
        self._fail("on_due", step)

    def on_end(self, run):
        self._fail("on_end", run.step)


class Stopping(Hook):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def is_due(self, run, step):
        return step == self.step

    def on_due(self, run, step):
        run.request_stop("enough")


@pytest.fixture(scope="module")
def straight(micro, tmp_path_factory):
    """Workdir of an uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    loop.train(micro(**EVALUATED), workdir)
    return workdir


def test_a_hook_is_called_after_log_evaluation_and_checkpoint(micro, tmp_path, straight):
    recorder = Recorder()
    loop.train(micro(**EVALUATED, checkpoint_every="4 steps"), tmp_path, hooks=[recorder])
    assert recorder.calls == [
        ("start", 0),
        ("before", 1),
        ("before", 2),
        ("due", 2, 2, 2, 0),
        ("before", 3),
        ("before", 4),
        ("due", 4, 4, 4, 4),
        ("before", 5),
        ("before", 6),
        ("due", 6, 6, 6, 6),
        ("end", 6),
    ]
    assert recorder.losses.items() <= dict(losses(tmp_path)).items()
    for step in (4, 6):  # a checkpoint holds the evaluation of its step
        record = native.load_inference_spec(tmp_path / "checkpoints" / str(step)).record
        assert [line["step"] for line in record["metrics"]] == [step]
    assert untimed(tmp_path) == untimed(straight)


def test_a_hook_changes_no_line_of_the_log(micro, tmp_path):
    """The means of a line are over the same steps, even if a hook is due in between."""
    fields = FIELDS | {"log_every": "3 steps"}
    for name, users in (("without", []), ("with", [Failing("never", 0)])):
        loop.train(micro(**fields, train_for="6 steps"), tmp_path / name, hooks=users)
    assert untimed(tmp_path / "with") == untimed(tmp_path / "without")


def test_a_step_is_dispatched_before_earlier_metrics_are_read(micro, tmp_path, monkeypatch):
    calls = []
    take_step = Trainer.step
    add_metrics = MetricsAccumulator.add

    def recorded_step(self, batch):
        calls.append(f"step {self.step_number + 1}")
        return take_step(self, batch)

    def recorded_add(self, step, metrics):
        calls.append(f"read {step}")
        return add_metrics(self, step, metrics)

    monkeypatch.setattr(Trainer, "step", recorded_step)
    monkeypatch.setattr(MetricsAccumulator, "add", recorded_add)
    loop.train(micro(**(FIELDS | {"log_every": "3 steps"})), tmp_path)
    assert calls == [
        *("step 1", "step 2", "read 1", "step 3", "read 2", "read 3"),
        *("step 4", "read 4"),
    ]


def test_hooks_by_name(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "_FACTORIES", {})
    made = []

    def make():
        made.append(Recorder())
        return made[-1]

    register_hook("recorder", make)
    with pytest.raises(InputError, match="hook 'recorder' is already registered"):
        register_hook("recorder", Recorder)
    passed = Recorder()
    loop.train(micro(**FIELDS, hooks=("recorder",)), tmp_path / "run", hooks=[passed])
    assert len(made) == 1 and made[0].calls == passed.calls and len(passed.calls) == 8
    for fields, message in (
        ({"hooks": ("recoder",)}, "unknown hook 'recoder'; did you mean 'recorder'?"),
        ({}, "<class .*Recorder'> is not a hook; pass an instance of a subclass of"),
    ):
        with pytest.raises(InputError, match=message):
            loop.train(micro(**FIELDS, **fields), tmp_path / "refused", hooks=[Recorder])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("event", "step", "saved"), [("on_due", 3, 3), ("before_step", 4, 3), ("on_end", 6, 6)]
)
def test_a_failing_hook_is_named_and_the_steps_are_saved(
    micro, tmp_path, straight, event, step, saved
):
    config = micro(**EVALUATED)
    with pytest.raises(
        InputError,
        match=rf"hook Failing failed in {event} at step {saved} \(.*test_hooks.py:\d+\): "
        rf"ZeroDivisionError: nothing to divide by; step {saved} is saved in .*; fix the hook",
    ) as caught:
        loop.train(config, tmp_path, hooks=[Failing(event, step)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert native.checkpoint_steps(tmp_path) == [saved]
    assert loop.train(config, tmp_path).step == 6
    assert untimed(tmp_path) == untimed(straight)
    checkpoints = [native.find(run) for run in (tmp_path, straight)]
    final = [
        native.load_parameters(path, native.load_inference_spec(path).encoder)
        for path in checkpoints
    ]
    jax.tree.map(np.testing.assert_array_equal, *final)


@pytest.mark.parametrize(
    ("failure", "shown", "message"),
    [
        (KeyError("accuracy"), KeyError, "accuracy"),
        (
            OSError(errno.ENOSPC, "No space left on device", "predictions/t.jsonl"),
            InputError,
            "step 4: OSError: .*No space left on device: 'predictions/t.jsonl'; step 4 is saved in "
            ".*; free disk space .* then rerun",
        ),
    ],
)
def test_an_evaluation_that_raises_loses_no_step(
    micro, tmp_path, straight, monkeypatch, failure, shown, message
):
    """The checkpoint is saved without a value, and the evaluation is caught up on."""
    config = micro(**EVALUATED)
    run = evaluator.Evaluator.run

    def broken(self, parameters, step, write=None):
        if step == 4:
            raise failure
        return run(self, parameters, step, write)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "run", broken)
        for _ in range(2):  # once in training, once on catching up
            with pytest.raises(shown, match=message):
                loop.train(config, tmp_path)
            assert native.checkpoint_steps(tmp_path) == [4]
            checkpoints = Checkpoints(tmp_path)
            assert checkpoints.best() is None
            checkpoints.close()
    loop.train(config, tmp_path)
    assert untimed(tmp_path) == untimed(straight)


def test_a_failing_hook_saves_no_state_with_a_nan_loss(micro, tmp_path, caplog):
    diverging = {"optimizer__learning_rate": 1e30, "optimizer__clip_norm": 0.0, "warmup": "0"}
    fields = FIELDS | {"log_every": "6 steps", "train_for": "6 steps"}

    class Early(Failing):
        def is_due(self, run, step):
            return False

    with pytest.raises(InputError, match=r"hook Early failed .* no step is saved in"):
        loop.train(micro(**fields, **diverging), tmp_path, hooks=[Early("before_step", 3)])
    assert not native.checkpoint_steps(tmp_path) and (tmp_path / "failures").exists()
    assert "step 2 is not saved: the loss of step 2 is" in caplog.text


def test_a_hook_that_requests_a_stop_ends_a_complete_run(micro, tmp_path, straight, capsys):
    config = micro(**(FIELDS | {"log_every": "2 steps"}), train_for="6 steps")
    outcome = loop.train(config, tmp_path, hooks=[Stopping(3)])
    assert (outcome.step, outcome.preempted, outcome.stop_reason) == (3, False, "enough")
    assert "enough" in capsys.readouterr().err
    assert outcome.checkpoint == native.find(tmp_path) and outcome.best[0] == 3
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "train"),
        (3, "train"),
        (3, "validation"),
    ]
    assert lines[-1]["accuracy"] == outcome.metrics["toy_sentiment"]["accuracy"]
    assert losses(tmp_path)[1] == losses(straight)[2]
    assert loop.train(config, tmp_path).step == 6  # without the hook that stops


def test_a_misspelled_hook_method_is_refused():
    with pytest.raises(InputError, match="method of a hook in Late: 'after_step'.*before_step"):

        class Late(Hook):
            def after_step(self, run):
                pass
