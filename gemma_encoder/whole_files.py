"""Files that are written whole or not at all, by one process at a time.

Every file that another start, another program or a person reads later is written by this module:
under a temporary name, to disk, then renamed. Cloud storage has neither locks nor renames, but
writes objects as a whole: there, files are written directly and nothing is claimed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.json_text import from_json, to_json

# Errors of file systems without locks, such as some network file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def is_remote(path: os.PathLike | str) -> bool:
    """Returns True for cloud storage, such as `gs://`."""
    return "://" in os.fspath(path)


def write_whole(path: pathlib.PurePath, content: str | bytes) -> None:
    """Writes a file atomically; text as UTF-8. See `whole_file`."""
    encoded = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(encoded)
        return
    with whole_file(path) as temporary:
        temporary.write_bytes(encoded)


@contextlib.contextmanager
def whole_file(path: pathlib.PurePath) -> Iterator[pathlib.Path]:
    """Writes a file atomically: the context writes a temporary file, which then replaces `path`.

    If the context fails, the former file stays. A symbolic link is replaced rather than written
    through; a device or a pipe is written directly. Another process that writes the same file is
    waited for. A file in cloud storage is written locally first.

    Args:
        path: a file, local or of `epath`; its folder must exist.

    Yields:
        The file to write, which exists and is empty.
    """
    if is_remote(path):
        from etils import epath  # takes a fifth of a second to import

        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, "file")
            local.touch()
            yield local
            epath.Path(local).copy(path, overwrite=True)
        return
    path = pathlib.Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path), _open_locked(temporary, wait=True) as file:
        try:
            file.truncate(0)
            yield temporary
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
            # The name still belongs to this process: it is removed or replaced under the lock only.
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: pathlib.PurePath) -> Iterator[None]:
    """Adds a file to errors of the system that name none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def move_whole(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a local file that is flushed to disk, replacing `target`."""
    os.replace(source, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def whole_folder(path: pathlib.PurePath, advice: str) -> Iterator[pathlib.Path]:
    """Writes a folder atomically: the context fills a temporary one, which is renamed to `path`.

    If the context fails, the temporary folder is removed, with what libraries leave beside it; that
    of a killed process is replaced. An empty folder that cannot be replaced, since it is a mount
    point or the folder around it cannot be written, gets the files at the end instead.

    Args:
        path: a local folder that does not exist or is empty.
        advice: what to do if another process writes it, for the message.

    Yields:
        The folder to fill, which exists and is empty.

    Raises:
        InputError: another process writes the folder.
    """
    path = pathlib.Path(path)
    stays = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))
    around = path / ".tmp" if stays else path.with_name(f".{path.name}.tmp")
    temporary = around / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with claim(around.with_suffix(".lock"), str(path), advice):
        shutil.rmtree(around, ignore_errors=True)
        around.mkdir()
        try:
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            if stays:
                for file in temporary.iterdir():
                    os.replace(file, path / file.name)
            else:
                os.replace(temporary, path)  # an empty folder at `path` is replaced
        finally:
            _remove_tree(around)
    _sync_folder(path.parent)


def _remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder, to which threads of a library may still be writing after its error."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def sync_tree(folder: pathlib.Path) -> None:
    """Flushes the files of a folder, and their names, to disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)
        elif stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(path: pathlib.Path) -> None:
    """Flushes the names in a folder to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def claim(path: pathlib.PurePath, subject: str, advice: str) -> Iterator[None]:
    """Claims something for this process while the context lasts.

    The claim is an advisory lock of a file that names the holder. The operating system drops it
    when the process ends, however it ends, so that none is ever stale. Cloud storage has no locks:
    nothing is claimed there.

    Args:
        path: the file to lock, removed at the end; its folder must exist.
        subject: names what is claimed, for messages.
        advice: what to do if another process holds it, for messages.

    Raises:
        InputError: another process holds it, or the file cannot be written.
    """
    if is_remote(path):
        yield
        return
    lock = pathlib.Path(path)
    with in_one_line(f"{subject} cannot be written", errors=OSError):
        file = _open_locked(lock, wait=False)
    if file is None:
        raise InputError(f"{subject} is in use by {_holder(lock)}; {advice}")
    with file:
        try:
            with contextlib.suppress(OSError):  # on a full disk the holder stays unnamed
                _write_holder(file)
            yield
        finally:
            # Removed before the lock is dropped: see `_open_locked`.
            with contextlib.suppress(OSError):
                lock.unlink()


def _open_locked(path: pathlib.Path, *, wait: bool) -> IO[bytes] | None:
    """Opens a file, creating it if needed, and locks it; returns None if another process has it.

    Args:
        path: the file.
        wait: wait for the other process instead.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            logging.getLogger(__name__).warning(
                "%s is on a file system without locks: see that no other process writes there",
                path.parent,
            )
        except BaseException:
            file.close()
            raise
        if _is_current(file, path):
            return file
        file.close()  # its former holder removed or renamed it after it was opened here


def _write_holder(file: IO[bytes]) -> None:
    """Writes who holds a lock."""
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
    file.truncate(0)
    file.write(to_json(holder).encode())


def _is_current(file: IO[bytes], lock: pathlib.Path) -> bool:
    """Returns True if the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(lock))
    except FileNotFoundError:
        return False


def _holder(lock: pathlib.Path) -> str:
    """Describes the process that holds a lock."""
    try:
        holder = from_json(lock.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['process']} on {holder['host']}, since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
