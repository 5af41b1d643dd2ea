"""What runs on each TPU VM: installs the code once, runs a program once, and says how it ended. Standard library only, Python 3.8 or later.

    python3 worker.py install NAME       # from ~/NAME.tar.gz: the code to ~/NAME/code, its environment to ~/NAME/env
    python3 worker.py run NAME COMMAND…  # in ~/NAME/code; its output goes to ~/NAME/log too

gcloud connects anew where a connection breaks, and then gives the command again. So `run` starts the command apart from the
connection, and a second `run` follows the one that is there. gcloud's own exit code says little: it is 0 where no machine could be
reached at all. So the last line of both is a report, which the launcher counts.
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
LOST = 255  # the command is gone and left no exit code: the machine was started anew
POLL = 0.2  # seconds


def install(folder: pathlib.Path) -> int:
    """Unpacks the code and makes its environment, at the locked versions.

    libtpu is the one that jax[tpu] asks for; the lock that names it is that of the tests.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(f"{folder}.tar.gz") as archive:
        archive.extractall(folder / "code")
    uv = [sys.executable, "-m", "uv"]
    # The system's Python is older than 3.11; uv brings one along.
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
    """Starts a command, or finds the one that was started before, and follows it to its end."""
    first = _claim(folder / "started")
    if first:
        supervise = [sys.executable, os.path.abspath(__file__), "supervise", str(folder), *command]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                supervise, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (folder / "pid").write_text(str(process.pid))
    ended, log = folder / "exit_code", folder / "log"
    with log.open("rb") as file:
        if not first:
            file.seek(max(log.stat().st_size - 2000, 0))
        while True:
            over = (
                ended.exists()
                or (not first and not _alive(folder / "pid"))
                or (first and process.poll() is not None)
            )
            for text in file:
                _say(text)
            if over:
                break
            time.sleep(POLL)
    return int(ended.read_text()) if ended.exists() else LOST


def supervise(folder: pathlib.Path, command: list) -> int:
    """Runs a command, apart from any connection, and writes down its exit code."""
    # A machine that shuts down sends SIGTERM to all; the command saves its state, and this waits for it. A handler, since what is
    # ignored would be ignored by the command too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = subprocess.run(command, cwd=folder / "code").returncode
    partial = folder / "exit_code.partial"
    partial.write_text(str(code if code >= 0 else 128 - code))  # as a shell says it
    partial.replace(folder / "exit_code")
    return 0


def _claim(path: pathlib.Path) -> bool:
    """Whether this is the first to ask."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def _alive(path: pathlib.Path) -> bool:
    try:
        os.kill(int(path.read_text()), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return True


def _say(text: bytes) -> None:
    """One line at once, named by its machine: the lines of all machines share one terminal."""
    os.write(1, f"{socket.gethostname()}: ".encode() + text.rstrip(b"\n") + b"\n")


def main(argv: list) -> int:
    """Runs a step; its exit code is the step's."""
    step, folder = argv[1], pathlib.Path.home() / argv[2]
    if step == "supervise":
        return supervise(folder, argv[3:])
    code = install(folder) if step == "install" else run_once(folder, argv[3:])
    os.write(1, (REPORT.format(host=socket.gethostname(), step=step, code=code) + "\n").encode())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
