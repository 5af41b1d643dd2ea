"""Runs survive preemption, full disks, damaged checkpoints, other meshes and NaN losses."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import digests, distributed
from gemma_encoder.evaluation import evaluator
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import parameter_paths
from gemma_encoder.training import checkpoint, loop
from gemma_encoder.training.build import build
from gemma_encoder.training.metrics_log import MetricsLog, read_metrics
from gemma_encoder.training.profile import ProfileHook
from gemma_encoder.training.step import make_program
from gemma_encoder.weights import native
from gemma_encoder.weights.backbone import load_warm, open_checkpoint

STEPS = {
    "train_for": "12 steps",
    "checkpoint_every": "4 steps",
    "evaluate_every": "6 steps",
    "log_every": "1 steps",
    "max_eval_examples": 8,
}


def untimed(workdir):
    """Returns the log lines of a run without timings."""
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "waiting" not in k}
        for line in read_metrics(workdir)
    ]


def preempt_at(monkeypatch, owner, name, count):
    """Sends SIGTERM to this process in the `count`-th call of a method."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def straight(micro, tmp_path_factory):
    """Workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    loop.train(micro(**STEPS), workdir)
    return workdir


@pytest.mark.parametrize("is_read", [False, True])
def test_a_signal_that_no_step_reads_is_passed_on(is_read):
    passed_on = []
    before = signal.signal(signal.SIGTERM, lambda *_: passed_on.append("SIGTERM"))
    try:
        with distributed.PreemptionSignal() as preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            if is_read:
                assert preemption.reached()
            assert not passed_on
        assert passed_on == ([] if is_read else ["SIGTERM"])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("owner", "name", "count", "saved"),
    [(loop.TrainStream, "__next__", 9, 9), (evaluator.Evaluator, "_predict", 2, 6)],
)
def test_a_preempted_run_saves_and_resumes_bit_exactly(
    micro, tmp_path, straight, monkeypatch, owner, name, count, saved
):
    """Preempted during training, and during an evaluation, which is repeated."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        preempt_at(patch, owner, name, count)
        outcome = loop.train(micro(**STEPS), tmp_path)
    assert outcome.preempted and outcome.step == saved == native.checkpoint_steps(tmp_path)[-1]
    assert signal.getsignal(signal.SIGTERM) == before
    outcome = loop.train(micro(**STEPS), tmp_path)
    assert not outcome.preempted and outcome.step == 12
    assert sorted(map(str, untimed(tmp_path))) == sorted(map(str, untimed(straight)))


class Killed(BaseException):
    """Simulates SIGKILL, which no handler sees."""


@pytest.mark.parametrize(
    ("failure", "calls", "saved"),
    [
        (ValueError("a metric failed"), 1, 6),  # only an evaluation is due: saved afterwards
        (ValueError("a metric failed"), 2, 12),
        (Killed(), 2, 12),  # a checkpoint is due, too: saved before
    ],
)
def test_a_failed_evaluation_leaves_its_step_and_is_repeated(
    micro, tmp_path, straight, monkeypatch, failure, calls, saved
):
    run = evaluator.Evaluator.run
    count = itertools.count(1)

    def failing(self, *arguments):
        if next(count) == calls:
            raise failure
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "run", failing)
        with pytest.raises(type(failure)):
            loop.train(micro(**STEPS), tmp_path)
    assert native.checkpoint_steps(tmp_path)[-1] == saved
    assert not any("task" in line for line in read_metrics(tmp_path) if line["step"] == saved)
    outcome = loop.train(micro(**STEPS), tmp_path)
    assert outcome.step == 12
    assert sorted(map(str, untimed(tmp_path))) == sorted(map(str, untimed(straight)))
    assert_same_parameters(tmp_path, straight)


@pytest.mark.parametrize("failure", [InputError("line 9 is damaged"), OSError(5, "I/O error")])
def test_data_that_cannot_be_read_lose_no_step(micro, tmp_path, straight, monkeypatch, failure):
    read = loop.TrainStream.__next__
    calls = itertools.count(1)

    def failing(self):
        if next(calls) == 8:
            raise failure
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStream, "__next__", failing)
        with pytest.raises(type(failure)):
            loop.train(micro(**STEPS), tmp_path)
    assert native.checkpoint_steps(tmp_path)[-1] == 7
    assert loop.train(micro(**STEPS), tmp_path).step == 12
    assert sorted(map(str, untimed(tmp_path))) == sorted(map(str, untimed(straight)))
    assert_same_parameters(tmp_path, straight)


def assert_same_parameters(*workdirs):
    paths = [native.find(workdir) for workdir in workdirs]
    parameters = [
        jax.device_get(native.load_parameters(path, native.load_inference_spec(path).encoder))
        for path in paths
    ]
    jax.tree.map(np.testing.assert_array_equal, *parameters)


def test_a_kill_between_evaluation_and_checkpoint_is_repaired(
    micro, tmp_path, straight, monkeypatch
):
    """The evaluation is in the log; the next start adds it to the checkpoint of its step."""

    def killed(self, *arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "add_evaluation", killed)
        with pytest.raises(Killed):
            loop.train(micro(**STEPS | {"checkpoint_every": "6 steps"}), tmp_path)
    path = native.find(tmp_path)
    assert path.name == "6" and not native.load_inference_spec(path).record["metrics"]
    outcome = loop.train(micro(**STEPS | {"checkpoint_every": "6 steps"}), tmp_path)
    assert sorted(map(str, untimed(tmp_path))) == sorted(map(str, untimed(straight)))
    folder = tmp_path / "checkpoints"
    for step in (6, 12):
        lines = native.load_inference_spec(folder / str(step)).record["metrics"]
        assert {line["step"] for line in lines} == {step}
    assert outcome.best is not None


def test_a_kill_between_the_lines_of_two_tasks_is_repaired(micro, tmp_path, monkeypatch):
    """The log has an evaluation whole or not at all: each task and step has one line."""
    fields = STEPS | {"tasks": ("toy_sentiment", "toy_ranking"), "train_for": "2 steps"}
    remember = MetricsLog._remember

    def killed(self, line):
        if line["split"] == "validation":
            raise Killed
        remember(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "_remember", killed)
        with pytest.raises(Killed):
            loop.train(micro(**fields), tmp_path)
    assert [line["task"] for line in read_metrics(tmp_path) if "task" in line] == ["toy_sentiment"]
    outcome = loop.train(micro(**fields), tmp_path)
    tasks = [line["task"] for line in read_metrics(tmp_path) if "task" in line]
    assert tasks == ["toy_sentiment", "toy_ranking"]
    record = native.load_inference_spec(outcome.checkpoint).record
    assert [line["task"] for line in record["metrics"]] == tasks
    assert record["details"].keys() == set(tasks)


def test_the_best_checkpoint_remains_besides_the_newest(micro, tmp_path, monkeypatch):
    values = iter([math.nan, 0.9, math.nan, 0.3, 0.1])  # an undefined metric is never the best
    run = evaluator.Evaluator.run

    def evaluated(self, *args):
        evaluation = run(self, *args)
        evaluation.metrics["toy_sentiment"]["accuracy"] = next(values)
        return evaluation

    monkeypatch.setattr(evaluator.Evaluator, "run", evaluated)
    every = {
        "train_for": "5 steps",
        "checkpoint_every": "1 steps",
        "evaluate_every": "1 steps",
        "keep_checkpoints": 1,
        "max_eval_examples": 4,
    }
    outcome = loop.train(micro(**every), tmp_path)
    assert native.checkpoint_steps(tmp_path) == [2, 5] and outcome.best == (2, 0.9)
    with pytest.raises(
        InputError,
        match="unknown best_metric 'toy_sentiment/f1'; did you mean 'toy_sentiment/accuracy'",
    ):
        build(micro(best_metric="toy_sentiment/f1"), for_training=True)


@pytest.mark.parametrize("background", [True], indirect=True)
def test_a_full_disk_is_one_line_and_harms_no_checkpoint(
    micro, tmp_path, straight, monkeypatch, background
):
    workdir = tmp_path / "run"
    write = checkpoint.FilesHandler.save

    def full(self, directory, args):
        # The parent is the folder of the step; folders above may be named 12, too.
        if directory.parent.name.startswith("12"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, directory, args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.FilesHandler, "save", full)
        with pytest.raises(
            InputError,
            match=r"checkpoint of step 12 could not be written to .*No space left on device; "
            r"earlier checkpoints are complete",
        ):
            loop.train(micro(**STEPS), workdir)
    assert native.checkpoint_steps(workdir)[-1] == 8
    loop.train(micro(**STEPS), workdir)
    assert [line["loss"] for line in untimed(workdir) if "loss" in line] == [
        line["loss"] for line in untimed(straight) if "loss" in line
    ]


def whole_after_each_save(monkeypatch, workdir, seconds):
    """Returns a list that records, after each save, the steps of complete checkpoints.

    The writer of the digests, which are the last file, is blocked until then, for at most
    `seconds`.
    """
    whole = []
    released = threading.Event()
    write = digests.write
    save = checkpoint.Checkpoints.save

    def blocked(*arguments):
        released.wait(seconds)
        write(*arguments)

    def saved(self, *arguments):
        released.clear()
        save(self, *arguments)
        whole.append(native.checkpoint_steps(workdir))
        released.set()

    monkeypatch.setattr(digests, "write", blocked)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", saved)
    return whole


def test_a_background_save_does_not_block_training(micro, tmp_path, monkeypatch, background):
    whole = whole_after_each_save(monkeypatch, tmp_path, seconds=10)
    loop.train(micro(train_for="1 steps", max_eval_examples=4), tmp_path)
    assert whole == [[]] and native.checkpoint_steps(tmp_path) == [1]


def test_on_a_cpu_training_waits_for_a_checkpoint(micro, tmp_path, monkeypatch):
    whole = whole_after_each_save(monkeypatch, tmp_path, seconds=0.3)
    loop.train(
        micro(train_for="2 steps", checkpoint_every="1 steps", max_eval_examples=4), tmp_path
    )
    assert whole == [[1], [1, 2]]


def test_a_damaged_or_foreign_checkpoint_is_refused(micro, tmp_path, straight):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    chunks = sorted(
        (workdir / "checkpoints/12/parameters").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else -1,
    )
    chunks[-1].write_bytes(chunks[-1].read_bytes()[:100])
    with pytest.raises(InputError, match=r"damaged: it has 100 bytes, not .*or move .*12 away"):
        loop.train(micro(**STEPS), workdir)
    shutil.move(workdir / "checkpoints/12", tmp_path / "away")
    assert loop.train(micro(**STEPS), workdir).step == 12
    foreign = tmp_path / "foreign"
    shutil.copytree(straight, foreign)
    (foreign / "config.json").unlink()
    before = sorted(path for path in foreign.rglob("checkpoints/**/*"))
    with pytest.raises(InputError, match="as they were written, so it belongs to another"):
        loop.train(micro(**STEPS, model__pooling__name="attention_query"), foreign)
    assert sorted(path for path in foreign.rglob("checkpoints/**/*")) == before


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1)])
def test_a_run_resumes_on_another_mesh(micro, tmp_path, straight, shape):
    """Saved on (8, 1, 1): restored parameters are bit-equal, later losses to float32."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints/12")
    config = micro(**STEPS, mesh=shape)
    recipe = build(config, for_training=True)
    mesh = sharding.make_mesh(shape)
    program = make_program(recipe, mesh, 12, 1)
    checkpoints = checkpoint.Checkpoints(workdir)
    state, _ = checkpoints.restore(8, program.abstract, ["reader_00000"])
    checkpoints.close()
    saved = native.load_parameters(workdir / "checkpoints/8", recipe.encoder)
    for path, leaf in parameter_paths(state.parameters).items():
        np.testing.assert_array_equal(leaf, parameter_paths(saved)[path], err_msg=path)
        assert leaf.sharding == parameter_paths(program.abstract.parameters)[path].sharding
    loop.train(config, workdir)
    for actual, expected in zip(untimed(workdir), untimed(straight), strict=True):
        assert actual["step"] == expected["step"]
        if "loss" in actual:
            # Sums in another order, over four steps of Adam.
            np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-4)


def test_a_nan_loss_leaves_a_report(micro, tmp_path):
    with pytest.raises(
        InputError, match=r"the loss of step \d+ is (nan|inf).*Diagnostics are in .*step_"
    ):
        loop.train(
            micro(
                optimizer__learning_rate=1e30,
                warmup="0 steps",
                optimizer__clip_norm=0.0,
                train_for="8 steps",
            ),
            tmp_path,
        )
    (folder,) = (tmp_path / "failures").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == int(folder.name.removeprefix("step_"))
    assert {"loss", "gradient_norm", "parameter_norm", "tasks"} <= report.keys()
    batch = np.load(folder / "batch.process_0.npz")
    texts = (folder / "texts.txt").read_text().splitlines()
    assert (batch["weight"] > 0).any()
    assert len(texts) == int(batch["weight"].sum())


def test_warm_start_loads_the_matching_parameters(micro, tmp_path, straight, caplog):
    """Loads backbone, pooler and matching heads; trains the adapters, saved with the heads."""
    path = native.find(straight)
    donor = native.load_parameters(path, native.load_inference_spec(path).encoder)
    config = micro(
        tasks=("toy_sentiment",),
        train_for="2 steps",
        model__warm_start=str(straight),
        model__lora__rank=2,
        optimizer__learning_rate=0.1,
        max_eval_examples=4,
    )
    config.warmup = "0 steps"
    outcome = loop.train(config, tmp_path / "run")
    assert "starts from the fine-tuned checkpoint" in caplog.text
    spec = native.load_inference_spec(outcome.checkpoint)
    parameters = parameter_paths(native.load_parameters(outcome.checkpoint, spec.encoder))
    donor_parameters = parameter_paths(donor)
    for path, leaf in parameters.items():
        if "_lora_" not in path:
            is_equal = path in donor_parameters and np.array_equal(leaf, donor_parameters[path])
            assert is_equal == path.startswith("backbone/"), path
    trained = [leaf for path, leaf in parameters.items() if path.endswith("_lora_b")]
    assert any(np.abs(leaf).max() > 0 for leaf in trained)
    predictor = ge.Predictor.load(tmp_path / "run")
    texts = ["the acting was not dull .", "a fine film ."]
    ge.export_huggingface(predictor, tmp_path / "export")
    # (W + AB) x against W x + A (B x), in float32.
    np.testing.assert_allclose(
        ge.Predictor.load(tmp_path / "export").embed(texts),
        predictor.embed(texts),
        rtol=1e-4,
        atol=1e-5,
    )
    assert "query_lora_a" not in str(ge.load_backbone(tmp_path / "run"))
    with pytest.raises(InputError, match="it takes a workdir of this project"):
        load_warm(open_checkpoint(tmp_path / "export"), build(config).encoder, {})


def test_some_steps_are_profiled(micro, tmp_path):
    loop.train(micro(profile=(2, 3), max_eval_examples=4), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "backbone/embedding" in (tmp_path / "parameters.txt").read_text()
    with pytest.raises(InputError, match="profile must be"):
        ProfileHook((3, 2), 4)
    with pytest.raises(InputError, match=r"profile=\(5, 9\) begins after the last of 4 steps"):
        ProfileHook((5, 9), 4)


def test_processes_connect_by_all_three_variables_or_none(monkeypatch):
    monkeypatch.setenv(distributed.COORDINATOR_ADDRESS, "127.0.0.1:1")
    with pytest.raises(
        InputError, match="only JAX_COORDINATOR_ADDRESS is set; set all three or none"
    ):
        distributed.initialize()
    assert jax.process_count() == 1
