"""The files that a path or a pattern names."""

import glob
import pathlib
from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError


def named_files(name: str | Sequence[str], option: str) -> list[pathlib.Path]:
    """The files of a path, of a pattern such as `part-*.csv` (sorted), or of a list of both.

    Args:
        name: the path, the pattern or the list.
        option: of the config, for messages.

    Raises:
        InputError: there is no such file, or one is named twice.
    """
    paths: list[pathlib.Path] = []
    for one in [name] if isinstance(name, str) else name:
        path = pathlib.Path(one).expanduser()
        if _is_file(path):
            paths.append(path)
            continue
        matches = sorted(pathlib.Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if _is_file(match)]
        if not matches:
            is_pattern = any(character in one for character in "*?[")
            problem = f"no file matches {path}" if is_pattern else f"{path} is not a file"
            raise InputError(f"{option}: {problem}")
        paths += matches
    if not paths:
        raise InputError(f"{option} names no file")
    met: set[pathlib.Path] = set()
    for path in paths:
        if path in met:
            raise InputError(f"{option}: {path} is named twice")
        met.add(path)
    return paths


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null
        return False
