"""On-disk cache of files derived from user data: a table, an index, a compact run.

It lies in the folder that `GEMMA_ENCODER_CACHE` names (`~/.cache/gemma_encoder` by default), never
beside the data. What is made of small files is not cached: making it anew takes less than a second.
"""

import contextlib
import glob
import hashlib
import json
import mmap
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from absl import logging
from etils import epath

from gemma_encoder import runtime
from gemma_encoder.inputs.errors import InputError

Result = TypeVar("Result")

VERSION = 2  # of derived files; raised when the meaning of one changes
KEEP_FROM = 4 << 20  # bytes of source files from which on derived files are cached
CONTENTS = "contents.json"  # lists the other files of an entry, with their sizes

File = epath.Path | pathlib.Path

_as_read: dict[str, str] = {}  # by path, the fingerprint of the content that was read last


def folder() -> pathlib.Path:
    """Where results are kept."""
    return runtime.cache_folder()


def derive(
    sources: Sequence[File],
    what: str,
    build: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], Result],
) -> Result:
    """Loads the files that `build` makes of `sources`; they are cached if the sources are large.

    Args:
        sources: the files that the result depends on, the one that names it first.
        what: says what is made, in names and messages, with every setting that decides the result.
        build: writes files into the empty folder that it is given.
        load: reads or maps them; a mapping outlives the files' names.
    """
    if sum(path.stat().st_size for path in sources) >= KEEP_FROM:
        return load(keep(sources, what, build))
    fingerprints = _fingerprints(sources)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            build(pathlib.Path(temporary))
            _check_unchanged(sources, fingerprints, what)
            return load(pathlib.Path(temporary))
    except OSError as error:
        raise InputError(
            f"the {_title(what)} of {sources[0]} cannot be made in {tempfile.gettempdir()} "
            f"({error.strerror or error}); make room, or let TMPDIR name another folder"
        ) from error


def keep(sources: Sequence[File], what: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The cached folder of what `build` makes of `sources`, made unless it is there already.

    A folder gets its name when it is whole, so neither a crash nor a second process leaves or sees
    half of one. Its name holds the fingerprints of the sources. One that has lost a file, or part
    of one, is made anew.
    """
    fingerprints = _fingerprints(sources)
    owner = _digest(what, *map(_absolute, sources))[:12]
    prefix = f"{sources[0].name[:80]}-{what.split()[0]}-{owner}-"
    target = folder() / f"{prefix}{_digest(str(VERSION), *fingerprints)[:16]}"
    if _is_whole(target):
        return target
    began = time.monotonic()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _remove_abandoned()
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".making-", dir=folder()))
        try:
            build(temporary)
            _check_unchanged(sources, fingerprints, what)
            (temporary / CONTENTS).write_text(json.dumps(_contents(temporary)))
            _flush(temporary)
            try:
                temporary.rename(target)
            except OSError:
                if not _is_whole(target):  # another process was faster, or it is damaged
                    shutil.rmtree(target, ignore_errors=True)
                    temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the {_title(what)} of {sources[0]} cannot be cached in {folder()} "
            f"({error.strerror or error}); let GEMMA_ENCODER_CACHE name another folder"
        ) from error
    for old in folder().glob(f"{glob.escape(prefix)}*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    seconds = time.monotonic() - began
    logging.info("made the %s of %s in %.1f s: %s", _title(what), sources[0], seconds, target)
    return target


def _title(what: str) -> str:
    return what.split(" with ")[0]


def _contents(entry: pathlib.Path) -> dict[str, int]:
    """The files of a folder, and their sizes."""
    files = [path for path in entry.rglob("*") if path.is_file() and path.name != CONTENTS]
    return {path.relative_to(entry).as_posix(): path.stat().st_size for path in files}


def _is_whole(entry: pathlib.Path) -> bool:
    try:
        return json.loads((entry / CONTENTS).read_text()) == _contents(entry)
    except (OSError, ValueError):
        return False


def _fingerprints(sources: Sequence[File]) -> list[str]:
    fingerprints = [fingerprint(path) for path in sources]
    _as_read.update(zip(map(_absolute, sources), fingerprints, strict=True))
    return fingerprints


def _check_unchanged(sources: Sequence[File], fingerprints: Sequence[str], what: str) -> None:
    for path, before in zip(sources, fingerprints, strict=True):
        if fingerprint(path) != before:
            raise InputError(
                f"{path}: changed while the {_title(what)} was made; start again when the file is "
                "whole"
            )


def fingerprint_as_read(path: File) -> str:
    """The fingerprint that a file had when this process last derived something from it."""
    return _as_read.get(_absolute(path)) or fingerprint(path)


def fingerprint(path: File) -> str:
    """Fingerprint of a file: its size and the SHA-256 of its content, wherever it lies.

    That of a large file is computed once, and again when its size or time of change differs.
    """
    size, stamp = _size_and_stamp(path)
    memo, is_large = folder() / "fingerprints" / _digest(_absolute(path))[:32], size >= KEEP_FROM
    if is_large:
        with contextlib.suppress(OSError, ValueError):  # absent, or damaged
            stored, _, result = memo.read_text().partition("\n")
            if stored == stamp and re.fullmatch(rf"{size} [0-9a-f]{{64}}\n", result):
                return result.strip()
    with path.open("rb") as file:
        result = f"{size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    if is_large:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            memo.parent.mkdir(parents=True, exist_ok=True)
            runtime.write_whole(memo, f"{stamp}\n{result}\n")
    return result


def _absolute(path: File) -> str:
    return str(path.absolute()) if isinstance(path, pathlib.Path) else str(path)


def _size_and_stamp(path: File) -> tuple[int, str]:
    """Bytes of a file, and what changes with its content at no cost."""
    if isinstance(path, pathlib.Path):
        facts = path.stat()
        return facts.st_size, f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
    remote = epath.Path(path).stat()
    return remote.length, f"{remote.length} {remote.mtime}"


def save_array(folder: pathlib.Path, name: str, values: np.ndarray) -> None:
    """Appends values to the array `name` of a folder; `load_arrays` reads it."""
    with (folder / f"{name}.{values.dtype.name}").open("ab") as file:
        values.tofile(file)


def load_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a folder by name, mapped: only what is used comes into memory."""
    arrays = {}
    for path in folder.iterdir():
        if path.name == CONTENTS:
            continue
        content = b""  # an empty file cannot be mapped
        if path.stat().st_size:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays[path.stem] = np.frombuffer(content, np.dtype(path.suffix[1:]))
    return arrays


def release(arrays: Iterable[np.ndarray]) -> None:
    """Gives back the memory of mapped arrays that a pass over them filled.

    What is used again comes back from the file.
    """
    for array in arrays:
        mapped = getattr(array.base, "obj", None)  # numpy holds a memoryview of the mapping
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _flush(entry: pathlib.Path) -> None:
    for path in entry.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove_abandoned() -> None:
    """Removes what a process that was killed a day ago or earlier had begun."""
    for path in folder().glob(".making-*"):
        with contextlib.suppress(OSError):
            newest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
            if time.time() - newest > 86_400:
                shutil.rmtree(path, ignore_errors=True)
