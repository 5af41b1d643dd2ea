"""Folders of our own checkpoints: finds them, and notices damage when they are read.

A folder without any file, such as a killed copy leaves, is skipped with a warning. One that lacks
some of its files is damaged: it is refused rather than skipped, so that nobody gets the results of
an older checkpoint unawares.
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from absl import logging
from etils import epath

from gemma_encoder import digests
from gemma_encoder.digests import DamagedFileError
from gemma_encoder.inputs.errors import TOO_LARGE, InputError, file_of, is_out_of_memory, reason
from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.whole_files import is_remote

DESCRIPTION = "inference/inference.json"
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not finished
PARTS = ("inference", "parameters")  # subfolders: one of them is enough to recognize a checkpoint
ESSENTIAL = (DESCRIPTION, "inference/tokenizer.model", "parameters")


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, which Orbax needs; a `gs://` path is unchanged."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def check_encoding(path: epath.Path) -> None:
    """Raises InputError for a path that Orbax cannot open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is no path in UTF-8, as checkpoints need; rename it") from None


def checkpoint_steps(workdir: epath.PathLike) -> list[int]:
    """Returns the steps of a workdir's complete checkpoints, in ascending order.

    Folders without a file are skipped, and logged.
    """
    folder = absolute(workdir) / "checkpoints"
    if is_remote(folder):
        import orbax.checkpoint as ocp  # imported lazily: it imports JAX

        return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
    steps = []
    for path in _step_folders(folder):
        if _is_empty(path):
            _warn_of_empty(path)
        else:
            steps.append(int(path.name))
    return sorted(steps)


def remove_unfinished(workdir: epath.PathLike) -> None:
    """Removes what killed saves and copies left: temporary folders, and those without a file.

    Steps whose folders hold no file can then be saved.
    """
    folder = absolute(workdir) / "checkpoints"
    if is_remote(folder):
        return
    for path in _step_folders(folder):
        if _is_empty(path):
            _warn_of_empty(path)
            for subfolder, _, _ in os.walk(path, topdown=False):
                os.rmdir(subfolder)
    for path in pathlib.Path(folder).glob(f"*{TEMPORARY}*"):
        if not path.is_symlink():
            shutil.rmtree(path)


def _step_folders(folder: epath.Path) -> list[pathlib.Path]:
    """Returns the local folders of checkpoints, in any order."""
    local = pathlib.Path(folder)
    paths = local.iterdir() if local.is_dir() else ()
    return [path for path in paths if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()]


def _is_empty(folder: epath.PathLike) -> bool:
    """Returns True if a local folder and its subfolders hold no file."""
    try:
        with os.scandir(folder) as entries:
            return all(
                entry.is_dir(follow_symlinks=False) and _is_empty(entry.path) for entry in entries
            )
    except OSError:  # it cannot be read: whoever reads it will say so
        return False


@functools.cache
def _warn_of_empty(folder: pathlib.Path) -> None:
    logging.warning("%s holds no file and is skipped", folder)


def is_checkpoint(folder: epath.Path) -> bool:
    """Returns True if a folder is one of our checkpoints, whole or damaged."""
    if (folder / "checkpoints").exists():
        return (folder / DESCRIPTION).exists()
    return any((folder / part).exists() for part in PARTS)


def check_is_workdir(path: epath.PathLike) -> None:
    """Raises InputError if a folder is a checkpoint rather than the workdir that contains it."""
    if (absolute(path) / DESCRIPTION).exists():
        raise InputError(
            f"{path} is a checkpoint, not a workdir; name the folder of its run, or another one"
        )


def find(path: epath.PathLike) -> epath.Path:
    """Returns the checkpoint at `path`: itself, or the latest one of a workdir.

    Raises:
        InputError: there is no checkpoint.
    """
    path = absolute(path)
    if is_checkpoint(path):
        return path
    steps = checkpoint_steps(path)
    if not steps:
        problem = "has no checkpoint" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {problem}; give the workdir of a training run, or one of its checkpoints/STEP "
            "folders"
        )
    return path / "checkpoints" / str(steps[-1])


@contextlib.contextmanager
def reading(
    checkpoint: epath.Path,
    parts: Sequence[str] = ("",),
    large: Literal["share", "check", "skip"] = "check",
) -> Iterator[None]:
    """Checks the files of a checkpoint while the context reads them.

    Whatever goes wrong, also in a library, is one line with the file or folder and the newest whole
    checkpoint before it.

    Args:
        checkpoint: folder returned by `find`.
        parts: the files or subfolders that are read; "" for all.
        large: whether to check the content of large files, too. With "share" every process must
            call this: each checks a share of them, and all fail if one does.

    Raises:
        InputError: the checkpoint is damaged, or of another model or version.
    """
    if large != "check":  # parameters, which Orbax reads
        check_encoding(checkpoint)
    if large != "share":
        share = (0, 1 if large == "check" else 0)
        with _errors_in_one_line(checkpoint), digests.verified(checkpoint, parts, share):
            yield
        return
    from gemma_encoder import distributed  # imported lazily: it imports JAX

    with contextlib.ExitStack() as check:
        with distributed.failing_together(), _errors_in_one_line(checkpoint):
            # Most damage is noticed here, before Orbax lets the processes wait for each other.
            share = distributed.process_share()
            check.enter_context(digests.verified(checkpoint, parts, share))
        with distributed.failing_together(), _errors_in_one_line(checkpoint), check.pop_all():
            yield


def read_description(checkpoint: epath.Path) -> dict[str, Any]:
    """Reads the `inference.json` of a checkpoint; raises DamagedFileError if it cannot be read."""
    path = checkpoint / DESCRIPTION
    try:
        return read_object(path)
    except InputError as error:
        raise DamagedFileError(path, str(error).removeprefix(f"{path} ")) from error


@contextlib.contextmanager
def _errors_in_one_line(checkpoint: epath.Path) -> Iterator[None]:
    """Turns all errors of reading a checkpoint into an InputError with advice."""
    try:
        yield
    except DamagedFileError as error:
        raise InputError(f"{error}; {_advice(checkpoint)}") from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(_explanation(checkpoint, error)) from error


def _explanation(checkpoint: epath.Path, error: Exception) -> str:
    """Explains a library's error in a line, by a damaged file if there is one."""
    problem = f"{file_of(error, checkpoint)} cannot be read: {reason(error)}"
    if is_out_of_memory(error):
        return f"{problem}; {TOO_LARGE}"
    try:
        digests.check(checkpoint)
    except InputError as damage:
        return f"{damage}; {_advice(checkpoint)}"
    if digests.is_checked(checkpoint):
        return (
            f"{problem}; its files are as they were written, so it belongs to another run or "
            "version: choose another checkpoint or workdir"
        )
    return f"{problem}; it is damaged or belongs to another run; {_advice(checkpoint)}"


def _advice(checkpoint: epath.Path) -> str:
    """Says which checkpoint to use in place of a damaged one."""
    if not checkpoint.exists():
        return f"{checkpoint} was deleted meanwhile, as a run does with old ones: try again"
    if checkpoint.parent.name != "checkpoints" or not checkpoint.name.isdigit():
        return "restore it, or use another checkpoint"
    before = newest_whole_before(checkpoint)
    # Those in between are damaged, too: a run that resumes would meet them next.
    first = int(before.name) + 1 if before else 0
    damaged = " and ".join(
        str(checkpoint.parent / str(step))
        for step in reversed(checkpoint_steps(checkpoint.parent.parent))
        if first <= step <= int(checkpoint.name)
    )
    if before is None:
        return (
            f"there is no whole checkpoint before it: restore it, or move {damaged} away to train "
            "without it"
        )
    return (
        f"the newest whole checkpoint before it is {before}: name that one to predict, or move "
        f"{damaged} away to resume"
    )


def newest_whole_before(checkpoint: epath.Path) -> epath.Path | None:
    """Returns the newest whole checkpoint of an earlier step; None if there is none.

    All files of earlier checkpoints are checked, as far as they have digests.

    Args:
        checkpoint: WORKDIR/checkpoints/STEP.
    """
    for step in reversed(checkpoint_steps(checkpoint.parent.parent)):
        candidate = checkpoint.parent / str(step)
        if step < int(checkpoint.name) and _is_whole(candidate):
            return candidate
    return None


def _is_whole(checkpoint: epath.Path) -> bool:
    """Returns True if no file of a checkpoint is seen to be damaged or missing."""
    try:
        digests.check(checkpoint)
    except InputError:
        return False
    return all((checkpoint / name).exists() for name in ESSENTIAL)
