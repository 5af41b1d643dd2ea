"""The exception for invalid user input, and helpers that word one-line messages."""

import contextlib
import difflib
import os
import re
import traceback
from collections.abc import Iterable, Iterator

MAX_TEXT = 300  # characters of a library's message, or of a quoted value
TOO_LARGE = "free memory, or use a larger machine or more devices"  # advice
# How TensorStore and PyArrow quote an error of the system, behind text of their own.
_SYSTEM_ERROR = re.compile(r"\[(?:os_error_code='|errno )(\d+)'?\]")


class InputError(ValueError):
    """Raised for invalid user input.

    The message is one line: what is wrong, what was expected, what to do.
    """

    def _render_traceback_(self) -> list[str]:
        """Returns the one line that IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def unknown(kind: str, name: object, valid: Iterable[str]) -> InputError:
    """Returns the error for a name that is not among `valid`; suggests the nearest valid name.

    Args:
        kind: kind of thing that was named, e.g. "task".
        name: name that the user gave.
        valid: all accepted names.
    """
    name = str(name)
    valid_names = sorted(map(str, valid))
    # Of dotted paths under one parent, only the last component is compared.
    parent = name[: name.rfind(".") + 1]
    if not all(valid_name.startswith(parent) for valid_name in valid_names):
        parent = ""
    components = [valid_name.removeprefix(parent) for valid_name in valid_names]
    nearest = difflib.get_close_matches(name.removeprefix(parent), components, n=1, cutoff=0.5)
    hint = f"; did you mean {parent + nearest[0]!r}?" if nearest else "."
    return InputError(f"unknown {kind} {name!r}{hint} Valid: {', '.join(valid_names) or 'none'}")


def format_value(value: object) -> str:
    """Formats the value of an option or a field for messages; several are listed."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else repr(value)


def location(error: BaseException, file: str = "") -> str:
    """Returns FILE:LINE where an error was raised, or the line of a syntax error.

    Args:
        error: the error, with its traceback.
        file: a file whose last line on the way to the error is preferred, such as the user's.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    return f"{frame.filename}:{frame.lineno}"


def described(error: BaseException) -> str:
    """Returns the error's type and message, on one line."""
    text = error.msg if isinstance(error, SyntaxError) else one_line(error)
    return f"{type(error).__name__}: {text}"


def one_line(error: Exception) -> str:
    """Returns the message of an error of absl flags or ml_collections, on one line.

    If the message quotes a traceback, only its last line is returned, without the exception's name.
    """
    # The first argument of an error of the system is its number.
    quotes_message = error.args and not isinstance(error, OSError)
    text = str(error.args[0] if quotes_message else error).strip()
    if "Traceback" in text or isinstance(error, OSError):
        last = text.splitlines()[-1].strip()
        return re.sub(r"^[\w.]+(Error|Exception): ", "", last)
    # ml_collections quotes messages that contain line breaks by their repr.
    text = text[1:-1] if text[:1] == text[-1:] == "'" else text
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split())


def reason(error: BaseException) -> str:
    """Returns the message of any library's error on one short line, without source locations."""
    text = " ".join(str(error).split()) or type(error).__name__
    if code := _SYSTEM_ERROR.search(text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Appended by TensorStore, and by Orbax to its messages.
    for marker in (" [tensorstore_spec", " [source locations", " See full TensorStore details"):
        text = text.split(marker)[0]
    return shortened(text)


def file_of(error: BaseException, default: object) -> object:
    """Returns the file that an error of the operating system names, else `default`."""
    return (isinstance(error, OSError) and error.filename) or default


def shortened(text: str) -> str:
    """Returns a text without its end if it is too long for a message."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if there was too little memory, of the machine or of a device of JAX."""
    text = str(error)
    # Full disks, too, exhaust a resource of TensorStore.
    is_of_device = "RESOURCE_EXHAUSTED" in text and not _SYSTEM_ERROR.search(text)
    return isinstance(error, MemoryError) or is_of_device


@contextlib.contextmanager
def in_one_line(
    problem: str, advice: str = "", errors: type[Exception] = Exception
) -> Iterator[None]:
    """Turns errors of libraries into an InputError, with the error as its cause.

    Use it for all errors only at a door, where files of unknown content are opened.

    Args:
        problem: the message's beginning, such as "FILE cannot be read".
        advice: its end; what to do, unless there is too little memory.
        errors: the errors; OSError where something is written.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        advice = TOO_LARGE if is_out_of_memory(error) else advice
        end = f"; {advice}" if advice else ""
        raise InputError(f"{problem}: {reason(error)}{end}") from error
