"""Reads arrays that Orbax stored, one after another, where they are restored to CPUs.

Orbax reads all at once and frees what it has read only when Python collects its garbage: a restore
takes up to twice the memory of the arrays. The layout is that of `ocp.StandardSave` (orbax 0.12):
zarr arrays in one OCDBT database, and `_METADATA` for the structure of the tree.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.whole_files import is_remote

STORES_ZEROS = "store_array_data_equal_to_fill_value"

KeyPath = Sequence[Any]


def is_local(folder: os.PathLike) -> bool:
    """Returns True if arrays of this process can be stored in a folder by this module."""
    is_alone = jax.process_count() == 1
    return jax.default_backend() == "cpu" and is_alone and not is_remote(folder)


def restore(folder: os.PathLike, arguments: Any, *, partial: bool = False) -> Any:
    """Restores a tree of arrays.

    Args:
        folder: a folder written by Orbax.
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
        values = store[region].read().result().astype(dtype, copy=False)
        for device in devices:
            # A training step could not reuse the memory of an array of NumPy's.
            arrays[device] = jax.device_put(values, device, may_alias=False)
        jax.block_until_ready([arrays[device] for device in devices])
    return jax.make_array_from_single_device_arrays(store.shape, sharding, list(arrays.values()))


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
