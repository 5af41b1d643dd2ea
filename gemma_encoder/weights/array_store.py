"""Writes and reads arrays as Orbax stores them, without its copies, where arrays are on a CPU.

There, the arrays to save already are in the memory of the host. Orbax holds what it has compressed
until it has all of it, and what it has read until Python collects its garbage. The layout is that
of `ocp.StandardSave`, and each reads what the other wrote: zarr arrays in one OCDBT database, and
`_METADATA` for the structure of the tree (orbax-checkpoint 0.12, `InternalTreeMetadata`).
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.whole_files import is_remote, write_whole

CHUNK = 4 << 20  # bytes that are read as one piece
STORES_ZEROS = "store_array_data_equal_to_fill_value"
SEQUENCE, DICTIONARY = 1, 2  # kinds of keys in `_METADATA`

KeyPath = Sequence[Any]


def is_local(folder: os.PathLike) -> bool:
    """Returns True if arrays of this process can be stored in a folder by this module."""
    is_alone = jax.process_count() == 1
    return jax.default_backend() == "cpu" and is_alone and not is_remote(folder)


def write_trees(trees: Mapping[pathlib.Path, Any]) -> None:
    """Writes trees of JAX arrays of one process, at once, from where they are in memory.

    They are not compressed, which would take longer than writing, and copy them. Nothing is flushed
    to disk.

    Args:
        trees: by local folders that exist and are empty: nested dicts, lists and tuples, such as an
            optimizer state; None and empty containers are stored, too.

    Raises:
        ValueError: TensorStore cannot write a folder.
    """
    for futures in [_start_writing(folder, tree) for folder, tree in trees.items()]:
        for future in futures:
            future.result()


def _start_writing(folder: pathlib.Path, tree: Any) -> list[ts.Future]:
    """Starts to write a tree; its memory is read until all of the futures are done."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]
    context, transaction = _context(), ts.Transaction()
    stores = [
        (
            array,
            ts.open(
                _spec(folder, path) | {"metadata": _layout(array)},
                shape=array.shape,
                dtype=array.dtype,
                create=True,
                context=context,
                transaction=transaction,
            ),
        )
        for path, array in leaves
        if not _is_empty(array)
    ]
    futures = [  # a write whose future is dropped is cancelled
        store.result()[region].write(values, can_reference_source_data_indefinitely=True).commit
        for array, store in stores
        for region, values in _chunks(array)
    ]
    content = {
        "tree_metadata": dict(_description(path, leaf) for path, leaf in leaves),
        "use_ocdbt": True,
        "use_zarr3": False,
        STORES_ZEROS: True,
        "custom_metadata": None,
    }
    write_whole(folder / "_METADATA", to_json(content))
    return [transaction.commit_async(), *futures]


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
    metadata = read_object(pathlib.Path(folder) / "_METADATA")
    if not partial:
        _check_names(metadata["tree_metadata"].values(), arguments)
    context = _context()
    # Early versions of Orbax did not store chunks of zeros.
    fills = {"fill_missing_data_reads": not metadata.get(STORES_ZEROS, False)}

    def read(path: KeyPath, leaf: Any) -> Any:
        if _is_empty(leaf):
            return leaf
        store = ts.open(_spec(folder, path) | fills, open=True, read=True, context=context).result()
        if store.shape != tuple(leaf.global_shape):
            raise ValueError(f"{_name(path)} has shape {store.shape}, expected {leaf.global_shape}")
        return _read(store, leaf.sharding, leaf.dtype or store.dtype.numpy_dtype)

    # One array after another: at most one shard is in memory twice.
    return jax.tree_util.tree_map_with_path(read, arguments, is_leaf=_is_empty)


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


def _spec(folder: os.PathLike, path: KeyPath) -> dict[str, Any]:
    """Returns where TensorStore finds an array."""
    return {
        "driver": "zarr",
        "store_data_equal_to_fill_value": True,
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{os.fspath(folder)}/"},
            "path": f"{_name(path)}/",
        },
    }


def _layout(array: jax.Array) -> dict[str, Any]:
    """Returns how an array is stored."""
    return {"chunks": chunk_shape(array), "compressor": None}


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


def _chunks(array: jax.Array) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields the index of each chunk in the array, and its values, which share its memory."""
    shape = chunk_shape(array)
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


def _description(path: KeyPath, leaf: Any) -> tuple[str, dict[str, Any]]:
    """Returns the key and the value of a leaf in `_METADATA`."""
    entries = [_key_entry(key) for key in path]
    if _is_empty(leaf):
        value = {"value_type": _empty_type(leaf), "skip_deserialize": True}
    else:
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        value["write_shape"] = list(leaf.sharding.shard_shape(leaf.shape))
    key = str(tuple(entry["key"] for entry in entries))
    return key, {"key_metadata": entries, "value_metadata": value}


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
