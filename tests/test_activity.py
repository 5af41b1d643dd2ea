"""Activities are named while a program writes nothing, by a clock that the tests move."""

import os
import sys
import threading
import types

import pytest

from gemma_encoder import activity
from gemma_encoder.activity import Reporter


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reporter(clock):
    """A reporter without a thread, which collects its lines in `reporter.lines`."""
    result = Reporter(clock)
    result.lines = []
    result.show = result.lines.append
    return result


def run_for(reporter, clock, seconds):
    """Moves the clock, and lets the reporter look at it as often as its thread does."""
    for _ in range(round(seconds / activity.TICK)):
        clock.now += activity.TICK
        reporter.beat()


def test_no_silence_is_longer_than_five_seconds(reporter, clock):
    times = []
    reporter.show = lambda text: times.append(clock.now)
    with reporter.during("loading the weights"):
        run_for(reporter, clock, 60)
    gaps = [after - before for before, after in zip([100.0, *times], times, strict=False)]
    assert max(gaps) <= activity.LONGEST_SILENCE and min(gaps[:-1]) > 3


def test_an_activity_is_named_with_its_seconds(reporter, clock):
    with reporter.during("compiling the training step", announce=True):
        assert reporter.lines == ["compiling the training step …"]
        run_for(reporter, clock, 10)
    assert reporter.lines[1:3] == [
        "compiling the training step … 4 s",
        "compiling the training step … 8 s",
    ]


def test_a_new_activity_has_no_seconds(reporter, clock):
    with reporter.during("starting"):
        clock.now += 3.9
        with reporter.during("loading"):
            run_for(reporter, clock, 0.5)
    assert reporter.lines[0] == "loading …"


def test_output_ends_the_silence(reporter, clock):
    with reporter.during("training"):
        for _ in range(20):
            run_for(reporter, clock, 3)
            reporter.note_output()
    assert reporter.lines == [""]


def test_the_innermost_activity_is_named(reporter, clock):
    with reporter.during(lambda: f"training at {clock.now:.0f}"):
        with reporter.during("evaluating"):
            run_for(reporter, clock, 4)
        run_for(reporter, clock, 4)
    run_for(reporter, clock, 60)  # nothing is going on
    assert reporter.lines == ["evaluating … 4 s", "training at 104", "training at 108 … 8 s", ""]


def test_an_error_ends_an_activity(reporter, clock):
    with pytest.raises(ZeroDivisionError), reporter.during("dividing"):
        raise ZeroDivisionError
    run_for(reporter, clock, 10)
    assert reporter.lines == [""]


def test_other_processes_and_a_closed_stderr_are_quiet(reporter, clock, monkeypatch):
    def closed(text):
        raise ValueError("I/O operation on closed file")

    reporter.is_quiet = True
    with reporter.during("loading", announce=True):
        run_for(reporter, clock, 10)
    assert not reporter.lines
    reporter.is_quiet = False
    reporter.show = closed
    with reporter.during("loading", announce=True):
        run_for(reporter, clock, 10)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert Reporter().is_quiet


def test_nothing_is_written_outside_reporting(capsys):
    assert activity.current() is None
    with activity.compiling("a program"), activity.during("loading"):
        pass
    assert not capsys.readouterr().err
    with activity.reporting() as outer, activity.reporting() as inner:
        assert inner is outer is activity.current()
        with activity.compiling("a program"):
            pass
        inner.announces = True
        with activity.compiling("a program"):
            pass
    assert capsys.readouterr().err == "compiling a program …\n"
    assert activity.current() is None
    assert "activity" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_start_is_named_on_a_terminal_only(monkeypatch, is_terminal):
    """A refusal is one line on stderr, even if imports take long."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    with activity.reporting() as reporter, activity.starting("starting"):
        assert len(reporter._activities) == is_terminal


@pytest.mark.parametrize(
    ("size", "is_notebook", "shows"),
    [((80, 24), False, True), ((0, 0), False, False), ((0, 0), True, True), (None, False, False)],
)
def test_bars_need_a_terminal_with_a_size(monkeypatch, size, is_notebook, shows):
    """Terminals of jobs have none, and tqdm would write nothing, however long the run."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: size is not None, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size(size))
    assert activity.shows_bars() == shows


def test_compiling_is_counted(clock):
    before = activity.compile_seconds()
    with pytest.raises(KeyError), activity.compiling("a program", clock):
        clock.now += 30
        raise KeyError
    assert activity.compile_seconds() - before == 30
