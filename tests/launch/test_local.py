"""The local launcher: starting and stopping processes, and equality with a single process."""

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


def test_dry_run_prints_the_commands(capsys):
    command = ["train", "--config=a b.py", "--workdir=runs/x"]
    assert (
        local.main(["--processes=2", "--devices_per_process=4", "--dry_run", "--", *command]) == 0
    )
    shared = (
        "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 "
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2"
    )
    program = f"{sys.executable} -m gemma_encoder train '--config=a b.py' --workdir=runs/x"
    assert capsys.readouterr().out.splitlines() == [
        f"env {shared} JAX_PROCESS_ID={index} {program}" for index in (0, 1)
    ]


@pytest.mark.parametrize("flag", ["--processes=0", "--devices_per_process=-1"])
def test_invalid_counts_are_rejected(flag, capsys):
    with pytest.raises(SystemExit):
        local.main([flag, "--dry_run"])
    assert "must be at least 1" in capsys.readouterr().err


def run_job(code: str, count: int = 2) -> int:
    """Runs `code` in `count` processes, each with its index as `n`, and returns the exit code."""
    program = f"import os, signal, sys, time\nn = int(os.environ['N'])\n{code}"
    environments = [{"N": str(index)} for index in range(count)]
    return local.LocalJob([sys.executable, "-c", program], environments).run()


def test_success_of_all_processes_is_success(capfd):
    assert run_job("print('line of', n)") == 0
    captured = capfd.readouterr()
    assert "line of 0" in captured.out
    assert "[1] line of 1" in captured.err


@pytest.mark.parametrize(
    ("failure", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_failure_of_one_process_stops_the_others(failure, code):
    began = time.monotonic()
    assert run_job(f"if n: {failure}\ntime.sleep(60)") == code
    assert time.monotonic() - began < 30


# Process 1 holds a lock until it ends; process 0 fails as soon as it gets the lock.
LOSES_ITS_PEER = """
import fcntl, pathlib
file = open({path!r}, "a")
if n:
    fcntl.flock(file, fcntl.LOCK_EX)
    pathlib.Path({path!r} + ".locked").touch()
    time.sleep(0.2)
    {cause}
while not os.path.exists({path!r} + ".locked"): time.sleep(0.01)
fcntl.flock(file, fcntl.LOCK_EX)
{consequence}
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
ABORTED = "os.kill(os.getpid(), signal.SIGABRT)"


@pytest.mark.parametrize(
    ("cause", "consequence", "code"),
    [
        (KILLED, "os._exit(1)", -signal.SIGKILL),
        (KILLED, ABORTED, -signal.SIGKILL),
        ("os._exit(3)", ABORTED, 3),
    ],
)
def test_the_cause_of_a_failure_is_reported(cause, consequence, code, tmp_path):
    for attempt in range(3):
        options = {"path": str(tmp_path / str(attempt)), "cause": cause}
        assert run_job(LOSES_ITS_PEER.format(**options, consequence=consequence)) == code


# Process 0 is killed at its first start, preempted at its second, and succeeds at its third.
FAILS_TWICE = """
import os, signal, sys
path = {path!r}
first = os.environ["JAX_PROCESS_ID"] == "0"
if first: open(path, "a").write("x")
else: sys.exit(0)
count = len(open(path).read())
if count == 1: os.kill(os.getpid(), signal.SIGKILL)
if count == 2: sys.exit(75)
"""


def test_restarts_follow_kills_and_preemptions(monkeypatch, tmp_path):
    starts = tmp_path / "starts"
    command = [sys.executable, "-c", FAILS_TWICE.format(path=str(starts))]
    local_job = local.LocalJob
    monkeypatch.setattr(local, "LocalJob", lambda _, environments: local_job(command, environments))
    assert local.main(["--restarts=1"]) == 75
    assert starts.read_text() == "xx"
    starts.unlink()
    assert local.main([]) == 128 + 9
    starts.unlink()
    assert local.main(["--restarts=2"]) == 0
    assert starts.read_text() == "xxx"


# Starts leave a line each; the launcher of process 0 gets a signal at the first.
IS_STOPPED = """
import os, pathlib, signal, sys, time
first = os.environ["JAX_PROCESS_ID"] == "0"
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
if first:
    with open({path!r}, "a") as file: file.write("x")
    os.kill(os.getppid(), signal.{signum})
time.sleep(60)
"""


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("code", [75, 3])
def test_a_job_that_is_told_to_stop_is_not_restarted(signum, code, monkeypatch, tmp_path):
    starts = str(tmp_path / "starts")
    program = IS_STOPPED.format(path=starts, signum=signum, code=code)
    command = [sys.executable, "-c", program]
    local_job = local.LocalJob
    monkeypatch.setattr(local, "LocalJob", lambda _, environments: local_job(command, environments))
    before = signal.getsignal(signal.SIGTERM)
    assert local.main(["--restarts=3"]) == code
    assert pathlib.Path(starts).read_text() == "x"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_job_whose_processes_are_killed_is_one_line(signum, code, is_deaf, monkeypatch, capsys):
    """Before Python handles signals in the processes, or by a second signal."""
    kill = f"import os, signal, time; os.kill(os.getppid(), signal.{signum})"
    if is_deaf:
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        kill = kill.replace("time;", f"time; {ignore};") + f"; time.sleep(0.5); {kill[25:]}"
    kill += "; time.sleep(60)"
    local_job = local.LocalJob
    monkeypatch.setattr(
        local,
        "LocalJob",
        lambda _, environments: local_job([sys.executable, "-c", kill], environments),
    )
    assert local.main(["--processes=1", "--restarts=3"]) == code
    assert capsys.readouterr().err.count("rerun the command to resume from saved work\n") == 1


def child(parent: int, index: int) -> int | None:
    """Returns the ID of the child of `parent` with a process index, None if it is not running."""
    variable = f"JAX_PROCESS_ID={index}".encode()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(fields[1]) == parent and variable in variables:
            return int(folder.name)
    return None


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the job ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


FIELDS = {
    "train_for": "9 steps",
    "checkpoint_every": "3 steps",
    "log_every": "1 steps",
    "evaluate_every": "9 steps",
    "max_eval_examples": 8,
    "model.size": "gemma2_tiny",
    "batch.readers": 4,
    "batch.rows": 16,
    "batch.micro_batches": 2,
    "mesh": (4, 2, 1),
    # The loss of the second compares the texts of both micro-batches and both processes.
    "tasks": ("toy_sentiment", "toy_retrieval"),
    "mixture.mixing": "equal",
}


def start_two_processes(workdir: pathlib.Path, log) -> subprocess.Popen:
    """Starts training in two processes of four devices each."""
    launcher = [sys.executable, "-m", "gemma_encoder", "launch", "local"]
    options = ["--processes=2", "--devices_per_process=4", "--restarts=2"]
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    training = [
        "train",
        "--config=experiments/quickstart.py:smoke",
        *fields,
        f"--workdir={workdir}",
    ]
    return subprocess.Popen(
        [*launcher, *options, "--", *training],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
    )


def kill_then_preempt(job: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Kills process 1 after step 4, and sends SIGTERM to process 0 after step 7."""

    def reached(step):
        return any(line["step"] >= step for line in read_metrics(workdir))

    wait_for(lambda: reached(4), job)
    first = child(job.pid, 1)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: child(job.pid, 1) not in (None, first) and reached(7), job)
    os.kill(child(job.pid, 0), signal.SIGTERM)


def test_two_interrupted_processes_equal_one_process(changed, tmp_path):
    """Two processes of four devices, killed and preempted, have the losses of one with eight."""
    fields = {name.replace(".", "__"): value for name, value in FIELDS.items()}
    config = changed(quickstart.get_config("smoke"), fields)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loop.train(config, tmp_path / "one")
    with (tmp_path / "log").open("w") as file:
        job = start_two_processes(tmp_path / "two", file)
        kill_then_preempt(job, tmp_path / "two")
        assert job.wait(240) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "exit code -9; restarting" in log
    assert "preempted: saving step" in log
    assert "exit code 75; restarting" in log
    expected = list(read_metrics(tmp_path / "one"))
    actual = list(read_metrics(tmp_path / "two"))
    assert [(line["step"], line["split"], line.get("task")) for line in expected] == [
        (line["step"], line["split"], line.get("task")) for line in actual
    ]
    for expected_line, actual_line in zip(expected, actual, strict=True):
        # Eight devices in two processes sum in another order than in one: float32 rounding,
        # accumulated over nine steps.
        np.testing.assert_allclose(
            [value for key, value in actual_line.items() if "loss" in key],
            [value for key, value in expected_line.items() if "loss" in key],
            rtol=1e-4,
        )
