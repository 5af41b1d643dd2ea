"""Output of programs: results and notes on stdout, messages on stderr.

All that the package writes to a terminal goes through this module, except for progress bars: texts
of data, file names and settings of strangers cannot control the terminal (`untrusted.printable`). A
result that cannot be written is an error; a message that cannot is dropped.
"""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.untrusted import json_printable, printable


def print_result(text: str) -> None:
    """Prints lines on stdout that are a program's result.

    Raises:
        InputError: stdout cannot be written.
        BrokenPipeError: the reader of stdout has exited.
    """
    try:
        print(printable(text), flush=True)
    except OSError as error:
        raise _unwritable(error) from None


def print_json(line: str) -> None:
    """Prints a line of JSON on stdout, in UTF-8 on every terminal; see `print_result`.

    It is written when enough lines are there, and by `flush_results`.
    """
    encoded = json_printable(line.rstrip("\n")).encode() + b"\n"
    try:
        if hasattr(sys.stdout, "buffer"):
            sys.stdout.buffer.write(encoded)
        else:  # in a notebook
            sys.stdout.write(encoded.decode())
    except OSError as error:
        raise _unwritable(error) from None


def flush_results() -> None:
    """Writes what is left of the output to stdout; see `print_result`."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _unwritable(error) from None


def print_note(text: str) -> None:
    """Prints lines on stdout about a result that is in files; dropped if they cannot be written.

    Raises:
        BrokenPipeError: the reader of stdout has exited.
    """
    with contextlib.suppress(InputError):
        print_result(text)


def print_message(text: str) -> None:
    """Prints lines on stderr; dropped if they cannot be written."""
    with contextlib.suppress(OSError, ValueError):  # full, or closed
        if sys.stderr is not None:
            print(printable(text), file=sys.stderr, flush=True)


def print_one_line(text: str) -> None:
    """Prints one line on stderr: line breaks in names and texts that it quotes are escapes."""
    print_message(printable(text, allowed="\t"))


def flush_messages() -> None:
    """Writes what is left of the messages."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()


def discard_results() -> None:
    """Drops what is left of the output, which would fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _unwritable(error: OSError) -> Exception:
    """Returns the error to raise if stdout cannot be written."""
    if isinstance(error, BrokenPipeError):
        return error
    discard_results()
    return InputError(f"stdout cannot be written: {error.strerror}")


class PrintableFormatter(logging.Formatter):
    """Log formatter whose lines cannot control a terminal.

    Args:
        formatter: formats the records; by default as the message only.
    """

    def __init__(self, formatter: logging.Formatter | None = None):
        super().__init__()
        self._formatter = formatter or logging.Formatter("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        return printable(self._formatter.format(record))


def guard_logs() -> None:
    """Makes printable: log lines before a program sets up logging, warnings, tracebacks of bugs."""
    logging.lastResort.setFormatter(PrintableFormatter())
    if warnings.formatwarning is _format_warning:
        warnings.formatwarning = _format_printable_warning
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback


_format_warning = warnings.formatwarning


def _format_printable_warning(*args: Any, **options: Any) -> str:
    return printable(_format_warning(*args, **options))


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print_message("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
