"""Writes and reads arrays as Orbax stores them, without its copies, where arrays are on a CPU.

There, the arrays to save already are in the memory of the host. Orbax holds what it has compressed
until it has all of it, and what it has read until Python collects its garbage; here a bounded
number of bytes is in flight. The layout is that of `ocp.StandardSave`, and each reads what the
other wrote: zarr arrays in one OCDBT database, and `_METADATA` for the structure of the tree
(orbax-checkpoint 0.12, `InternalTreeMetadata`).
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import is_remote, write_whole

CHUNK = 4 << 20  # bytes: what is compressed, and later read, as one piece
BATCH = 32 << 20  # bytes written between two commits, which hold them compressed
# Smaller trees are written as they are: that is faster by more than the disk space is worth.
COMPRESSED_FROM = 128 << 20
# Compresses zeros and values that come from bfloat16, as fast as random bits are copied.
COMPRESSOR = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}
SEQUENCE, DICTIONARY = 1, 2  # kinds of keys in `_METADATA`

KeyPath = Sequence[Any]


def is_local(folder: os.PathLike) -> bool:
    """Returns True if arrays of this process can be stored in a folder by this module."""
    is_alone = jax.process_count() == 1
    return jax.default_backend() == "cpu" and is_alone and not is_remote(folder)


def write_tree(folder: pathlib.Path, tree: Any) -> None:
    """Writes a tree of JAX arrays of one process; returns when nothing reads their memory anymore.

    Nothing is flushed to disk.

    Args:
        folder: a local folder that exists and is empty.
        tree: nested dicts, lists and tuples, such as an optimizer state; None and empty containers
            are stored, too.

    Raises:
        ValueError: TensorStore cannot write the folder.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]
    size = sum(leaf.nbytes for _, leaf in leaves if not _is_empty(leaf))
    writer = ArrayWriter(folder, is_compressed=size >= COMPRESSED_FROM)
    for path, leaf in leaves:
        writer.add(path, leaf)
    writer.finish()


def restore(folder: os.PathLike, arguments: Any, *, partial: bool = False) -> Any:
    """Restores a tree of arrays.

    Args:
        folder: a folder written by `write_tree` or by Orbax.
        arguments: the tree with `ocp.ArrayRestoreArgs` in place of the arrays: sharding, shape, and
            dtype, None for the stored one.
        partial: whether the folder may hold further arrays.

    Raises:
        ValueError: an array is missing, damaged or of another shape, or there are others.
    """
    if not is_local(folder) or not (pathlib.Path(folder) / "manifest.ocdbt").exists():
        item = jax.tree.map(lambda _: 0, arguments)  # names the arrays; Orbax ignores the values
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            folder,
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=partial),
        )
    if not partial:
        _check_names(pathlib.Path(folder), arguments)
    context = _context()

    def read(path: KeyPath, leaf: Any) -> Any:
        if _is_empty(leaf):
            return leaf
        name = _name(path)
        store = ts.open(_spec(folder, name), open=True, read=True, context=context).result()
        if store.shape != tuple(leaf.global_shape):
            raise ValueError(f"{name} has shape {store.shape}, expected {leaf.global_shape}")
        return _read(store, leaf.sharding, leaf.dtype or store.dtype.numpy_dtype)

    # One array after another: at most one shard is in memory twice.
    return jax.tree_util.tree_map_with_path(read, arguments, is_leaf=_is_empty)


def _check_names(folder: pathlib.Path, arguments: Any) -> None:
    """Raises ValueError if a folder does not hold the arrays of a tree, or holds others."""
    metadata = read_object(folder / "_METADATA")["tree_metadata"].values()
    stored = {
        ".".join(entry["key"] for entry in leaf["key_metadata"])
        for leaf in metadata
        if not leaf["value_metadata"]["skip_deserialize"]
    }
    expected = {_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(arguments)[0]}
    if stored != expected:
        missing, others = sorted(expected - stored), sorted(stored - expected)
        raise ValueError(
            f"it holds other arrays than expected: {', '.join(missing) or 'none'} missing, "
            f"{', '.join(others) or 'none'} in addition"
        )


def _read(store: ts.TensorStore, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """Reads an array; shards that several devices hold are read once."""
    shards: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(store.shape).items():
        sizes = zip(index, store.shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in sizes)
        shards.setdefault(bounds, []).append(device)
    arrays = {}
    for bounds, devices in shards.items():
        region = tuple(slice(*bound) for bound in bounds)
        values = store[region].read().result().astype(dtype, copy=False)
        for device in devices:
            # A training step could not reuse the memory of an array of NumPy's.
            arrays[device] = jax.device_put(values, device, may_alias=False)
        jax.block_until_ready([arrays[device] for device in devices])
    return jax.make_array_from_single_device_arrays(store.shape, sharding, list(arrays.values()))


def _context() -> ts.Context:
    """Returns TensorStore's settings: no cache, no flushing; no locks, as one process writes."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": False,
            "file_io_locking": {"mode": "none"},
        }
    )


def _spec(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns where TensorStore finds an array."""
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{os.fspath(folder)}/"},
            "path": f"{name}/",
        },
    }


class ArrayWriter:
    """Writes the arrays of a tree one after another.

    Args:
        folder: a local folder that exists and is empty.
        is_compressed: whether arrays are compressed.
    """

    def __init__(self, folder: pathlib.Path, *, is_compressed: bool):
        self._folder = pathlib.Path(folder)
        self._compressor = COMPRESSOR if is_compressed else None
        self._context = _context()
        self._metadata: dict[str, Any] = {}
        self._batch = ts.Transaction()
        self._batch_bytes = 0

    def add(self, path: KeyPath, leaf: Any) -> None:
        """Writes an array; its memory may be read until `finish` has returned.

        Args:
            path: keys of `jax.tree_util`, from the root.
            leaf: a JAX array, None or an empty container.
        """
        entries = [_key_entry(key) for key in path]
        names = tuple(entry["key"] for entry in entries)
        if _is_empty(leaf):
            value = {"value_type": _empty_type(leaf), "skip_deserialize": True}
        else:
            value = {"value_type": "jax.Array", "skip_deserialize": False}
            value["write_shape"] = list(leaf.sharding.shard_shape(leaf.shape))
            self._write(_name(path), leaf)
        self._metadata[str(names)] = {"key_metadata": entries, "value_metadata": value}

    def _write(self, name: str, array: jax.Array) -> None:
        """Writes the chunks of an array; commits whenever a batch is full."""
        shape = chunk_shape(array)
        metadata = {"chunks": shape, "compressor": self._compressor}
        store = ts.open(
            _spec(self._folder, name) | {"metadata": metadata},
            shape=array.shape,
            dtype=array.dtype,
            create=True,
            transaction=self._batch,
            context=self._context,
        ).result()
        for region, values in _chunks(array, shape):
            if self._batch_bytes >= BATCH:
                self._commit()
                store = store.with_transaction(self._batch)
            store[region].write(values, can_reference_source_data_indefinitely=True).copy.result()
            self._batch_bytes += values.nbytes

    def _commit(self) -> None:
        self._batch.commit_async().result()
        self._batch = ts.Transaction()
        self._batch_bytes = 0

    def finish(self) -> None:
        """Writes what is left of the arrays, and the structure of the tree."""
        self._commit()
        metadata = {
            "tree_metadata": self._metadata,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        write_whole(self._folder / "_METADATA", to_json(metadata))


def chunk_shape(array: jax.Array) -> list[int]:
    """Returns the shape of chunks of at most some megabytes, such that none is in two shards."""
    shard = array.sharding.shard_shape(array.shape)
    chunk = list(shard)
    for axis, (size, whole) in enumerate(zip(shard, array.shape, strict=True)):
        bytes_of_rest = math.prod(shard[axis + 1 :]) * array.dtype.itemsize
        rows = max(1, min(size, CHUNK // max(bytes_of_rest, 1)))
        pieces = max(1, math.ceil(size / rows))
        if size != whole:  # the grid of chunks starts anew in each shard
            pieces = next(n for n in range(pieces, max(size, 1) + 1) if size % n == 0 or n == size)
        chunk[axis] = max(1, math.ceil(size / pieces))
        if chunk[axis] > 1:
            break
    return chunk


def _chunks(array: jax.Array, shape: Sequence[int]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields the index of each chunk in the array, and its values, which share its memory."""
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        values = np.asarray(shard.data)
        starts = [index.start or 0 for index in shard.index]
        axes = [
            [(first, min(first + step, size)) for first in range(0, size, step)]
            for size, step in zip(values.shape, shape, strict=True)
        ]
        for bounds in itertools.product(*axes):
            region = tuple(
                slice(start + first, start + last)
                for start, (first, last) in zip(starts, bounds, strict=True)
            )
            yield region, values[tuple(slice(first, last) for first, last in bounds)]


def _is_empty(leaf: Any) -> bool:
    return leaf is None or (isinstance(leaf, dict | list | tuple) and not leaf)


def _empty_type(leaf: Any) -> str:
    """Returns the name by which Orbax stores None or an empty container."""
    if leaf is None or hasattr(leaf, "_fields"):
        return "None"
    return {dict: "Dict", list: "List", tuple: "Tuple"}[type(leaf)]


def _name(path: KeyPath) -> str:
    """Returns the name by which Orbax stores an array."""
    return ".".join(_key_entry(key)["key"] for key in path)


def _key_entry(key: Any) -> dict[str, Any]:
    """Returns the description of a key in `_METADATA`."""
    if isinstance(key, jax.tree_util.SequenceKey):
        return {"key": str(key.idx), "key_type": SEQUENCE}
    if isinstance(key, jax.tree_util.GetAttrKey):
        return {"key": key.name, "key_type": DICTIONARY}
    return {"key": str(key.key), "key_type": DICTIONARY}
