"""A checkpoint that cannot be written is reported by one line, unless details are asked for."""

import asyncio
import logging
import sys
import types

import pytest

from gemma_encoder.weights.failed_writes import reported_once

ORBAX = "/site-packages/orbax/checkpoint/_src/futures/future.py"


def log(file, error):
    """Logs an error as `absl.logging.exception` does in a file."""
    logger = logging.getLogger("absl")
    info = (type(error), error, None)
    logger.handle(logger.makeRecord("absl", logging.ERROR, file, 1, "it failed", (), info))


def end_late():
    """Reports the error of a write that ended after another has failed, as Python does."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as raised:
        loop.call_soon_threadsafe(print)
    sys.unraisablehook(types.SimpleNamespace(exc_type=RuntimeError, exc_value=raised.value))


@pytest.fixture
def printed(monkeypatch):
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    lines = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: lines.append(str(error.exc_value)))
    return lines


@pytest.mark.parametrize(("level", "is_shown"), [(logging.WARNING, False), (logging.INFO, True)])
def test_what_is_raised_as_well_is_hidden(printed, caplog, level, is_shown):
    caplog.set_level(level, "absl")
    with reported_once():
        log(ORBAX, ValueError())
        log("/gemma_encoder/x.py", ValueError())
        end_late()
        sys.unraisablehook(types.SimpleNamespace(exc_value=ValueError("another")))
    assert len(caplog.records) == 1 + is_shown
    assert printed == ["Event loop is closed"] * is_shown + ["another"]
    log(ORBAX, ValueError())
    end_late()
    assert len(caplog.records) == 2 + is_shown and len(printed) == 2 + is_shown


def test_writes_that_end_after_the_error_are_hidden(printed, caplog):
    hooks = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), reported_once():
            raise ZeroDivisionError
        hooks.append(sys.unraisablehook)
    end_late()
    log(ORBAX, ValueError())
    sys.unraisablehook(types.SimpleNamespace(exc_value=ValueError("another")))
    assert printed == ["another"] and hooks[0] is hooks[1]
    for message in ("Error writing [tensorstore_spec='{}']", "another"):
        future = asyncio.Future(loop=asyncio.new_event_loop())
        future.set_exception(ValueError(message))
        del future  # asyncio logs an error that nobody retrieved
    assert [str(record.exc_info[1]) for record in caplog.records] == ["another"]
