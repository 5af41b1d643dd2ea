"""Fuzzing: each case damages a copy of a target and reads it through the public door.

A case is right if the answer is that of the whole files, or one line that names a file. Anything
else is a fault: a traceback, another answer (silent), a message that is none, a hang, or memory.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import gemma_encoder
from gemma_encoder.inputs.errors import InputError
from tests.fuzz.damages import damage

LIMIT = 60  # seconds; a read takes at most a few, if the machine has time
MEMORY = 1 << 30  # bytes above the memory at the start of a case
LONGEST = 700  # characters of a message
LIBRARY = pathlib.Path(gemma_encoder.__file__).parent

OUTCOMES = ("right", "one line", "unchecked", "traceback", "silent", "message", "hang", "memory")
OUTCOMES += ("crash",)
FAULTS = OUTCOMES[3:]


@dataclasses.dataclass(frozen=True)
class Target:
    """Files that are read through a public door.

    Attributes:
        name: name in reports.
        original: folder of the whole files, relative to the originals.
        read: reads a copy and returns the answer, in plain Python, NumPy arrays and bytes.
        weight: share of the cases.
        accepts: decides, for an answer that differs, if it is right, too; see `Reading`.
        names: words that a message may name instead of a path.
        advice: a regular expression that a message must match.
        is_checked: False for files without digests, whose damages cannot all be noticed.
    """

    name: str
    original: str
    read: Callable[[pathlib.Path], Any]
    weight: int = 1
    accepts: Callable[["Reading"], bool] = lambda reading: False
    names: tuple[str, ...] = ()
    advice: str = ""
    is_checked: bool = True


@dataclasses.dataclass(frozen=True)
class Reading:
    """An answer that differs from the one of the whole files.

    Attributes:
        copy: the damaged files, after they were read.
        file: the damaged file.
        answer, expected: the answers of the damaged and of the whole files.
        log: warnings that were logged meanwhile.
    """

    copy: pathlib.Path
    file: pathlib.Path
    answer: Any
    expected: Any
    log: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One damage and its outcome."""

    seed: int
    target: str
    file: str
    damage: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"seed {self.seed}: {self.target}, {self.file}, {self.damage} -> {self.outcome}{detail}"
        )

    @property
    def is_fault(self) -> bool:
        return self.outcome in FAULTS


class Fuzzer:
    """Runs cases on copies of originals.

    Args:
        targets: the targets; `weight` of them decides how often each comes up.
        originals: the folder of the whole files.
        scratch: a folder for the copy; its path is the same for all cases, as answers name it.
    """

    def __init__(
        self, targets: Sequence[Target], originals: pathlib.Path, scratch: pathlib.Path
    ) -> None:
        self._schedule = schedule(targets)
        self._originals = originals
        self._copy = scratch / "copy"
        self._expected: dict[str, Any] = {}

    def run(self, seed: int, announce: Callable[[Case], None] = lambda case: None) -> Case:
        """Runs the case of a seed, a whole number from 0; `announce` is called before."""
        target = self._schedule[seed % len(self._schedule)]
        expected = self._answer_of_whole_files(target)
        self._renew(target)
        file, description = damage(self._copy, random.Random(seed))
        name = file.relative_to(self._copy).as_posix()
        case = Case(seed, target.name, name, description, "crash")
        announce(case)
        began = time.monotonic()
        outcome, detail = self._outcome(target, expected, file)
        seconds = round(time.monotonic() - began, 3)
        return dataclasses.replace(case, outcome=outcome, detail=detail, seconds=seconds)

    def _renew(self, target: Target) -> None:
        """Copies the whole files."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._originals / target.original, self._copy)

    def _answer_of_whole_files(self, target: Target) -> Any:
        """Returns the answer, which is read twice at first: it must not depend on anything else."""
        if target.name not in self._expected:
            answers = []
            for _ in range(2):
                self._renew(target)
                answers.append(target.read(self._copy))
            if not is_same(*answers):
                raise AssertionError(f"{target.name}: two readings of whole files differ")
            self._expected[target.name] = answers[0]
        return self._expected[target.name]

    def _outcome(self, target: Target, expected: Any, file: pathlib.Path) -> tuple[str, str]:
        """Returns the outcome of reading the damaged copy, and what to know about a fault."""
        names = (str(self._copy), *target.names, *_names(self._originals / target.original))
        before = start_of_memory()
        with _warnings() as log:
            try:
                with _limit(LIMIT):
                    answer = target.read(self._copy)
            except InputError as error:
                return _outcome_of_message(str(error), names, target.advice)
            except _OvertimeError as error:
                return "hang", f"more than {LIMIT} s, in {_frames(error)}"
            except MemoryError as error:
                return "memory", f"MemoryError in {_frames(error)}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                text = " ".join(str(error).split())[:200]
                return "traceback", f"{type(error).__name__} in {_frames(error)}: {text}"
        if (growth := peak_of_memory() - before) > MEMORY:
            return "memory", f"{growth >> 20} MiB"
        if is_same(answer, expected):
            return "right", ""
        if target.accepts(Reading(self._copy, file, answer, expected, "\n".join(log))):
            return "right", ""
        if not target.is_checked:
            return "unchecked", ""
        return "silent", difference(answer, expected)


def schedule(targets: Sequence[Target]) -> list[Target]:
    """Returns the targets in the order of seeds, each as often as its weight, well mixed."""
    result = [target for target in targets for _ in range(target.weight)]
    random.Random(0).shuffle(result)
    return result


def _names(original: pathlib.Path) -> set[str]:
    return {path.name for path in original.rglob("*")}


def _outcome_of_message(message: str, names: Sequence[str], advice: str) -> tuple[str, str]:
    if "\n" in message or len(message) > LONGEST or "Traceback" in message:
        return "message", f"{len(message)} characters, {message.count(chr(10)) + 1} lines: " + (
            message[:200]
        )
    if not any(name in message for name in names):
        return "message", f"names no file: {message[:300]}"
    if not re.search(advice, message):
        return "message", f"lacks its advice: {message[:300]}"
    return "one line", message


class _OvertimeError(BaseException):
    """Raised in a read that takes too long; no `except Exception` hides it."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises _OvertimeError in the main thread after some time."""

    def stop(*_: Any) -> None:
        raise _OvertimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects warnings of absl instead of printing them."""
    logger = logging.getLogger("absl")
    handler = _Messages()
    before = logger.handlers[:]
    logger.handlers[:] = [handler]
    propagate, logger.propagate = logger.propagate, False
    try:
        yield handler.lines
    finally:
        logger.handlers[:] = before
        logger.propagate = propagate


def start_of_memory() -> int:
    """Returns this process's memory in bytes, and restarts the measurement of its peak."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or peak_of_memory()


def peak_of_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _status("VmHWM") or peak


def _status(name: str) -> int:
    """Returns a size of Linux's /proc/self/status in bytes; 0 on other systems."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def limit_memory() -> None:
    """Lets this process fail, rather than the machine, if a read asks for far too much memory."""
    used = _status("VmData")
    if used:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + 4 * MEMORY, hard))


def _frames(error: BaseException) -> str:
    """Returns the innermost frame of the library, and the innermost one of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if LIBRARY in pathlib.Path(frame.filename).parents]
    last = frames[-1]
    end = f"{os.path.basename(last.filename)}:{last.lineno}"
    if not ours:
        return end
    path = pathlib.Path(ours[-1].filename).relative_to(LIBRARY)
    inner = "" if ours[-1] == last else f" ({end})"
    return f"{path}:{ours[-1].lineno} {ours[-1].name}{inner}"


def is_same(answer: Any, expected: Any) -> bool:
    """Compares two answers to the bit."""
    return not difference(answer, expected)


def difference(answer: Any, expected: Any, where: str = "") -> str:
    """Describes the first difference of two answers; empty without one."""
    if type(answer) is not type(expected):
        return f"{where}: {type(answer).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, Mapping):
        if list(answer) != list(expected):
            return f"{where}: other keys: {list(answer)[:5]} instead of {list(expected)[:5]}"
        pairs = [(f"{where}/{key}", answer[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if len(answer) != len(expected):
            return f"{where}: {len(answer)} items instead of {len(expected)}"
        pairs = [
            (f"{where}[{index}]", one, other)
            for index, (one, other) in enumerate(zip(answer, expected, strict=True))
        ]
    elif isinstance(expected, np.ndarray):
        equal = (answer.dtype, answer.shape, answer.tobytes()) == (
            expected.dtype,
            expected.shape,
            expected.tobytes(),
        )
        return "" if equal else f"{where}: another array"
    else:  # NaN equals NaN
        return "" if repr(answer) == repr(expected) else f"{where}: another value"
    return next((text for name, a, b in pairs if (text := difference(a, b, name))), "")


def table(cases: Sequence[Case]) -> str:
    """Returns a table of outcomes by target, and the faults by kind."""
    by_target: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    seconds: collections.Counter = collections.Counter()
    for case in cases:
        for name in (case.target, "all"):
            by_target[name][case.outcome] += 1
            seconds[name] += case.seconds
    width = max(map(len, by_target), default=0)
    lines = [" ".join([f"{'':{width}}", "  tried", *(f"{name:>9}" for name in OUTCOMES), "    ms"])]
    for name in sorted(by_target, key=lambda name: (name == "all", name)):
        counts = by_target[name]
        tried = counts.total()
        columns = [f"{counts[outcome]:>9}" for outcome in OUTCOMES]
        milliseconds = f"{1000 * seconds[name] / tried:>6.0f}"
        lines.append(" ".join([f"{name:{width}}", f"{tried:>7}", *columns, milliseconds]))
    return "\n".join(lines)


def kinds_of_faults(cases: Sequence[Case]) -> list[str]:
    """Returns the faults by kind, most frequent first, each with an example."""
    groups: dict[tuple, list[Case]] = collections.defaultdict(list)
    for case in cases:
        if case.is_fault:
            kind = case.detail.split(": ")[0]
            if case.outcome == "silent":
                kind = pathlib.PurePath(case.file).name
            groups[case.target, case.outcome, kind].append(case)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [f"{len(group)} x {group[0]}" for group in ordered]
