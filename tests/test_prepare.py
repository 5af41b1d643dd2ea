"""The program that prepares data: its errors, and (with Apache Beam) equality to raw data."""

import itertools
import sys

import numpy as np
import pytest

from gemma_encoder.cli import prepare
from gemma_encoder.data import prepared, registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.training.build import build


@pytest.fixture
def run():
    """Runs the program with arguments in this process."""
    return lambda *arguments: prepare.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--config=experiments/quickstart.py",), "--output is missing"),
        (
            ("--config=experiments/quickstart.py", "--output=x", "more"),
            "unexpected argument 'more'",
        ),
        (("--config=experiments/quickstart.py", "--output=x", "--epochs=2"), "epochs"),
        (("--config=experiments/nothing.py", "--output=x"), "nothing.py"),
    ],
)
def test_invalid_flags_are_one_line_errors(run, arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_beam_names_the_command(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert run("--config=experiments/quickstart.py:smoke", f"--output={tmp_path}") == 2
    assert "make prepare-setup" in capsys.readouterr().err


def test_training_with_prepared_data_equals_raw_data(run, tmp_path, changed, capsys):
    pytest.importorskip(
        "apache_beam", reason="Apache Beam has an environment of its own: make test-prepare"
    )
    flag = "--config=experiments/quickstart.py:smoke"
    assert run(flag, f"--output={tmp_path}", "--config.batch.readers=2") == 0
    assert f"next, train: add --config.prepared={tmp_path}" in capsys.readouterr().out
    from gemma_encoder.experiments import quickstart

    batches = []
    for folder in ("", str(tmp_path)):
        recipe = build(
            changed(quickstart.get_config("smoke"), {"prepared": folder, "batch__readers": 2}),
            for_training=True,
        )
        stream = TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream)
        batches.append(list(itertools.islice(stream, recipe.steps("train_for", recipe.epoch()))))
        stream.close()
    for raw, ready in zip(*batches, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(raw, name), getattr(ready, name), err_msg=name)
    assert run(flag, f"--output={tmp_path}", "--config.batch.readers=2") == 0
    assert "is already complete" in capsys.readouterr().out
    assert run(flag, f"--output={tmp_path}", "--config.seed=1", "--config.batch.readers=1") == 0
    assert "is already complete" in capsys.readouterr().out
    assert run(flag, f"--output={tmp_path}", "--config.max_length=64") == 2
    assert "was prepared differently (max_length: 128 -> 64)" in capsys.readouterr().err


def test_errors_of_workers_are_one_line(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip(
        "apache_beam", reason="Apache Beam has an environment of its own: make test-prepare"
    )
    task = Task("broken", "classification", Template("{x}"), ("accuracy",), ("a", "b"))
    good = [[Example({"x": f"word {i}"}, i % 2)] for i in range(64)]
    bad = [[Example({"x": " "}, 0)]]
    monkeypatch.setitem(
        registry._TASKS,
        "broken",
        lambda options: MemorySource(
            task, options, lambda split: bad if split == "validation" else good
        ),
    )
    assert (
        run(
            "--config=experiments/quickstart.py:smoke",
            "--config.tasks=('broken',)",
            f"--output={tmp_path}",
        )
        == 2
    )
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert error == (
        "error: task 'broken', validation record 1: the text is empty: nothing but blanks in 'x'"
    )
    assert not (tmp_path / "broken" / prepared.INFO).exists()
