"""Folders that exports write: as a whole or not at all, with digests of their files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from gemma_encoder import digests
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.weights.failed_writes import reported_once
from gemma_encoder.whole_files import is_remote, whole_folder

ADVICE = "free space there, or name another folder"


def check_is_new(folder: epath.Path, subject: str, *, may_be_empty: bool) -> None:
    """Raises InputError if a folder exists already.

    Args:
        folder: local or remote.
        subject: names what is to be written, for the message.
        may_be_empty: an empty folder may exist.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a new folder for {subject}")
    if not may_be_empty:
        raise InputError(f"{folder} exists; name a new folder for {subject}")
    if any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not empty; name a new folder for {subject}")


@contextlib.contextmanager
def new_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """Writes a folder atomically, with digests: the context fills a temporary one.

    On cloud storage, the folder itself is filled.

    Args:
        folder: a folder that does not exist or is empty.

    Yields:
        The folder to fill.

    Raises:
        InputError: it cannot be written, or another process writes it.
    """
    if is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with in_one_line(f"{folder} cannot be written", ADVICE, OSError):
        # A symbolic link to an empty folder stays a link.
        target = pathlib.Path(os.path.realpath(folder))
        with whole_folder(target, "name another folder, or wait for it") as unfinished:
            yield epath.Path(unfinished)
            digests.write(unfinished)


def save_arrays(tree: dict, unfinished: epath.Path, folder: epath.Path) -> None:
    """Writes arrays by Orbax, which replaces an empty folder.

    Args:
        tree: nested dict of arrays.
        unfinished: where to write them, in a folder of `new_folder`.
        folder: the folder that `new_folder` writes, for the message.

    Raises:
        InputError: they cannot be written.
    """
    with (
        in_one_line(f"{folder} cannot be written", ADVICE),
        reported_once(),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        checkpointer.save(unfinished, tree, force=True)
