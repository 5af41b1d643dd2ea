"""Several processes on this machine: how they are started and stopped; and that two of four devices train, die and go on as one of eight does."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gemma_encoder.experiments import quickstart
from gemma_encoder.launch import local
from gemma_encoder.training import loop
from gemma_encoder.training.metrics_log import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


def test_a_dry_run_prints_what_would_be_started(capsys):
    assert (
        local.main(
            [
                "--processes=2",
                "--devices_per_process=4",
                "--dry_run",
                "--",
                "train",
                "--config=a b.py",
                "--workdir=runs/x",
            ]
        )
        == 0
    )
    shared = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2"
    command = f"{sys.executable} -m gemma_encoder train '--config=a b.py' --workdir=runs/x"
    assert capsys.readouterr().out.splitlines() == [
        f"env {shared} JAX_PROCESS_ID={number} {command}" for number in (0, 1)
    ]


@pytest.mark.parametrize("flag", ["--processes=0", "--devices_per_process=-1"])
def test_wrong_counts_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        local.main([flag, "--dry_run"])
    assert "must be at least 1" in capsys.readouterr().err


def job(code: str, count: int = 2) -> int:
    """The exit code of `count` processes that run `code`, each knowing its number n."""
    program = f"import os, signal, sys, time\nn = int(os.environ['N'])\n{code}"
    return local.LocalJob(
        [sys.executable, "-c", program], [{"N": str(number)} for number in range(count)]
    ).run()


def test_all_that_end_well_end_well(capfd):
    assert job("print('line of', n)") == 0
    captured = capfd.readouterr()
    assert "line of 0" in captured.out and "[1] line of 1" in captured.err


@pytest.mark.parametrize(
    ("failure", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_when_one_fails_the_others_are_stopped(failure, code):
    began = time.monotonic()
    assert job(f"if n: {failure}\ntime.sleep(60)") == code
    assert time.monotonic() - began < 30


def test_what_a_worker_that_was_told_to_stop_says_is_the_exit_code(monkeypatch, tmp_path):
    """Killed once, told to stop once, then done; and the restarts are counted."""
    starts = tmp_path / "starts"
    program = f"""
import os, signal, sys
path = {str(starts)!r}
first = os.environ["JAX_PROCESS_ID"] == "0"
if first: open(path, "a").write("x")
else: sys.exit(0)
count = len(open(path).read())
if count == 1: os.kill(os.getpid(), signal.SIGKILL)
if count == 2: sys.exit(75)
"""
    real = local.LocalJob
    monkeypatch.setattr(
        local,
        "LocalJob",
        lambda command, environments: real([sys.executable, "-c", program], environments),
    )
    assert local.main(["--restarts=1"]) == 75 and starts.read_text() == "xx"
    starts.unlink()
    assert local.main([]) == 128 + 9
    starts.unlink()
    assert local.main(["--restarts=2"]) == 0 and starts.read_text() == "xxx"


def child(parent: int, number: int) -> int | None:
    """The process of that number among the children of `parent`."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and f"JAX_PROCESS_ID={number}".encode() in (
                folder / "environ"
            ).read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return None


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the job ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_killed_and_told_to_stop_equal_one_that_runs_through(changed, tmp_path):
    """Process 1 is killed, later process 0 is told to stop; the losses are those of one process with as many devices."""
    fields = {
        "train_for": "9 steps",
        "checkpoint_every": "3 steps",
        "log_every": "1 steps",
        "evaluate_every": "9 steps",
        "max_eval_examples": 8,
    }
    fields |= {
        "model.size": "gemma2_tiny",
        "batch.readers": 4,
        "batch.rows": 8,
        "mesh": (4, 2, 1),
        "tasks": ("toy_sentiment", "toy_similarity"),
    }
    straight, environment = tmp_path / "straight", {**os.environ, "PYTHONPATH": str(ROOT)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loop.train(
            changed(
                quickstart.get_config("smoke"),
                {name.replace(".", "__"): value for name, value in fields.items()},
            ),
            straight,
        )
    arguments = [
        "--config=experiments/quickstart.py:smoke",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    workdir = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "gemma_encoder",
        "launch",
        "local",
        "--processes=2",
        "--devices_per_process=4",
        "--restarts=2",
        "--",
        "train",
        *arguments,
        f"--workdir={workdir}",
    ]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

        def reached(step):
            return any(line["step"] >= step for line in read_metrics(workdir))

        wait_for(lambda: reached(4), job)
        first = child(job.pid, 1)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: child(job.pid, 1) not in (None, first) and reached(7), job)
        os.kill(child(job.pid, 0), signal.SIGTERM)
        assert job.wait(240) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert (
        "exit code -9; starting again" in log
        and "told to stop: saving step" in log
        and "exit code 75; starting again" in log
    )
    expected, found = ([line for line in read_metrics(folder)] for folder in (straight, workdir))
    assert [(line["step"], line["split"], line.get("task")) for line in expected] == [
        (line["step"], line["split"], line.get("task")) for line in found
    ]
    for one, two in zip(expected, found, strict=True):
        # The sums of eight devices are made by other code when they are two processes: float32 rounding, over nine steps.
        np.testing.assert_allclose(
            [v for k, v in two.items() if "loss" in k],
            [v for k, v in one.items() if "loss" in k],
            rtol=1e-4,
        )
