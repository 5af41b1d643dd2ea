"""Starts a command as several processes on this machine: real multi-process JAX, on CPUs.

    gemma-encoder launch local --processes=2 --devices_per_process=4 -- train --config=quickstart --workdir=runs/two

What follows `--` is a command of `gemma-encoder` with its arguments. Lines of process 0 appear as
they are, those of the others with their number before them. When one process fails, the others are
stopped, and its exit code is this program's; `--restarts=N` starts all of them again, up to N times,
when one was killed or the run was told to stop. SIGTERM and Ctrl-C are passed on to all.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from gemma_encoder.runtime import COORDINATOR_ADDRESS, EXIT_PREEMPTED, NUM_PROCESSES, PROCESS_ID

GRACE = 60.0  # seconds between asking a process to stop and killing it


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="gemma-encoder launch local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=_count, default=2, help="how many (default 2)")
    parser.add_argument(
        "--devices_per_process", type=_count, default=1, help="CPU devices of each (default 1)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        help="how often to start again after a kill or a notice to stop (default 0)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what would be started, and start nothing"
    )
    parser.add_argument("arguments", nargs="*", help="after --: a command of gemma-encoder")
    args = parser.parse_args(argv)
    command = [sys.executable, "-m", "gemma_encoder", *args.arguments]
    if args.dry_run:
        for environment in environments(args.processes, args.devices_per_process, "127.0.0.1:PORT"):
            print(
                shlex.join(
                    ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
                )
            )
        return 0
    for left in reversed(range(args.restarts + 1)):
        code = LocalJob(
            command,
            environments(args.processes, args.devices_per_process, f"127.0.0.1:{_free_port()}"),
        ).run()
        if left and (code < 0 or code == EXIT_PREEMPTED):
            print(
                f"launch local: exit code {code}; starting again, {left - 1} restarts left",
                file=sys.stderr,
                flush=True,
            )
            continue
        break
    return 128 - code if code < 0 else code  # as a shell reports a signal


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def environments(processes: int, devices: int, coordinator: str) -> list[dict[str, str]]:
    """The variables that each process gets besides those of this one."""
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        COORDINATOR_ADDRESS: coordinator,
        NUM_PROCESSES: str(processes),
    }
    return [{**shared, PROCESS_ID: str(number)} for number in range(processes)]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class LocalJob:
    """One start of all processes.

    Args:
        command: what each runs.
        environments: what each gets besides this process's environment.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]):
        self._processes = []
        for number, environment in enumerate(environments):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if number else {}
            self._processes.append(
                subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
            )
        self._printers = [
            threading.Thread(target=_print, args=(number, process.stdout))
            for number, process in enumerate(self._processes)
            if number
        ]

    def run(self) -> int:
        """Waits for all; returns the exit code of the first that failed, negative for a signal, or 0."""
        for printer in self._printers:
            printer.start()
        before = {
            number: signal.signal(number, lambda *_: self._stop())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        failed = 0
        while self._running():
            failed = failed or next(
                (process.returncode for process in self._processes if process.returncode), 0
            )
            if failed:
                # A process that waits for one that is gone would wait for long.
                self._stop(GRACE if failed == EXIT_PREEMPTED else 0.0)
            time.sleep(0.1)
        for printer in self._printers:
            printer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        return failed or next(
            (process.returncode for process in self._processes if process.returncode), 0
        )

    def _running(self) -> bool:
        """Whether any process still runs; each is asked, so that each has its return code."""
        return None in [process.poll() for process in self._processes]

    def _stop(self, grace: float = GRACE) -> None:
        """Asks all to stop, and kills them after `grace` seconds."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM) if grace else process.kill()
        deadline = time.monotonic() + grace
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self._processes:
            if process.poll() is None:
                process.kill()


def _print(number: int, stream: IO[bytes]) -> None:
    for line in stream:
        sys.stderr.write(f"[{number}] {line.decode(errors='replace')}")
        sys.stderr.flush()
