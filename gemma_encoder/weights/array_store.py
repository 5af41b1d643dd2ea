"""Writes and reads arrays as Orbax stores them, without its copies, where arrays are on CPUs.

There, the arrays to save already are in the memory of the host. Orbax holds what it has compressed
until it has all of it, and what it has read until Python collects its garbage. The layout is that
of `ocp.StandardSave`, and each reads what the other wrote: zarr arrays (version 2) in one OCDBT
database, and `_METADATA` for the structure of the tree (orbax 0.12, `InternalTreeMetadata`).
"""

import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from gemma_encoder.digests import Digest
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.weights.ocdbt import MANIFEST, write_database
from gemma_encoder.whole_files import is_remote

CHUNK = 4 << 20  # bytes that are read as one piece
JAX_ALIGNMENT = 64  # bytes
METADATA = "_METADATA"
STORES_ZEROS = "store_array_data_equal_to_fill_value"
SEQUENCE, DICTIONARY = 1, 2  # kinds of keys in `_METADATA`

KeyPath = Sequence[Any]


def is_local(folder: os.PathLike) -> bool:
    """Returns True if arrays of this process can be stored in a folder by this module."""
    is_alone = jax.process_count() == 1
    return jax.default_backend() == "cpu" and is_alone and not is_remote(folder)


def write_arrays(folder: pathlib.Path, tree: Any) -> dict[str, str]:
    """Writes a tree of JAX arrays of this process, from where they are in memory.

    They are not compressed, which would take longer than writing, and copy them.

    Args:
        folder: a local folder that exists and is empty.
        tree: nested dicts, lists and tuples, such as an optimizer state; None and empty containers
            are stored, too.

    Returns:
        The digests of the files, by name. Arrays are flushed to disk, the small files are not.

    Raises:
        OSError: a file could not be written.
    """
    small: dict[str, bytes] = {}
    large: dict[str, list[bytes | memoryview]] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]
    for path, array in leaves:
        if not _is_empty(array):
            chunk = _chunk_shape(array)
            small[f"{_name(path)}/.zarray"] = to_json(_layout(array, chunk)).encode()
            large |= {f"{_name(path)}/{key}": parts for key, parts in _chunks(array, chunk)}
    structure = {
        "tree_metadata": dict(_description(path, leaf) for path, leaf in leaves),
        "use_ocdbt": True,
        "use_zarr3": False,
        STORES_ZEROS: True,
        "custom_metadata": None,
    }
    metadata = to_json(structure).encode()
    (folder / METADATA).write_bytes(metadata)
    return {METADATA: str(Digest(metadata)), **write_database(folder, small, large)}


def restore(folder: os.PathLike, arguments: Any, *, partial: bool = False) -> Any:
    """Restores a tree of arrays.

    Args:
        folder: a folder written by `write_arrays` or by Orbax.
        arguments: the tree with `ocp.ArrayRestoreArgs` in place of the arrays: sharding, shape, and
            dtype, None for the stored one.
        partial: whether the folder may hold further arrays.

    Raises:
        ValueError: an array is missing, damaged or of another shape, or there are others.
    """
    if not is_local(folder) or not (pathlib.Path(folder) / MANIFEST).exists():
        item = jax.tree.map(lambda _: 0, arguments)  # names the arrays; Orbax ignores the values
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            folder,
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=partial),
        )
    metadata = read_object(pathlib.Path(folder) / METADATA)
    if not partial:
        _check_names(metadata["tree_metadata"].values(), arguments)
    # No cache of chunks that are read once.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    # Early versions of Orbax did not store chunks of zeros.
    fills = {"fill_missing_data_reads": not metadata.get(STORES_ZEROS, False)}

    def read(path: KeyPath, leaf: Any) -> Any:
        store = tensorstore.open(
            _spec(folder, path) | fills, open=True, read=True, context=context
        ).result()
        if store.shape != tuple(leaf.global_shape):
            raise ValueError(f"{_name(path)} has shape {store.shape}, expected {leaf.global_shape}")
        return _read(store, leaf.sharding, leaf.dtype or store.dtype.numpy_dtype)

    # One array after another: at most one shard is in memory twice.
    return jax.tree_util.tree_map_with_path(read, arguments)


def _check_names(leaves: Iterable[Mapping[str, Any]], arguments: Any) -> None:
    """Raises ValueError if leaves of `_METADATA` are not the arrays of a tree."""
    stored = {
        ".".join(entry["key"] for entry in leaf["key_metadata"])
        for leaf in leaves
        if not leaf["value_metadata"]["skip_deserialize"]
    }
    expected = {_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(arguments)[0]}
    if stored != expected:
        missing, others = sorted(expected - stored), sorted(stored - expected)
        raise ValueError(
            f"it holds other arrays than expected: {', '.join(missing) or 'none'} missing, "
            f"{', '.join(others) or 'none'} in addition"
        )


def _read(store: tensorstore.TensorStore, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """Reads an array; shards that several devices hold are read once."""
    shards: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(store.shape).items():
        sizes = zip(index, store.shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in sizes)
        shards.setdefault(bounds, []).append(device)
    arrays = {}
    for bounds, devices in shards.items():
        region = tuple(slice(*bound) for bound in bounds)
        values = _read_region(store[region], np.dtype(dtype))
        for device in devices:
            arrays[device] = jax.device_put(values, device, may_alias=False)
        jax.block_until_ready([arrays[device] for device in devices])
    return jax.make_array_from_single_device_arrays(store.shape, sharding, list(arrays.values()))


def _read_region(store: tensorstore.TensorStore, dtype: np.dtype) -> np.ndarray:
    """Reads a part of an array by rows of chunks: all at once would be in memory twice."""
    values = _empty(store.shape, dtype)
    if not store.rank:
        values[...] = store.read().result()
        return values
    rows = max(store.chunk_layout.read_chunk.shape[0], 1)
    first = store.origin[0]
    for start in range(0, len(values), rows):
        end = min(start + rows, len(values))
        values[start:end] = store[first + start : first + end].read().result()
    return values


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array whose memory JAX copies.

    JAX on a CPU shares memory that is aligned as its own is, whatever `may_alias` asks for, and a
    training step cannot reuse the memory of an array of NumPy's.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 2 * JAX_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % JAX_ALIGNMENT + JAX_ALIGNMENT // 4
    return memory[start : start + size].view(dtype).reshape(shape)


def _spec(folder: os.PathLike, path: KeyPath) -> dict[str, Any]:
    """Returns where TensorStore finds an array."""
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{os.fspath(folder)}/"},
            "path": f"{_name(path)}/",
        },
    }


def _chunk_shape(array: jax.Array) -> list[int]:
    """Returns the shape of chunks that are in one piece in memory, and each in a single shard."""
    chunk = list(array.sharding.shard_shape(array.shape))
    for axis, (size, whole) in enumerate(zip(tuple(chunk), array.shape, strict=True)):
        bytes_of_row = math.prod(chunk[axis + 1 :]) * array.dtype.itemsize
        rows = max(CHUNK // max(bytes_of_row, 1), 1)
        if rows >= size:
            break
        if size != whole:  # the grid of chunks starts anew in each shard
            rows = next(count for count in range(rows, 0, -1) if size % count == 0)
        else:  # chunks of about the same size
            rows = -(-size // -(-size // rows))
        chunk[axis] = rows
        if rows > 1:
            break
    return [max(length, 1) for length in chunk]


def _chunks(
    array: jax.Array, shape: Sequence[int]
) -> Iterator[tuple[str, list[bytes | memoryview]]]:
    """Yields the key of each chunk and its bytes, which share the memory of the array."""
    size_of_chunk = math.prod(shape) * array.dtype.itemsize
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        values = np.asarray(shard.data)
        first = [(part.start or 0) // step for part, step in zip(shard.index, shape, strict=True)]
        counts = [-(-size // step) for size, step in zip(values.shape, shape, strict=True)]
        for block in np.ndindex(*counts):
            steps = zip(block, shape, strict=True)
            region = tuple(slice(index * step, (index + 1) * step) for index, step in steps)
            content = memoryview(np.ravel(values[region]).view(np.uint8))
            key = ".".join(str(sum(indices)) for indices in zip(first, block, strict=True))
            # A chunk is stored as a whole, also beyond the end of the array.
            yield key or "0", [content, bytes(size_of_chunk - len(content))]


def _layout(array: jax.Array, chunk: Sequence[int]) -> dict[str, Any]:
    """Returns the metadata of an array in the format zarr."""
    dtype = np.dtype(array.dtype)
    return {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": array.shape,
        "zarr_format": 2,
    }


def _is_empty(leaf: Any) -> bool:
    return leaf is None or (isinstance(leaf, dict | list | tuple) and not leaf)


def _description(path: KeyPath, leaf: Any) -> tuple[str, dict[str, Any]]:
    """Returns the key and the value of a leaf in `_METADATA`."""
    is_index = [isinstance(entry, jax.tree_util.SequenceKey) for entry in path]
    entries = [
        {"key": _key(entry), "key_type": SEQUENCE if is_sequence else DICTIONARY}
        for entry, is_sequence in zip(path, is_index, strict=True)
    ]
    if _is_empty(leaf):
        value = {"value_type": _empty_type(leaf), "skip_deserialize": True}
    else:
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        value["write_shape"] = list(leaf.sharding.shard_shape(leaf.shape))
    return str(tuple(map(_key, path))), {"key_metadata": entries, "value_metadata": value}


def _empty_type(leaf: Any) -> str:
    """Returns the name by which Orbax stores None or an empty container."""
    if leaf is None or hasattr(leaf, "_fields"):
        return "None"
    return {dict: "Dict", list: "List", tuple: "Tuple"}[type(leaf)]


def _name(path: KeyPath) -> str:
    """Returns the name by which Orbax stores an array."""
    return ".".join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
    """Returns the name by which Orbax stores an entry of a path."""
    if isinstance(entry, jax.tree_util.SequenceKey):
        return str(entry.idx)
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return entry.name
    return str(entry.key)
