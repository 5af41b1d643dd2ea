"""One process at a time writes to a workdir or an output; the lock of a killed one is free."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from gemma_encoder import claims
from gemma_encoder.claims import claim
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.predict_file import predict_file
from gemma_encoder.training import loop
from gemma_encoder.training.workdir import LOCK, exclusive_workdir

HOLDER = """
import pathlib, sys, time
from gemma_encoder.claims import claim
with claim(pathlib.Path(sys.argv[1]), "it", ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `it.lock`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "it.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_and_a_killed_one_is_gone(tmp_path, holder):
    lock = tmp_path / "it.lock"
    message = f"the output is in use by process {holder.pid} on {socket.gethostname()}, since 2"
    with (
        pytest.raises(InputError, match=rf"{message}.*; wait for it"),
        claim(lock, "the output", "wait for it"),
    ):
        pass
    assert lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()  # the file is left, but not the lock
    with claim(lock, "the output", "wait for it"):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


def test_a_lock_that_was_removed_meanwhile_is_opened_again(tmp_path, monkeypatch):
    """Its holder may end between the opening of the file and its locking."""
    lock = tmp_path / "it.lock"
    flock = claims.fcntl.flock
    calls = []

    def slow(file, operation):
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(claims.fcntl, "flock", slow)
    with claim(lock, "it", ""):
        assert len(calls) == 2 and lock.exists()
    assert not lock.exists()


def test_a_claim_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match="it cannot be written: No such file or directory"),
        claim(tmp_path / "missing" / "it.lock", "it", ""),
    ):
        pass


def test_the_claim_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "it.lock", "it", ""):
        raise ZeroDivisionError
    with claim(tmp_path / "it.lock", "it", ""):
        pass


def test_a_workdir_in_use_is_neither_trained_nor_evaluated_in(micro, tmp_path):
    config = micro(train_for="1 steps", log_every="1 steps")
    workdir = tmp_path / "run"
    with exclusive_workdir(workdir, ""):
        with pytest.raises(InputError, match=r"run is in use by process \d+ .*another workdir"):
            loop.train(config, workdir)
        assert [path.name for path in workdir.iterdir()] == [LOCK]
    loop.train(config, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    message = r"run is in use by process .*a copy of the workdir"
    with exclusive_workdir(workdir, ""), pytest.raises(InputError, match=message):
        loop.evaluate(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
    loop.evaluate(config, workdir)
    assert not (workdir / LOCK).exists()


def test_an_output_in_use_is_not_written(random_predictor, tmp_path):
    predictor = random_predictor()
    (tmp_path / "a.txt").write_text("good .\n")
    output = tmp_path / "o.jsonl"
    task = predictor.task("toy_sentiment")
    message = r"o.jsonl is in use by .*; wait for it, or name"
    lock = tmp_path / "o.jsonl.lock"
    with claim(lock, "another", ""), pytest.raises(InputError, match=message):
        predict_file(predictor, task, tmp_path / "a.txt", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
    assert predict_file(predictor, task, tmp_path / "a.txt", output) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "o.jsonl"]
