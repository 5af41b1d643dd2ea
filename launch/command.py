"""Running commands of this machine: argument lists only, never a shell; and what happens when someone stops the launcher."""

import collections
import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gemma_encoder.inputs.errors import InputError

TAIL = 30  # lines that are shown again where something failed
PATIENCE = 10.0  # seconds between asking a command to end and ending it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Result(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code.
        output: what it printed; of `stream`, the last lines.
        errors: what it printed as errors; of `stream`, part of the output.
    """

    code: int
    output: str
    errors: str = ""

    def json(self) -> dict | None:
        """The JSON object that it printed; None where it failed or printed something else."""
        try:
            answer = json.loads(self.output) if self.code == 0 else None
        except json.JSONDecodeError:
            answer = None
        return answer if isinstance(answer, dict) else None


class Interrupted(BaseException):
    """Someone asked the launcher to stop; like KeyboardInterrupt, no `except Exception` catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def line(arguments: Sequence[str]) -> str:
    """An argument list as one line that a shell reads back as the same list."""
    return shlex.join(arguments)


def run_command(arguments: Sequence[str]) -> Result:
    """Runs a short command and keeps what it prints.

    Raises:
        InputError: there is no such program.
    """
    with _started(arguments, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
    return Result(process.returncode, output, errors)


def stream(
    arguments: Sequence[str],
    log: pathlib.Path,
    see: Callable[[str], None] = lambda text: None,
    stdin: pathlib.Path | None = None,
) -> Result:
    """Runs a command while its lines go to the terminal and to a file.

    Args:
        arguments: the command.
        log: the file, which grows.
        see: called with each line.
        stdin: the file that the command reads; none by default.

    Raises:
        InputError: there is no such program.
    """
    tail = collections.deque(maxlen=TAIL)
    with (
        log.open("a") as file,
        _started(arguments, stderr=subprocess.STDOUT, stdin=stdin) as process,
    ):
        file.write(f"$ {line(arguments)}\n")
        for text in process.stdout:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()
            tail.append(text)
            see(text)
        process.wait()
    return Result(process.returncode, "".join(tail))


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], stderr: int, stdin: pathlib.Path | None = None
) -> Iterator[subprocess.Popen]:
    """A running command; it ends with the block, however the block ends."""
    source = stdin.open("rb") if stdin else subprocess.DEVNULL
    try:
        # A session of its own: what the terminal sends on Ctrl-C goes to the launcher, which knows what must be ended first.
        process = subprocess.Popen(
            list(arguments),
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{arguments[0]} is not on the PATH; launch/README.md says what to install"
        ) from error
    finally:
        if stdin:
            source.close()
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()
        if process.stderr:
            process.stderr.close()


class Signals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP raise Interrupted, within `held` only at its end."""

    def __init__(self):
        self._holding, self._pending = False, None

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
        """For what must not be left half done: asking for machines, and giving them back."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending is not None:
            signum, self._pending = self._pending, None
            raise Interrupted(signum)


def sleep(seconds: float) -> None:
    """Waits between two looks at a state."""
    time.sleep(seconds)
