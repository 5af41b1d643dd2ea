"""Hides what libraries print about a failed write of a checkpoint, beside raising the error."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Leaves the report of a failed write to the one line of the error that is raised.

    Orbax logs the error in each of its threads with a traceback. Each other write of TensorStore
    that ends after the first has failed is an error that cannot be raised, or is not, whose
    traceback Python prints. Both may come after this context has ended with an error; they are
    hidden from then on. All are shown where --verbosity is at least 0.
    """
    logger = logging.getLogger("absl")
    futures = logging.getLogger("asyncio")
    former = sys.unraisablehook
    if not (isinstance(former, functools.partial) and former.func is _print_others):
        sys.unraisablehook = functools.partial(_print_others, former)
    logger.addFilter(_is_new)
    futures.addFilter(_is_of_others)
    yield
    # Not after an error: threads of other writes may still report theirs.
    sys.unraisablehook = former
    futures.removeFilter(_is_of_others)
    logger.removeFilter(_is_new)


def _print_others(print_exception: Callable[[Any], object], unraisable: Any) -> None:
    """Prints an error that could not be raised, unless it is that of a write that ended late.

    Args:
        print_exception: the hook of others.
        unraisable: see `sys.unraisablehook`.
    """
    if _shows_all() or str(unraisable.exc_value) != "Event loop is closed":
        print_exception(unraisable)


def _is_of_others(record: logging.LogRecord) -> bool:
    """Returns False for an error of a write of TensorStore that nothing waited for."""
    error = record.exc_info[1] if record.exc_info else None
    return _shows_all() or "[tensorstore_spec" not in str(error)


def _is_new(record: logging.LogRecord) -> bool:
    """Returns False for an error that Orbax logs and raises."""
    is_repeated = "/orbax/checkpoint/" in record.pathname and record.exc_info
    return _shows_all() or not is_repeated


def _shows_all() -> bool:
    return logging.getLogger("absl").isEnabledFor(logging.INFO)
