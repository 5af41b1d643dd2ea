"""Writes large files from memory to disk, past the operating system's page cache.

Through the cache, every byte is copied into pages that must be allocated first, and flushed later.
Here it is copied into one of a few small buffers, which are written in turns (`O_DIRECT`), and its
digest is computed while it is in the processor's cache. Where a file system cannot do this, the
same writes go through the page cache.
"""

import collections
import contextlib
import errno
import fcntl
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from gemma_encoder.digests import Digest

ALIGNMENT = 4096  # of the positions, sizes and addresses of direct writes
BLOCK = 1 << 20  # bytes of a write: they stay in the processor's cache for their digest
BUFFERS = 4
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only

_spare_buffers: list[list[memoryview]] = []


def write_directly(path: pathlib.Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Creates a file and flushes it to disk.

    Args:
        path: a local file that does not exist; its folder does.
        pieces: the content; memory of bytes.

    Returns:
        The digest of the file.

    Raises:
        OSError: the file could not be written.
    """
    digest = Digest()
    writes = collections.deque()
    end = 0
    with (
        _buffers() as buffers,
        open(_open(path), "wb", buffering=0) as file,
        ThreadPoolExecutor(1) as pool,
    ):
        for block, size in _blocks(pieces, buffers):
            digest.add(block[:size])
            padded = block[: -(-size // ALIGNMENT) * ALIGNMENT]
            writes.append(pool.submit(_write, file.fileno(), padded, end))
            end += size
            if len(writes) == BUFFERS:  # the next block goes to the buffer of the oldest write
                writes.popleft().result()
        for write in writes:
            write.result()
        file.truncate(end)
        os.fsync(file.fileno())
    return str(digest)


@contextlib.contextmanager
def _buffers() -> Iterator[list[memoryview]]:
    """Lends buffers that are aligned to pages, and keeps them: new pages would take longer."""
    try:
        buffers = _spare_buffers.pop()
    except IndexError:
        buffers = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(BUFFERS)]
    try:
        yield buffers
    finally:
        _spare_buffers.append(buffers)


def _blocks(
    pieces: Iterable[bytes | memoryview], buffers: list[memoryview]
) -> Iterator[tuple[memoryview, int]]:
    """Copies pieces to buffers in turns; yields each with its bytes, all but the last one full."""
    turn = filled = 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            size = min(len(rest), BLOCK - filled)
            buffers[turn][filled : filled + size] = rest[:size]
            rest = rest[size:]
            filled += size
            if filled == BLOCK:
                yield buffers[turn], BLOCK
                turn, filled = (turn + 1) % len(buffers), 0
    if filled:
        yield buffers[turn], filled


def _open(path: pathlib.Path) -> int:
    """Creates a file for direct writes where the file system can; returns its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some file systems create it before they refuse
    return os.open(path, flags, 0o666)


def _write(descriptor: int, content: memoryview, position: int) -> None:
    """Writes all of a block, through the page cache if the file system asks for it."""
    while content:
        try:
            written = os.pwrite(descriptor, content, position)
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
            continue
        content = content[written:]
        position += written
