"""Hides what libraries print about a failed write of a checkpoint, beside raising the error."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import TracebackType


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Leaves the report of a failed write to the one line of the error that is raised.

    Orbax logs the error in each of its threads with a traceback; TensorStore prints a traceback
    for each other write that ends after the first has failed. All are shown where --verbosity is at
    least 0.
    """
    logger = logging.getLogger("absl")
    print_exception = sys.excepthook

    def print_others(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        is_late = kind is RuntimeError and str(error) == "Event loop is closed"
        if not is_late or logger.isEnabledFor(logging.INFO):
            print_exception(kind, error, trace)

    logger.addFilter(_is_new)
    sys.excepthook = print_others
    try:
        yield
    finally:
        sys.excepthook = print_exception
        logger.removeFilter(_is_new)


def _is_new(record: logging.LogRecord) -> bool:
    """Returns False for an error that Orbax logs and raises."""
    is_repeated = "/orbax/checkpoint/" in record.pathname and record.exc_info
    return not is_repeated or logging.getLogger("absl").isEnabledFor(logging.INFO)
