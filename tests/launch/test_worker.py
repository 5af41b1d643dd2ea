"""The worker program runs a command once, detached, and reports its exit code on every request."""

import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from gemma_encoder.launch import cluster, worker

WORKER = cluster.ROOT / "launch" / "worker.py"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "first" / "code").mkdir(parents=True)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments], stdout=subprocess.PIPE, text=True
    )


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("print('hello')", 0),
        ("import sys; sys.exit(75)", 75),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_exit_code_is_reported(home, program, code):
    process = start("run", "first", sys.executable, "-c", program)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert output.splitlines()[-1] == f"worker-report: {os.uname().nodename} run ended with {code}."
    assert ("hello" in output) == (code == 0)


def test_second_connection_follows_the_running_command(home):
    """After the first connection breaks, the command continues and is not started twice.

    The second and third connections report its exit code.
    """
    program = (
        "import pathlib, time\nopen('starts', 'a').write('x')\nprint('up', flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\nprint('end')"
    )
    command = ("run", "first", sys.executable, "-c", program)
    first = start(*command)
    assert first.stdout.readline().endswith(": up\n")
    first.kill()
    first.communicate()
    second = start(*command)
    assert second.stdout.readline().endswith(": up\n")
    (home / "first" / "code" / "go").touch()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 0 and ": end\n" in output
    third = start(*command)
    assert "ended with 0." in third.communicate(timeout=30)[0]
    assert (home / "first" / "code" / "starts").read_text() == "x"


def test_machine_shutdown_lets_the_command_save(home):
    """SIGTERM reaches all processes, and the supervisor waits for the command's exit code."""
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    process = start("run", "first", sys.executable, "-c", program)
    assert process.stdout.readline().endswith(": up\n")
    pid_file = home / "first" / "pid"
    until(lambda: pid_file.exists() and pid_file.read_text())
    os.killpg(int(pid_file.read_text()), signal.SIGTERM)
    assert "ended with 75." in process.communicate(timeout=30)[0]


def test_command_without_exit_code_is_lost(home):
    (home / "first" / "started").touch()
    (home / "first" / "log").write_text("step 7\n")
    (home / "first" / "pid").write_text("999999999")
    process = start("run", "first", "true")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == worker.LOST and ": step 7\n" in output


@pytest.mark.parametrize("fails", ["", "pip", "uv"])
def test_install(home, tmp_path, monkeypatch, fails):
    """The code is unpacked and the locked versions are requested from fake pip and uv modules."""
    code = home / "first" / "code"
    with tarfile.open(home / "first.tar.gz", "w:gz") as archive:
        archive.add(WORKER, "launch/worker.py")
    (code / "old.py").touch()
    (tmp_path / "modules").mkdir()
    for name in ("pip", "uv"):
        module = (
            "import sys\n"
            f"call = ' '.join(['{name}', *sys.argv[1:]])\n"
            f"open({str(tmp_path / 'calls')!r}, 'a').write(call + '\\n')\n"
            f"sys.exit({3 if name == fails else 0})"
        )
        (tmp_path / "modules" / f"{name}.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    process = start("install", "first")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (3 if fails else 0)
    assert f"install ended with {process.returncode}." in output
    assert (code / "launch" / "worker.py").exists()
    assert not (code / "old.py").exists()
    environment = home / "first" / "env"
    calls = [
        "pip install --user --quiet uv",
        f"uv venv --quiet --python=3.11 {environment}",
        f"uv pip install --quiet --python={environment} "
        "--constraint=requirements/py311-test.txt .[train,tpu]",
    ]
    call_count = {"": 3, "pip": 1, "uv": 2}[fails]
    assert (tmp_path / "calls").read_text().splitlines() == calls[:call_count]
