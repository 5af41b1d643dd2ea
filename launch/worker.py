"""Program on each TPU VM: installs the code once, runs a command once, reports the exit code.

Uses only the standard library and supports Python 3.8 or later.

    python3 worker.py install NAME       # unpacks ~/NAME.tar.gz to ~/NAME/code, makes ~/NAME/env
    python3 worker.py run NAME COMMAND…  # runs in ~/NAME/code, logs to ~/NAME/log

When a connection breaks, gcloud reconnects and repeats the command. Therefore `run` starts the
command detached from the connection, and a second `run` follows the command that is already
running. gcloud's own exit code is unreliable: it is 0 even if no machine could be reached.
Therefore both steps end with a report line, which the launcher counts.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

REPORT = "worker-report: {host} {step} ended with {code}."
LOST = 255  # the command is gone and left no exit code: the machine restarted
POLL = 0.2  # seconds


def install(folder: pathlib.Path) -> int:
    """Unpacks the code and creates its environment from the locked versions.

    libtpu is the one that jax[tpu] requires; only the lock of the tests pins it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(f"{folder}.tar.gz") as archive:
        archive.extractall(folder / "code")
    uv = [sys.executable, "-m", "uv"]
    # The system's Python is older than 3.11; uv downloads that version.
    for command in (
        [sys.executable, "-m", "pip", "install", "--user", "--quiet", "uv"],
        [*uv, "venv", "--quiet", "--python=3.11", str(folder / "env")],
        [
            *uv,
            "pip",
            "install",
            "--quiet",
            f"--python={folder / 'env'}",
            "--constraint=requirements/py311-test.txt",
            ".[train,tpu]",
        ],
    ):
        code = subprocess.run(command, cwd=folder / "code", stdin=subprocess.DEVNULL).returncode
        if code:
            print(f"failed with {code}: {command}", flush=True)
            return code
    return 0


def run_once(folder: pathlib.Path, command: list) -> int:
    """Starts a command, or finds the one that is already running, and follows it to its end."""
    process = _start(folder, command) if _claim(folder / "started") else None
    exit_code = folder / "exit_code"
    log = folder / "log"
    with log.open("rb") as file:
        if process is None:
            file.seek(max(log.stat().st_size - 2000, 0))
        while True:
            if process is None:
                over = exit_code.exists() or not _alive(folder / "pid")
            else:
                over = exit_code.exists() or process.poll() is not None
            for text in file:
                _write_line(text)
            if over:
                break
            time.sleep(POLL)
    return int(exit_code.read_text(encoding="utf-8")) if exit_code.exists() else LOST


def _start(folder: pathlib.Path, command: list) -> subprocess.Popen:
    """Starts this file's `supervise` step in a new session, which outlives the connection."""
    supervisor = [sys.executable, os.path.abspath(__file__), "supervise", str(folder), *command]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            supervisor, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _write_whole(folder / "pid", process.pid)
    return process


def supervise(folder: pathlib.Path, command: list) -> int:
    """Runs a command, detached from any connection, and writes its exit code to a file."""
    # A machine that shuts down sends SIGTERM to all processes. The command saves its state, and the
    # supervisor waits for it. It installs a handler because the command would inherit SIG_IGN.
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = subprocess.run(command, cwd=folder / "code").returncode
    shown = code if code >= 0 else 128 - code  # the way shells report a signal
    _write_whole(folder / "exit_code", shown)
    return 0


def _write_whole(path: pathlib.Path, value: int) -> None:
    """Writes a whole number to a file that appears as a whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(str(value), encoding="utf-8")
    partial.replace(path)


def _claim(path: pathlib.Path) -> bool:
    """Creates a file and returns True if it did not exist."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def _alive(path: pathlib.Path) -> bool:
    """Returns True if the process whose ID is in a file exists."""
    try:
        os.kill(int(path.read_text(encoding="utf-8")), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return True


def _write_line(text: bytes) -> None:
    """Writes a line in a single call, prefixed by the host, since all hosts share one terminal."""
    os.write(1, f"{socket.gethostname()}: ".encode() + text.rstrip(b"\n") + b"\n")


def main(argv: list) -> int:
    """Runs a step and returns its exit code."""
    step = argv[1]
    folder = pathlib.Path.home() / argv[2]
    if step == "supervise":
        return supervise(folder, argv[3:])
    code = install(folder) if step == "install" else run_once(folder, argv[3:])
    report = REPORT.format(host=socket.gethostname(), step=step, code=code)
    os.write(1, (report + "\n").encode())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
