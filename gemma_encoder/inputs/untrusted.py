"""Texts and paths that strangers may have written."""

import pathlib
import unicodedata
from typing import TypeVar

from gemma_encoder.inputs.errors import InputError

Path = TypeVar("Path", bound=pathlib.PurePath)

# Characters that change the direction of the text around them.
BIDIRECTIONAL = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def printable(text: str, allowed: str = "\n\t") -> str:
    """Returns a text without control over a terminal: such characters are shown as escapes.

    Args:
        text: any text, of data, a file name or a message that quotes one.
        allowed: control characters to leave as they are.
    """
    return "".join(
        character if character in allowed or not _controls(character) else _escape(character)
        for character in text
    )


def _controls(character: str) -> bool:
    """Returns True for control characters, marks of direction and halves of surrogate pairs."""
    return character in BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs")


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
