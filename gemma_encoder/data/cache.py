"""On-disk cache of files derived from user data: a table, an index, a compact run.

The cache folder is `GEMMA_ENCODER_CACHE` (`~/.cache/gemma_encoder` by default), never the folder of
the data. Files derived from small sources are not cached: rebuilding them takes less than a second.
"""

import atexit
import contextlib
import errno
import glob
import hashlib
import mmap
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from absl import logging
from etils import epath

from gemma_encoder import digests, runtime
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import sync_tree, write_whole

Result = TypeVar("Result")

VERSION = 2  # of derived files; incremented when the meaning of one changes
KEEP_FROM = 4 << 20  # bytes; files derived from at least this much source data are cached
CONTENTS = "contents.json"  # lists the other files of an entry, digests.json too, with their sizes

File = epath.Path | pathlib.Path

FULL = {errno.ENOSPC, errno.EDQUOT}  # errors of full disks and used up quotas

_without_space: dict[pathlib.Path, pathlib.Path] = {}  # temporary folders, by cache entry
_as_read: dict[str, str] = {}  # path -> fingerprint of the content that was last read


def folder() -> pathlib.Path:
    """Returns the cache folder."""
    return runtime.cache_folder()


def derive(
    sources: Sequence[File],
    description: str,
    build: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], Result],
) -> Result:
    """Builds files from `sources` and loads them; they are cached if the sources are large.

    Args:
        sources: the files that the result depends on. The first one names the cache entry.
        description: description of the result, for names and messages. It includes every setting
            that the result depends on, after " with ".
        build: writes files into the given empty folder.
        load: reads or memory-maps those files, which may be deleted afterwards.
    """
    if sum(path.stat().st_size for path in sources) >= KEEP_FROM:
        return load(keep(sources, description, build))
    fingerprints = _fingerprints(sources)
    with (
        _temporary_space(sources, description),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
    ):
        build(pathlib.Path(temporary))
        _check_unchanged(sources, fingerprints, description)
        return load(pathlib.Path(temporary))


def keep(
    sources: Sequence[File], description: str, build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """Returns the cache entry that `build` makes from `sources`, building it if necessary.

    An entry is renamed into the cache only when it is complete, so neither a crash nor a concurrent
    process exposes a partial one. Its name includes the fingerprints of the sources, and entries of
    former versions of the sources are removed. All files of an entry are checked whenever it is
    opened, at several GB/s; a damaged entry is rebuilt.
    """
    fingerprints = _fingerprints(sources)
    owner = _digest(description, *map(_absolute, sources))[:12]
    prefix = f"{sources[0].name[:80]}-{description.split()[0]}-{owner}-"
    target = folder() / f"{prefix}{_digest(str(VERSION), *fingerprints)[:16]}"
    if _is_complete(target):
        return target
    if target in _without_space:
        return _without_space[target]
    began = time.monotonic()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _remove_abandoned()
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".making-", dir=folder()))
        try:
            build(temporary)
            _check_unchanged(sources, fingerprints, description)
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            return _keep_until_exit(sources, description, build, target, fingerprints)
        raise InputError(
            f"cannot cache the {_title(description)} of {sources[0]} in {folder()} "
            f"({error.strerror or error}); set GEMMA_ENCODER_CACHE to another folder"
        ) from error
    for former in folder().glob(f"{glob.escape(prefix)}*"):
        if former != target:
            shutil.rmtree(former, ignore_errors=True)
    logging.info(
        "built the %s of %s in %.1f s: %s",
        _title(description),
        sources[0],
        time.monotonic() - began,
        target,
    )
    return target


def _keep_until_exit(
    sources: Sequence[File],
    description: str,
    build: Callable[[pathlib.Path], None],
    target: pathlib.Path,
    fingerprints: Sequence[str],
) -> pathlib.Path:
    """Builds an entry in a temporary folder of this process, since the cache has no space left."""
    logging.warning(
        "%s is full: the %s of %s is not cached; free disk space or set GEMMA_ENCODER_CACHE to "
        "another folder",
        folder(),
        _title(description),
        sources[0],
    )
    with _temporary_space(sources, description):
        temporary = pathlib.Path(tempfile.mkdtemp(prefix="gemma_encoder-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        build(temporary)
        _check_unchanged(sources, fingerprints, description)
    _without_space[target] = temporary
    return temporary


@contextlib.contextmanager
def _temporary_space(sources: Sequence[File], description: str) -> Iterator[None]:
    """Turns errors of writing temporary files into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot build the {_title(description)} of {sources[0]} in {tempfile.gettempdir()} "
            f"({error.strerror or error}); free disk space or set TMPDIR to another folder"
        ) from error


def _publish(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Flushes a complete folder to disk and renames it to its cache entry."""
    digests.write(temporary)
    write_whole(temporary / CONTENTS, to_json(_contents(temporary)))
    sync_tree(temporary)
    try:
        temporary.rename(target)
    except OSError:
        if not _is_complete(target):  # damaged; otherwise another process was faster
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)


def _title(description: str) -> str:
    """The description without its settings."""
    return description.split(" with ")[0]


def _contents(entry: pathlib.Path) -> dict[str, int]:
    """Sizes of the files of a folder, by relative path."""
    files = [path for path in entry.rglob("*") if path.is_file() and path.name != CONTENTS]
    return {path.relative_to(entry).as_posix(): path.stat().st_size for path in files}


def _is_complete(entry: pathlib.Path) -> bool:
    """Returns True if an entry has all its files, undamaged; those of former versions lack digests.

    Also without checks of digests, the sizes are compared.
    """
    try:
        if read_object(entry / CONTENTS) != _contents(entry):
            return False
        digests.check(entry)
    except digests.DamagedFileError as error:
        logging.warning("%s; it is built again", error)
        return False
    except (OSError, InputError):
        return False
    return True


def _fingerprints(sources: Sequence[File]) -> list[str]:
    fingerprints = [fingerprint(path) for path in sources]
    _as_read.update(zip(map(_absolute, sources), fingerprints, strict=True))
    return fingerprints


def _check_unchanged(
    sources: Sequence[File], fingerprints: Sequence[str], description: str
) -> None:
    for path, before in zip(sources, fingerprints, strict=True):
        if fingerprint(path) != before:
            raise InputError(
                f"{path} changed while the {_title(description)} was being built; run again once "
                "the file is complete"
            )


def fingerprint_as_read(path: File) -> str:
    """Returns the fingerprint of a file when this process last derived something from it."""
    return _as_read.get(_absolute(path)) or fingerprint(path)


def fingerprint(path: File) -> str:
    """Fingerprint of a file: its size and the SHA-256 of its content, independent of its path.

    Fingerprints of large files are cached until their size or modification time changes.
    """
    size, stamp = _size_and_stamp(path)
    memo = folder() / "fingerprints" / _digest(_absolute(path))[:32]
    is_large = size >= KEEP_FROM
    if is_large:
        with contextlib.suppress(OSError, ValueError):  # absent or damaged
            stored, result, check = memo.read_text(encoding="utf-8").splitlines()
            if stored == stamp and check == _memo_check(stored, result):
                return result
    with path.open("rb") as file:
        result = f"{size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    if is_large:
        with contextlib.suppress(OSError):  # an unwritable cache only costs time
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memo, f"{stamp}\n{result}\n{_memo_check(stamp, result)}\n")
    return result


def _memo_check(*lines: str) -> str:
    """Returns the last line of a cached fingerprint, by which damage is noticed."""
    return _digest(*lines)[:16]


def _absolute(path: File) -> str:
    return str(path.absolute()) if isinstance(path, pathlib.Path) else str(path)


def _size_and_stamp(path: File) -> tuple[int, str]:
    """Size of a file in bytes, and a cheap string that changes when the file is modified."""
    if isinstance(path, pathlib.Path):
        facts = path.stat()
        return facts.st_size, f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
    remote = epath.Path(path).stat()
    return remote.length, f"{remote.length} {remote.mtime}"


def save_array(folder: pathlib.Path, name: str, values: np.ndarray) -> None:
    """Appends values to the array `name` in a folder, for `load_arrays`."""
    with (folder / f"{name}.{values.dtype.name}").open("ab") as file:
        values.tofile(file)


def load_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the memory-mapped arrays of a folder by name; pages are loaded when accessed."""
    arrays = {}
    for path in folder.iterdir():
        if path.name in (CONTENTS, digests.NAME):
            continue
        content = b""  # empty files cannot be mapped
        if path.stat().st_size:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays[path.stem] = np.frombuffer(content, np.dtype(path.suffix[1:]))
    return arrays


def release(arrays: Iterable[np.ndarray]) -> None:
    """Releases the resident pages of memory-mapped arrays; later accesses read the file again."""
    for array in arrays:
        mapped = getattr(array.base, "obj", None)  # numpy holds a memoryview of the mapping
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def _digest(*parts: str) -> str:
    # Names of files may hold bytes that are not UTF-8.
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _remove_abandoned() -> None:
    """Removes partial entries of killed processes that were not modified for a day."""
    for path in folder().glob(".making-*"):
        with contextlib.suppress(OSError):
            newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            if time.time() - newest > 86_400:
                shutil.rmtree(path, ignore_errors=True)
