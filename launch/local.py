"""Runs a command as several processes on this machine: real multi-process JAX, on CPUs.

    gemma-encoder launch local --processes=2 --devices_per_process=4 -- \\
      train --config=quickstart --workdir=runs/two

Everything after `--` is a `gemma-encoder` command with its arguments. The output of process 0 is
passed through; lines of the other processes are prefixed with their process index. When a process
fails, the others are stopped and its exit code is returned. `--restarts=N` restarts all processes
up to N times after a kill or a preemption. SIGTERM and Ctrl-C are forwarded to all processes.
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
from types import FrameType
from typing import IO

from gemma_encoder import stopping, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.runtime import COORDINATOR_ADDRESS, EXIT_PREEMPTED, NUM_PROCESSES, PROCESS_ID

GRACE = 60.0  # seconds between SIGTERM and SIGKILL
MOMENT = 0.3  # seconds for further processes to fail by themselves, after the first


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    args = _parser().parse_args(argv)
    command = [sys.executable, "-m", "gemma_encoder", *args.arguments]
    if args.dry_run:
        for environment in environments(args.processes, args.devices_per_process, "127.0.0.1:PORT"):
            variables = [f"{name}={value}" for name, value in environment.items()]
            terminal.print_result(shlex.join(["env", *variables, *command]))
        return 0
    for restarts_left in reversed(range(args.restarts + 1)):
        coordinator = f"127.0.0.1:{_free_port()}"
        job = LocalJob(command, environments(args.processes, args.devices_per_process, coordinator))
        code = job.run()
        can_resume = code < 0 or code == EXIT_PREEMPTED
        if not restarts_left or not can_resume or job.received:
            break
        terminal.print_message(
            f"launch local: exit code {code}; restarting, {restarts_left - 1} restarts left"
        )
    # It came before Python handled signals, or a second one came.
    if job.received and code in (-signal.SIGTERM, -signal.SIGKILL):
        terminal.print_message(stopping.LINES[job.received])
        return stopping.CODES[job.received]
    return 128 - code if code < 0 else code  # the way shells report a signal


def _parser() -> argparse.ArgumentParser:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder launch local",
        description=__doc__,
    )
    parser.add_argument(
        "--processes", type=_count, default=2, help="number of processes (default 2)"
    )
    parser.add_argument(
        "--devices_per_process", type=_count, default=1, help="CPU devices per process (default 1)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        help="number of restarts after a kill or a preemption (default 0)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands and start nothing"
    )
    parser.add_argument("arguments", nargs="*", help="after --: a command of gemma-encoder")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def environments(processes: int, devices: int, coordinator: str) -> list[dict[str, str]]:
    """Returns the environment variables to add for each process.

    Args:
        processes: number of processes.
        devices: number of CPU devices per process.
        coordinator: HOST:PORT of the coordinator.
    """
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        COORDINATOR_ADDRESS: coordinator,
        NUM_PROCESSES: str(processes),
    }
    return [{**shared, PROCESS_ID: str(index)} for index in range(processes)]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class LocalJob:
    """A group of processes that start and stop together.

    Args:
        command: the argument list that every process runs.
        environments: environment variables of each process, added to the current environment.

    Attributes:
        received: the first signal to stop; None before.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]):
        self._command = command
        self._environments = environments
        self._processes: list[subprocess.Popen] = []
        self.received: int | None = None

    def run(self) -> int:
        """Starts all processes, waits for them and returns an exit code.

        The code is that of the process that made the others fail, negative for a signal, or 0.
        """
        handlers = {
            signum: signal.signal(signum, self._receive)
            for signum in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            printers = self._start()
            failure = self._wait()
            for printer in printers:
                printer.join()
            return failure or self._failure()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            return
        for process in self._processes:  # at the second signal, without waiting for them
            process.kill()

    def _start(self) -> list[threading.Thread]:
        """Starts the processes, and threads that print the output of all but the first."""
        for index, environment in enumerate(self._environments):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if index else {}
            self._processes.append(
                subprocess.Popen(self._command, env={**os.environ, **environment}, **pipes)
            )
        printers = [
            threading.Thread(target=_print_lines, args=(index, process.stdout))
            for index, process in enumerate(self._processes)
            if index
        ]
        for printer in printers:
            printer.start()
        return printers

    def _wait(self) -> int:
        """Waits for all processes, and stops them when one fails or a signal was received.

        Returns:
            The exit code of the process that made the others fail, 0 if none failed before.
        """
        failure = 0
        while self._running():
            if not failure and self._failure():
                time.sleep(MOMENT)
                self._running()
                failure = self._failure()
            if failure or self.received:
                # The remaining processes would wait a long time for one that is gone.
                is_urgent = failure not in (0, EXIT_PREEMPTED) and not self.received
                self._stop(0.0 if is_urgent else GRACE)
            time.sleep(0.1)
        return failure

    def _failure(self) -> int:
        """Returns the exit code of the process that made the others fail, 0 if none failed.

        A process that lost its peer fails within milliseconds, with an error or by aborting: what
        tells them apart is the kind of their exit.
        """
        failures = [process.returncode for process in self._processes if process.returncode]
        killed = [code for code in failures if code < 0 and code != -signal.SIGABRT]
        failed = [code for code in failures if code > 0]
        return [*killed, *failed, *failures, 0][0]

    def _running(self) -> bool:
        """Returns True if any process is running."""
        # Poll every process, so that each has its return code set.
        return None in [process.poll() for process in self._processes]

    def _stop(self, grace: float = GRACE) -> None:
        """Sends SIGTERM to all processes, and SIGKILL after `grace` seconds."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM) if grace else process.kill()
        deadline = time.monotonic() + grace
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self._processes:
            if process.poll() is None:
                process.kill()


def _print_lines(index: int, stream: IO[bytes]) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        terminal.print_one_line(f"[{index}] {text}")
