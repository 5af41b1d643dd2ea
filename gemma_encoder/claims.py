"""Claims of files and folders: one process at a time writes to them."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import IO

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json


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
    if "://" in str(path):
        yield
        return
    lock = pathlib.Path(path)
    try:
        file = _open_locked(lock)
    except OSError as error:
        raise InputError(f"{subject} cannot be written: {error.strerror or error}") from error
    if file is None:
        raise InputError(f"{subject} is in use by {_holder(lock)}; {advice}")
    with file:
        try:
            yield
        finally:
            # Removed before the lock is dropped: see `_open_locked`.
            with contextlib.suppress(OSError):
                lock.unlink()


def _open_locked(lock: pathlib.Path) -> IO[str] | None:
    """Opens and locks a file, and writes who holds it; returns None if another process does."""
    while True:
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115, the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        if _is_current(file, lock):
            break
        file.close()  # its former holder removed it after it was opened here
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
    file.truncate(0)
    file.write(to_json(holder))
    file.flush()
    return file


def _is_current(file: IO[str], lock: pathlib.Path) -> bool:
    """Returns True if the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
    except FileNotFoundError:
        return False


def _holder(lock: pathlib.Path) -> str:
    """Describes the process that holds a lock."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['process']} on {holder['host']}, since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
