"""Texts, paths and files that strangers may have written."""

import errno
import html
import os
import pathlib
import re
from typing import Any, TypeVar

from gemma_encoder.inputs.errors import InputError

Path = TypeVar("Path", bound=pathlib.PurePath)

MAX_BYTES = 64 << 20  # of a file that is read as a whole

# Control characters, characters that change the direction of the text around them, and halves of
# surrogate pairs.
CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, allowed: str = "\n\t") -> str:
    """Returns a text without control over a terminal: such characters are shown as escapes.

    Args:
        text: any text, of data, a file name or a message that quotes one.
        allowed: control characters to leave as they are.
    """
    return CONTROLS.sub(lambda match: match[0] if match[0] in allowed else _escape(match[0]), text)


def json_printable(line: str) -> str:
    """Returns a line of JSON without control over a terminal, which is equal when parsed.

    JSON leaves control characters above U+007E and marks of direction as they are; they occur only
    in its strings, where they may be written as escapes.
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def html_text(value: Any) -> str:
    """Returns a value as text of HTML, in an element or in a quoted attribute."""
    return html.escape(printable(str(value)))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def inside(folder: Path, name: object, where: object) -> Path:
    """Returns the path of a file in a folder that a file of this folder names.

    Args:
        folder: the folder.
        name: the relative path; "" for the folder itself.
        where: the file that contains the name, for the message.

    Raises:
        InputError: the name is not a text, or leaves the folder.
    """
    path = pathlib.PurePosixPath(name if isinstance(name, str) else "..")
    if path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise InputError(f"{where} names {name!r}, which is not inside its folder; it is damaged")
    return folder.joinpath(*path.parts)


def check_is_regular(path: pathlib.PurePath) -> None:
    """Raises OSError for a pipe or a device, which may never end; remote paths are none."""
    name = os.fspath(path)
    if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
        raise OSError(errno.EINVAL, "it is a pipe or a device", name)


def read_bounded(path: pathlib.Path) -> bytes:
    """Reads a file as a whole, whose size a stranger may have chosen.

    Args:
        path: a file, local or of `epath`.

    Raises:
        OSError: it cannot be read, is a pipe or a device, or has more than `MAX_BYTES`.
    """
    check_is_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES >> 20} MB", os.fspath(path))
    return content
