"""Reports on stderr what a program is doing while it writes nothing else, such as compiling.

    with activity.reporting():  # once, around a program
        with activity.during("loading the weights"):
            ...
        with activity.compiling("the training step"):
            ...

An activity is named again whenever nothing was written for five seconds. Without `reporting`, as
where the package is used as a library, nothing is written. Importing this module is fast.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gemma_encoder import terminal
from gemma_encoder.runtime import PROCESS_ID

LONGEST_SILENCE = 5.0  # seconds
TICK = 0.5  # seconds between two looks at the clock


class _Activity(NamedTuple):
    text: str | Callable[[], str]
    began: float

    def __str__(self) -> str:
        return self.text if isinstance(self.text, str) else self.text()


def print_line(text: str) -> None:
    """Prints a line on stderr; nothing for an empty text."""
    if text:
        terminal.print_one_line(text)


def shows_bars() -> bool:
    """Returns True if stderr shows progress bars: in a notebook, or on a terminal with a size.

    On a terminal of no size, such as that of a job or of `script`, tqdm writes nothing.
    """
    if "ipykernel" in sys.modules:
        return True
    if not _is_terminal():
        return False
    try:
        return all(os.get_terminal_size(sys.stderr.fileno()))
    except (OSError, ValueError):  # the size is unknown, and tqdm assumes one
        return True


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


class Reporter:
    """Names the innermost activity when it begins, and again after each silence.

    Args:
        clock: returns seconds.

    Attributes:
        show: writes a text, "" after the last activity; replaced where there is a progress bar.
        is_quiet: write nothing, as on all processes of a run but the main one.
        announces: name compiling when it begins, too, as in training, which shows its progress.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.show: Callable[[str], None] = print_line
        self.is_quiet = os.environ.get(PROCESS_ID, "0") != "0"
        self.announces = False
        self._clock = clock
        self._lock = threading.RLock()
        self._activities: list[_Activity] = []
        self._written_at = clock()

    def note_output(self) -> None:
        """Notes that something else was written, which ends the silence."""
        self._written_at = self._clock()

    @contextlib.contextmanager
    def during(self, text: str | Callable[[], str], *, announce: bool = False) -> Iterator[None]:
        """Names an activity while it lasts; at its beginning, too, with `announce`."""
        activity = _Activity(text, self._clock())
        with self._lock:
            self._activities.append(activity)
            if announce:
                self._write(f"{activity} …")
        try:
            yield
        finally:
            with self._lock:
                self._activities.remove(activity)
                if self.show is not print_line:
                    self._write(str(self._activities[-1]) if self._activities else "")

    def beat(self) -> None:
        """Names the innermost activity if nothing was written for about five seconds."""
        with self._lock:
            now = self._clock()
            if not self._activities or now - self._written_at < LONGEST_SILENCE - 2 * TICK:
                return
            activity = self._activities[-1]
            seconds = round(now - activity.began)
            self._write(f"{activity} … {seconds} s" if seconds else f"{activity} …")

    def _write(self, text: str) -> None:
        self.note_output()
        if not self.is_quiet:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed
                self.show(text)


_reporters: list[Reporter] = []
_compiled: list[float] = [0.0]  # seconds


@contextlib.contextmanager
def reporting() -> Iterator[Reporter]:
    """Reports activities of this process; within another `reporting`, that one continues."""
    if _reporters:
        yield _reporters[0]
        return
    reporter = Reporter()
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(TICK):
            reporter.beat()

    thread = threading.Thread(target=beat, name="activity", daemon=True)
    thread.start()
    _reporters.append(reporter)
    try:
        yield reporter
    finally:
        _reporters.remove(reporter)
        is_over.set()
        thread.join()


def current() -> Reporter | None:
    """Returns the reporter of this process; None outside `reporting`."""
    return _reporters[0] if _reporters else None


@contextlib.contextmanager
def during(text: str | Callable[[], str], *, announce: bool = False) -> Iterator[None]:
    """Names an activity while it lasts, see `Reporter.during`; does nothing without `reporting`."""
    reporter = current()
    if reporter is None:
        yield
    else:
        with reporter.during(text, announce=announce):
            yield


@contextlib.contextmanager
def starting(text: str) -> Iterator[None]:
    """Names an activity, on a terminal only, before a program has checked its arguments.

    Elsewhere a refusal stays the only line on stderr, however slow imports are.
    """
    if _is_terminal():
        with during(text):
            yield
    else:
        yield
    note_output()


def note_output() -> None:
    """Notes that something was written, which ends the silence."""
    for reporter in _reporters:
        reporter.note_output()


@contextlib.contextmanager
def compiling(program: str, clock: Callable[[], float] | None = None) -> Iterator[None]:
    """Says that a program is being compiled, and counts the time in `compile_seconds`."""
    reporter = current()
    announce = reporter is not None and reporter.announces
    clock = clock or time.monotonic
    began = clock()
    try:
        with during(f"compiling {program}", announce=announce):
            yield
    finally:
        _compiled[0] += clock() - began


def compile_seconds() -> float:
    """Returns the seconds that this process has spent in `compiling`."""
    return _compiled[0]
