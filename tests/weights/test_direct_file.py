"""Files are written past the page cache where it is possible, and are the same where it is not."""

import errno
import os

import pytest

from gemma_encoder import digests
from gemma_encoder.weights import direct_file
from gemma_encoder.weights.direct_file import ALIGNMENT, BLOCK, BUFFERS, write_directly


@pytest.fixture(params=["direct", "no such files", "no such writes"])
def support(request, monkeypatch):
    """File systems that can write directly; cannot open such files; cannot write to them."""
    opened, written = os.open, os.pwrite

    def refuse(path, flags, *args):
        if flags & direct_file.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args)

    def refuse_direct(descriptor, content, position):
        if direct_file.fcntl.fcntl(descriptor, direct_file.fcntl.F_GETFL) & direct_file.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, content[:5000], position)

    if request.param == "no such files":
        monkeypatch.setattr(os, "open", refuse)
    if request.param == "no such writes":
        monkeypatch.setattr(os, "pwrite", refuse_direct)


SIZES = [[], [0, 1], [ALIGNMENT], [3, BLOCK, 5], [BLOCK * (BUFFERS + 1) + 7, BLOCK]]


@pytest.mark.parametrize("sizes", SIZES)
def test_content_and_digest(tmp_path, support, sizes):
    pieces = [os.urandom(size) for size in sizes]
    digest = write_directly(tmp_path / "file", map(memoryview, pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert digest == digests._digest_of_file(tmp_path / "file")


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(descriptor, content, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        write_directly(tmp_path / "file", [bytes(10 * BLOCK)])


def test_no_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(FileExistsError):
        write_directly(tmp_path / "file", [b"after"])
