"""Files that are made once from the user's own: an index, a compact run, a decompressed collection.

They lie in the folder that `GEMMA_ENCODER_CACHE` names (`~/.cache/gemma_encoder` by default), never beside the data. What is made
from small files is not kept: making it anew takes less than a second.
"""

import contextlib
import hashlib
import mmap
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from absl import logging

from gemma_encoder import runtime
from gemma_encoder.inputs.errors import InputError

Result = TypeVar("Result")

VERSION = 1  # of what is made; raised when the meaning of a kept file changes
KEEP_FROM = 64 << 20  # bytes of source files from which on results are kept
_SAMPLE = 1 << 20  # bytes of a file's head and tail that its fingerprint holds


def folder() -> pathlib.Path:
    """Where results are kept."""
    return runtime.cache_folder()


def derive(
    sources: Sequence[pathlib.Path],
    what: str,
    build: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], Result],
) -> Result:
    """What `load` reads from the files that `build` makes of `sources`; made once if these are large.

    Args:
        sources: the files that the result depends on, the one that names it first.
        what: says what is made, in names and messages, with every setting that decides the result.
        build: writes files into the empty folder that it is given.
        load: reads or maps them; a mapping outlives the files' names.
    """
    if sum(path.stat().st_size for path in sources) < KEEP_FROM:
        with tempfile.TemporaryDirectory() as temporary:
            build(pathlib.Path(temporary))
            return load(pathlib.Path(temporary))
    return load(keep(sources, what, build))


def keep(
    sources: Sequence[pathlib.Path], what: str, build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """The kept folder with the files that `build` makes of `sources`; made unless it is there for the sources as they are now.

    A folder gets its name when it is whole, so neither a crash nor a second process leaves or sees half of one.
    """
    fingerprints = [fingerprint(path) for path in sources]
    place = _digest(what, *(str(path.absolute()) for path in sources))[:12]
    prefix = f"{sources[0].name}-{what.split()[0]}-{place}-"
    kept = folder() / f"{prefix}{_digest(str(VERSION), *fingerprints)[:16]}"
    if kept.is_dir():
        return kept
    began = time.monotonic()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _remove_abandoned()
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".making-", dir=folder()))
        try:
            build(temporary)
            if [fingerprint(path) for path in sources] != fingerprints:
                raise InputError(
                    f"{', '.join(map(str, sources))}: changed while the {what} was made; start again when the file is whole"
                )
            _flush(temporary)
            try:
                temporary.rename(kept)
            except OSError:
                if not kept.is_dir():  # another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the {what} of {sources[0]} cannot be kept in {folder()} ({error.strerror or error}); let GEMMA_ENCODER_CACHE name another folder"
        ) from error
    for old in folder().glob(f"{prefix}*"):
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)
    logging.info(
        "made the %s of %s in %.1f s; kept in %s", what, sources[0], time.monotonic() - began, kept
    )
    return kept


def fingerprint(path: pathlib.Path) -> str:
    """Changes when the file does: its size, its time, and a digest of its head and tail."""
    facts = path.stat()
    with path.open("rb") as file:
        head = file.read(_SAMPLE)
        file.seek(max(facts.st_size - _SAMPLE, 0))
        tail = file.read(_SAMPLE)
    return f"{facts.st_size} {facts.st_mtime_ns} {hashlib.sha256(head + tail).hexdigest()}"


def save_array(place: pathlib.Path, name: str, values: np.ndarray) -> None:
    """Appends values to the array `name` of a folder; `load_arrays` reads it."""
    with (place / f"{name}.{values.dtype.name}").open("ab") as file:
        values.tofile(file)


def load_arrays(place: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a folder by name, mapped: only what is used comes into memory."""
    arrays = {}
    for path in place.iterdir():
        dtype = np.dtype(path.suffix[1:])
        if not path.stat().st_size:  # cannot be mapped
            arrays[path.stem] = np.zeros(0, dtype)
            continue
        with path.open("rb") as file:
            arrays[path.stem] = np.frombuffer(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype
            )
    return arrays


def release(arrays: Iterable[np.ndarray]) -> None:
    """Gives back the memory of mapped arrays that a pass over them filled; what is used again comes back from the file."""
    for array in arrays:
        mapped = getattr(array.base, "obj", None)  # numpy holds a memoryview of the mapping
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _flush(place: pathlib.Path) -> None:
    for path in place.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove_abandoned() -> None:
    """Removes what a process that was killed a day ago or earlier had begun."""
    for path in folder().glob(".making-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path, ignore_errors=True)
