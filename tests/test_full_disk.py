"""A full disk is one line; older files stay whole, and the same command works once there is room.

The disk is a small file system, which is filled at the moment in question.
"""

import os
import subprocess
import sys

import pytest

import gemma_encoder as ge
from gemma_encoder import cli, digests
from gemma_encoder.cli import commandline
from gemma_encoder.data import cache, prepared
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.tasks.toy import TASKS
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.predict_file import predict_file
from gemma_encoder.training import standard_hooks
from gemma_encoder.training.metrics_log import MetricsLog, read_metrics
from gemma_encoder.weights import gemma, native
from gemma_encoder.whole_files import write_whole
from tests.prediction_files import TEXTS, write

CONFIG = """
from gemma_encoder.experiments import quickstart

def get_config(arg=None):
    config = quickstart.get_config("smoke")
    config.tasks = ("toy_sentiment",)
    config.model.size = "gemma2_tiny"
    config.model.transformer = dict(
        num_layers=2, embed_dim=32, hidden_dim=64, head_dim=8, query_scale=8**-0.5
    )
    config.max_length = 64
    config.batch.row_length = 64
    config.train_for = "6 steps"
    config.log_every = "1 steps"
    config.checkpoint_every = "2 steps"
    config.evaluate_every = "6 steps"
    config.max_eval_examples = 8
    return config
"""


def last_error(capfd):
    """Returns the last line on stderr, which must be about the disk, and all lines."""
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and len(lines) < 40, lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def whole_steps(workdir):
    """Returns the steps of the checkpoints, each of which can be read."""
    steps = native.checkpoint_steps(workdir)
    for step in steps:
        folder = workdir / "checkpoints" / str(step)
        native.load_parameters(folder, native.load_inference_spec(folder).encoder)
    return steps


@pytest.mark.parametrize(
    ("owner", "method", "step", "saved"),
    [
        (None, "", 0, []),  # config.json
        (standard_hooks.LoggingHook, "on_due", 3, [2]),  # metrics.jsonl
        (standard_hooks.CheckpointHook, "on_due", 4, [2]),
        (standard_hooks.EvaluationHook, "on_due", 6, [4, 6]),  # predictions
    ],
)
def test_training(small_disk, tmp_path, monkeypatch, capfd, owner, method, step, saved):
    (tmp_path / "config.py").write_text(CONFIG)
    workdir = small_disk.folder / "run"
    command = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    if owner is None:
        small_disk.fill()
    else:
        on_due = getattr(owner, method)

        def filling(self, run, now):
            if now == step:
                small_disk.fill()
            on_due(self, run, now)

    with monkeypatch.context() as patch:
        if owner is not None:
            patch.setattr(owner, method, filling)
        assert cli.main(command) == 2
    message = last_error(capfd)
    assert "cannot be written" in message or "could not be written" in message or "step" in message
    assert whole_steps(workdir) == saved
    small_disk.clear()
    assert cli.main(command) == 0
    assert whole_steps(workdir)[-1] == 6


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_predictions(random_predictor, small_disk, tmp_path, monkeypatch, target):
    monkeypatch.setattr("gemma_encoder.predict_file.TEXTS_PER_CHUNK", 5)
    predictor = random_predictor()
    task = predictor.task("toy_sentiment")
    source = write(tmp_path, "a.csv")
    output = small_disk.folder / target
    output.write_text("older")
    predict = predictor.predict
    predict_file(predictor, task, source, tmp_path / target)
    calls = iter(range(9))

    def filling(*arguments, **options):
        if next(calls) == 2:
            small_disk.fill()
        return predict(*arguments, **options)

    monkeypatch.setattr(predictor, "predict", filling)
    for _ in range(2):
        with pytest.raises(InputError, match=r"o\..* cannot be written: No space left"):
            predict_file(predictor, task, source, output)
        assert output.read_text() == "older"
    small_disk.clear()
    assert predict_file(predictor, task, source, output) == len(TEXTS)
    assert output.read_bytes() == (tmp_path / target).read_bytes()


def test_outputs_of_programs(small_disk, capfd):
    """Reports, tables, plans and submissions are written by one function."""
    path = small_disk.folder / "report.html"
    path.write_text("older")
    small_disk.fill()
    write_it = lambda: commandline.write_output(path, "new" * 10_000) or 0  # noqa: E731
    assert commandline.run_program(write_it) == 2
    assert "report.html cannot be written: No space left on device" in last_error(capfd)
    assert path.read_text() == "older"
    small_disk.clear()
    assert commandline.run_program(write_it) == 0 and path.read_text() == "new" * 10_000


def test_the_file_is_named(small_disk):
    """The operating system does not say which file a full disk has no room for."""
    log = MetricsLog(small_disk.folder, 0)
    path = small_disk.folder / "parameters.txt"
    small_disk.fill()
    with pytest.raises(OSError, match="No space left on device: '.*disk/parameters.txt'"):
        write_whole(path, "x" * 10_000)
    with pytest.raises(OSError, match="No space left on device: '.*disk/(metrics|tensorboard)"):
        for step in range(1000):
            log.write(step, "train", {"loss": 0.0})
    log.close()
    assert [line["step"] for line in read_metrics(small_disk.folder)] == list(range(step))


def export_huggingface(predictor, folder):
    ge.export_huggingface(predictor, folder, heads=False)


def export_gemma(predictor, folder):
    config = predictor.spec.encoder.transformer
    gemma.save(predictor.parameters["backbone"], config, folder, b"tokenizer" * 20_000)


@pytest.mark.parametrize("free", [0, 60_000, 300_000])
@pytest.mark.parametrize("export", [export_huggingface, export_gemma])
def test_exports(random_predictor, small_disk, capfd, export, free):
    predictor = random_predictor()
    folder = small_disk.folder / "export"
    small_disk.fill(free=free)
    with pytest.raises(InputError, match="export cannot be written.*No space left"):
        export(predictor, folder)
    assert not capfd.readouterr().err
    assert not [path for path in small_disk.folder.iterdir() if "export" in path.name]
    small_disk.clear()
    export(predictor, folder)
    assert (folder / digests.NAME).exists()


def test_prepared_folders(small_disk):
    source = TASKS["toy_sentiment"](DataOptions())
    tokenizer = ge.Tokenizer.load("small")
    folder = small_disk.folder / "toy_sentiment"
    description = prepared.describe_prepared(source, tokenizer, 64)
    assert prepared.begin(folder, description)
    parts = prepared.parts(source)
    prepared.write_part(source, parts[0], tokenizer, 64, folder)
    content = (folder / parts[0].path / "rows.arrow").read_bytes()
    small_disk.fill()
    with pytest.raises(InputError, match="rows.arrow cannot be written: No space left.*resume"):
        prepared.write_part(source, parts[1], tokenizer, 64, folder)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        prepared.begin(folder, description)
    small_disk.clear()
    assert (folder / parts[0].path / "rows.arrow").read_bytes() == content
    assert not list((folder / parts[1].path).iterdir())
    for part in parts:
        prepared.write_part(source, part, tokenizer, 64, folder)
    prepared.finish(folder)
    assert prepared.PreparedSource("toy_sentiment", small_disk.folder, DataOptions())


def test_the_cache_stops_nothing(small_disk, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "KEEP_FROM", 1)
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(small_disk.folder / "cache"))
    source = tmp_path / "source"
    source.write_text("content")
    builds = []

    def build(folder):
        builds.append(folder)
        (folder / "built").write_bytes(b"x" * 100_000)

    def load(folder):
        return (folder / "built").read_bytes()

    small_disk.fill()
    for _ in range(2):
        assert cache.derive([source], "table", build, load) == b"x" * 100_000
    assert len(builds) == 2 and builds[0].is_relative_to(small_disk.folder)
    assert "cache is full: the table of" in caplog.text
    small_disk.clear()
    monkeypatch.setattr(cache, "_without_space", {})
    assert cache.derive([source], "table", build, load) == b"x" * 100_000
    cache.derive([source], "table", build, load)
    assert len(builds) == 3


def test_the_cache_of_compiled_programs_stops_nothing(small_disk):
    code = (
        "import jax; from gemma_encoder import runtime; runtime.enable_compilation_cache();"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    variables = {**os.environ, "GEMMA_ENCODER_CACHE": str(small_disk.folder)}
    variables.pop("JAX_COMPILATION_CACHE_DIR")
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    for _ in range(2):  # the second start reads what the first has left
        small_disk.fill()
        done = run()
        assert done.returncode == 0 and done.stdout == "2\n", done.stderr
    small_disk.clear()
    assert run().stdout == "2\n"
