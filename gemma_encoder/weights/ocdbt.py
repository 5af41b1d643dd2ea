"""Writes databases of TensorStore's format OCDBT, in which Orbax stores arrays.

    FOLDER/d/ID            the large values, one after another, and the B+tree's only node
    FOLDER/manifest.ocdbt  the position of the node

TensorStore copies what it writes, through the page cache, and holds much of it until it commits.
Its documentation of the format names the fields: google.github.io/tensorstore/kvstore/ocdbt.
"""

import itertools
import pathlib
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence

from gemma_encoder.digests import Digest, extend_crc
from gemma_encoder.weights.direct_file import write_directly

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC, NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
INLINE_BYTES = 1024  # of values in the node, a limit for other writers
NODE_BYTES = 8 << 20  # a limit for other writers, too
ARITY_LOG2 = 4  # of the tree of versions, of which there is one


def write_database(
    folder: pathlib.Path,
    small: Mapping[str, bytes],
    large: Mapping[str, Sequence[bytes | memoryview]],
) -> dict[str, str]:
    """Writes a database to an empty folder; its large values are flushed to disk.

    Args:
        folder: a local folder.
        small: values by key, stored in the node.
        large: values by key, as pieces of bytes that are not copied.

    Returns:
        The digests of the files, by name.

    Raises:
        OSError: a file could not be written.
    """
    name = f"d/{uuid.uuid4().hex}"
    sizes = {key: sum(map(len, pieces)) for key, pieces in large.items()}
    positions = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    node = _node(name, small, sizes, positions)
    end = sum(sizes.values())
    (folder / "d").mkdir()
    digest = write_directly(folder / name, itertools.chain(*large.values(), [node]))
    statistics = [len(small) + len(large), len(node), end]
    manifest = _manifest(name, [end, len(node), *statistics])
    (folder / MANIFEST).write_bytes(manifest)
    return {name: digest, MANIFEST: str(Digest(manifest))}


def _node(
    file: str, small: Mapping[str, bytes], sizes: Mapping[str, int], positions: Mapping[str, int]
) -> bytes:
    """Returns the leaf that holds all keys, in their order, and small values or positions."""
    keys = sorted([*small, *sizes], key=str.encode)
    encoded = [key.encode() for key in keys]
    stored = [key for key in keys if key in sizes]
    inline = [small[key] for key in keys if key in small]
    prefixes = [0] * (len(keys) - 1)  # shared by a key and the next: keys are not shortened
    body = [
        b"\0",  # height
        _file_table(file),
        _varints([len(keys), *prefixes, *map(len, encoded)]),
        *encoded,
        _varints(sizes[key] if key in sizes else len(small[key]) for key in keys),
        _varints(int(key in sizes) for key in keys),  # kinds of values
        _varints([0] * len(stored)),  # indices of files
        _varints(positions[key] for key in stored),
        *inline,
    ]
    return _record(NODE_MAGIC, b"".join(body))


def _manifest(file: str, root: Sequence[int]) -> bytes:
    """Returns the manifest with one version.

    Args:
        file: the file of the root node.
        root: position and size of the root, the number of keys, bytes of all nodes and of all
            large values.
    """
    body = [
        uuid.uuid4().bytes,
        b"\0",  # a manifest of one file
        _varints([INLINE_BYTES, NODE_BYTES, ARITY_LOG2]),
        b"\0",  # no compression
        _file_table(file),
        _varints([1, 1]),  # one version, the first
        b"\0",  # height of the root
        _varints([0, *root]),
        time.time_ns().to_bytes(8, "little"),
        _varints([0]),  # no nodes of versions
    ]
    return _record(MANIFEST_MAGIC, b"".join(body))


def _file_table(file: str) -> bytes:
    """Returns a table of one file in the database's folder."""
    return _varints([1, len(file), 0]) + file.encode()


def _record(magic: int, body: bytes) -> bytes:
    """Returns a record: magic, length, version, no compression, body and CRC-32C."""
    content = b"\0\0" + body
    length = 4 + 8 + len(content) + 4
    record = magic.to_bytes(4, "big") + length.to_bytes(8, "little") + content
    return record + extend_crc(0, record).to_bytes(4, "little")


def _varints(values: Iterable[int]) -> bytes:
    """Returns whole numbers from 0, seven bits per byte, the lowest first."""
    encoded = bytearray()
    for value in values:
        while value >= 0x80:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)
