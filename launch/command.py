"""Runs local commands from argument lists, never through a shell, and handles interruption."""

import collections
import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gemma_encoder import terminal
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json

TAIL = 30  # lines of output that are repeated after a failure
TERMINATION_SECONDS = 10.0  # seconds between SIGTERM and SIGKILL
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CommandResult(NamedTuple):
    """Exit code and output of a finished command.

    Attributes:
        code: exit code.
        output: standard output; from `stream`, only the last TAIL lines.
        errors: standard error; from `stream`, it is part of `output`.
    """

    code: int
    output: str
    errors: str = ""

    def json(self) -> dict | None:
        """Returns the printed JSON object; None if the command failed or printed anything else."""
        try:
            answer = from_json(self.output) if self.code == 0 else None
        except ValueError:
            answer = None
        return answer if isinstance(answer, dict) else None


class Interrupted(BaseException):
    """The launcher received a termination signal.

    Like KeyboardInterrupt, it is not caught by `except Exception`.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def line(arguments: Sequence[str]) -> str:
    """Quotes an argument list as one line that a shell parses back into the same list."""
    return shlex.join(arguments)


def run_command(arguments: Sequence[str]) -> CommandResult:
    """Runs a short command and captures its output.

    Raises:
        InputError: the program is not on the PATH.
    """
    with _started(arguments, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
    return CommandResult(process.returncode, output, errors)


def stream(
    arguments: Sequence[str],
    log: pathlib.Path,
    see: Callable[[str], None] = lambda text: None,
    stdin: pathlib.Path | None = None,
) -> CommandResult:
    """Runs a command and copies its output, line by line, to the terminal and to a log file.

    Args:
        arguments: the command.
        log: the file to append to.
        see: called with each line.
        stdin: file to read standard input from; empty input by default.

    Raises:
        InputError: the program is not on the PATH.
    """
    tail = collections.deque(maxlen=TAIL)
    with (
        log.open("a", encoding="utf-8", errors="backslashreplace") as file,
        _started(arguments, stderr=subprocess.STDOUT, stdin=stdin) as process,
    ):
        file.write(f"$ {line(arguments)}\n")
        for text in process.stdout:
            terminal.print_note(text.rstrip("\n"))
            file.write(text)
            file.flush()
            tail.append(text)
            see(text)
        process.wait()
    return CommandResult(process.returncode, "".join(tail))


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], stderr: int, stdin: pathlib.Path | None = None
) -> Iterator[subprocess.Popen]:
    """Starts a command and terminates it on exit from the block if it is still running."""
    source = stdin.open("rb") if stdin else subprocess.DEVNULL
    try:
        # In a new session, Ctrl-C reaches only the launcher, which decides what to end first.
        process = subprocess.Popen(
            list(arguments),
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{arguments[0]} is not on the PATH; see launch/README.md for what to install"
        ) from error
    finally:
        if stdin:
            source.close()
    try:
        yield process
    finally:
        if process.poll() is None:
            _terminate(process)
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


def _terminate(process: subprocess.Popen) -> None:
    """Sends SIGTERM to the command's process group, then SIGKILL if it does not end in time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(TERMINATION_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Signals:
    """Context manager in which SIGINT, SIGTERM and SIGHUP raise Interrupted.

    Inside `held`, a signal is deferred until the end of that block.
    """

    def __init__(self):
        self._holding = False
        self._pending = None

    def __enter__(self) -> "Signals":
        self._before = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _) -> None:
        if self._holding:
            self._pending = signum
        else:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defers signals during steps that must complete: requesting and deleting machines."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending is not None:
            signum, self._pending = self._pending, None
            raise Interrupted(signum)


def sleep(seconds: float) -> None:
    """Waits between two polls of a state."""
    time.sleep(seconds)
