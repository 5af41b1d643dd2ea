"""A checkpoint that cannot be written is reported by one line, unless details are asked for."""

import logging
import sys

import pytest

from gemma_encoder.training.failed_writes import reported_once


def log(file, error):
    """Logs an error as `absl.logging.exception` does in a file."""
    logger = logging.getLogger("absl")
    info = (type(error), error, None)
    logger.handle(logger.makeRecord("absl", logging.ERROR, file, 1, "it failed", (), info))


@pytest.mark.parametrize(("level", "is_shown"), [(logging.WARNING, False), (logging.INFO, True)])
def test_what_is_raised_as_well_is_hidden(monkeypatch, caplog, level, is_shown):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: printed.append(str(error)))
    caplog.set_level(level, "absl")
    orbax = "/site-packages/orbax/checkpoint/_src/futures/future.py"
    with reported_once():
        log(orbax, ValueError())
        log("/gemma_encoder/x.py", ValueError())
        for message in ("Event loop is closed", "another"):
            sys.excepthook(RuntimeError, RuntimeError(message), None)
    assert len(caplog.records) == 1 + is_shown
    assert printed == ["Event loop is closed"] * is_shown + ["another"]
    log(orbax, ValueError())
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    assert len(caplog.records) == 2 + is_shown and len(printed) == 2 + is_shown
