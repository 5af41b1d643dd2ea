"""Expansion of paths and patterns to files."""

import glob
import pathlib
from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError


def named_files(name: str | Sequence[str], option: str) -> list[pathlib.Path]:
    """Returns the files of a path, a pattern such as `part-*.csv` (sorted), or a list of both.

    Args:
        name: the path, pattern or list.
        option: config option, for messages.

    Raises:
        InputError: there is no such file, or a file is named twice.
    """
    paths: list[pathlib.Path] = []
    for pattern in [name] if isinstance(name, str) else name:
        path = pathlib.Path(pattern).expanduser()
        if _is_file(path):
            paths.append(path)
            continue
        matches = sorted(pathlib.Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if _is_file(match)]
        if not matches:
            is_pattern = any(character in pattern for character in "*?[")
            problem = f"no file matches {path}" if is_pattern else f"{path} is not a file"
            raise InputError(f"{option}: {problem}")
        paths += matches
    if not paths:
        raise InputError(f"{option} names no file")
    seen: set[pathlib.Path] = set()
    for path in paths:
        if path in seen:
            raise InputError(f"{option}: {path} is named twice")
        seen.add(path)
    return paths


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long or contains a null character
        return False
