"""What runs on a worker: once, apart from the connection, with an exit code that can be asked for again."""

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
def test_the_exit_code_is_reported(home, program, code):
    process = start("run", "first", sys.executable, "-c", program)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert output.splitlines()[-1] == f"worker-report: {os.uname().nodename} run ended with {code}."
    assert ("hello" in output) == (code == 0)


def test_a_second_connection_follows_the_command_that_runs(home):
    """The first breaks; the command goes on, is not started twice, and its end is told to the second, and to a third."""
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


def test_a_machine_that_shuts_down_lets_the_command_save(home):
    """SIGTERM reaches all processes; what starts the command waits for its exit code."""
    program = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('up', flush=True)\ntime.sleep(60)"
    process = start("run", "first", sys.executable, "-c", program)
    assert process.stdout.readline().endswith(": up\n")
    until(lambda: (home / "first" / "pid").exists() and (home / "first" / "pid").read_text())
    os.killpg(int((home / "first" / "pid").read_text()), signal.SIGTERM)
    assert "ended with 75." in process.communicate(timeout=30)[0]


def test_a_command_that_is_gone_without_a_word_is_lost(home):
    (home / "first" / "started").touch()
    (home / "first" / "log").write_text("step 7\n")
    (home / "first" / "pid").write_text("999999999")
    process = start("run", "first", "true")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == worker.LOST and ": step 7\n" in output


@pytest.mark.parametrize("fails", ["", "pip", "uv"])
def test_install(home, tmp_path, monkeypatch, fails):
    """The code is unpacked, and the locked versions are asked for; pip and uv are stand-ins."""
    with tarfile.open(home / "first.tar.gz", "w:gz") as archive:
        archive.add(WORKER, "launch/worker.py")
    (home / "first" / "code" / "old.py").touch()
    for name in ("pip", "uv"):
        (tmp_path / "modules").mkdir(exist_ok=True)
        text = f"import sys; open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(['{name}', *sys.argv[1:]]) + '\\n'); sys.exit({3 * (name == fails)})"
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    process = start("install", "first")
    output, _ = process.communicate(timeout=30)
    assert (
        process.returncode == (3 if fails else 0)
        and f"install ended with {process.returncode}." in output
    )
    assert (home / "first" / "code" / "launch" / "worker.py").exists() and not (
        home / "first" / "code" / "old.py"
    ).exists()
    calls = [
        "pip install --user --quiet uv",
        f"uv venv --quiet --python=3.11 {home / 'first' / 'env'}",
        f"uv pip install --quiet --python={home / 'first' / 'env'} --constraint=requirements/py311-test.txt .[train,tpu]",
    ]
    made = {"": 3, "pip": 1, "uv": 2}[fails]
    assert (tmp_path / "calls").read_text().splitlines() == calls[:made]
