"""Sharding: the device mesh, and one table of rules from parameter paths to partition specs.

Mesh axes: `data` (replicas), `fsdp` (shards of parameters, optimizer state and batch rows) and
`tensor` (shards of heads and hidden units).

D embed, F hidden, N query heads, K key-value heads, H head dim, V vocab.
"""

import re
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.encoder import parameter_paths

AXES = ("data", "fsdp", "tensor")

# (regular expression for the full path, spec). Paths are those of a single layer, without its index
# ("backbone/layers/query"); the axis along which layers are stacked is never sharded. The first
# match applies, and every parameter must have one.
RULES: Sequence[tuple[str, P]] = (
    (r"backbone/embedding", P("tensor", "fsdp")),  # V, D
    (r"backbone/layers/query", P("fsdp", "tensor", None)),  # D, N, H
    (r"backbone/layers/key_value", P("fsdp", None, "tensor", None)),  # D, 2, K, H
    (r"backbone/layers/attention_out", P("tensor", None, "fsdp")),  # N, H, D
    (r"backbone/layers/gating", P("fsdp", None, "tensor")),  # D, 2, F: feed-forward, gate and up
    (r"backbone/layers/linear", P("tensor", "fsdp")),  # F, D: feed-forward, down
    (r"backbone/.*_norm/scale", P()),
    (r"backbone/layers/.*_lora_[ab]", P()),
    (r"backbone/(layers/\w+|embedding)_(scale|sum)", P()),  # of int8 matrices
    (r"(pooler|heads)/.*", P()),
)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh of (data, fsdp, tensor).

    With several TPU slices, the data axis spans slices and the other axes stay within a slice:
    only gradients cross the slower network between slices.

    Args:
        shape: sizes of the axes; one may be −1, which stands for the remaining devices.
        devices: all devices by default.

    Raises:
        InputError: the shape does not use every device exactly once, or the data axis is not a
            multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _resolved_sizes(shape, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices <= 1:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    data, fsdp, tensor = sizes
    if data % slices:
        raise InputError(
            f"mesh {sizes}: the data axis must be a multiple of the {slices} slices, since fsdp "
            "and tensor stay within a slice"
        )
    per_slice = (data // slices, fsdp, tensor)
    grid = mesh_utils.create_hybrid_device_mesh(per_slice, (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def _resolved_sizes(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of the mesh axes with −1 replaced by the remaining devices."""
    sizes = list(shape)
    valid = all(size >= 1 or size == -1 for size in sizes)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or not valid:
        raise InputError(
            "mesh must be three sizes (data, fsdp, tensor), at most one of them -1; "
            f"got {tuple(shape)}"
        )
    if -1 in sizes:
        explicit = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = num_devices // explicit
    if int(np.prod(sizes)) != num_devices:
        raise InputError(f"mesh {tuple(shape)} does not fit {num_devices} devices")
    return tuple(sizes)


def spec_for(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns the partition spec of a parameter by `RULES`.

    A dimension that the mesh axis does not divide is not sharded, and a warning is logged.

    Args:
        path: path of the parameter, such as "backbone/blocks/0/query".
        shape: shape of the parameter, the axis of stacked layers included.
        mesh: the mesh from `make_mesh`.

    Raises:
        InputError: no rule matches the path.
    """
    layer_path = re.sub(r"^backbone/(blocks|remainder)/\d+/", "backbone/layers/", path)
    rule = next((spec for pattern, spec in RULES if re.fullmatch(pattern, layer_path)), None)
    if rule is None:
        raise InputError(
            f"no sharding rule matches the parameter {path!r}; add one to "
            "gemma_encoder.model.sharding.RULES"
        )
    stacked = (None,) if path.startswith("backbone/blocks/") else ()
    axes = [*stacked, *rule, *(None,) * (len(shape) - len(stacked) - len(rule))]
    for dimension, axis in enumerate(axes):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            logging.warning(
                "%s: mesh axis %r (%d) does not divide dimension %d of %s, which is not sharded",
                path,
                axis,
                mesh.shape[axis],
                dimension,
                tuple(shape),
            )
            axes[dimension] = None
    return P(*axes)


def parameter_shardings(parameters: dict, mesh: Mesh) -> dict:
    """Returns the shardings of a nested dict of parameters or of their shapes."""
    leaves = [
        NamedSharding(mesh, spec_for(path, leaf.shape, mesh))
        for path, leaf in parameter_paths(parameters).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(parameters), leaves)


def like_parameters(tree, parameters: dict, shardings: dict, mesh: Mesh):
    """Returns shardings for an optimizer state.

    A leaf whose path ends in a parameter's path is sharded like that parameter. Adafactor's
    factored moments drop one of the parameter's two largest dimensions, `v_row` the largest and
    `v_col` the other; they are sharded like the parameter along the dimensions that they have. All
    other leaves are replicated.

    Args:
        tree: the optimizer state, or its shapes.
        parameters: nested dict of parameters, or of their shapes.
        shardings: shardings of the parameters, a nested dict of the same structure.
        mesh: the mesh from `make_mesh`.
    """
    leaves = jax.tree.leaves(parameters)
    pairs = zip(leaves, jax.tree.leaves(shardings), strict=True)
    by_path = dict(zip(parameter_paths(parameters), pairs, strict=True))

    def leaf_sharding(path, leaf) -> NamedSharding:
        names = [_entry_name(entry) for entry in path]
        for start in range(len(names)):
            suffix = "/".join(names[start:])
            if suffix in by_path:
                return _moment_sharding(leaf, names[start - 1], *by_path[suffix])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def _entry_name(entry) -> str:
    """Returns the dict key, attribute name or index of an entry of a tree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return ""


def _moment_sharding(leaf, moment: str, parameter, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of an optimizer's moment of a parameter.

    Args:
        leaf: the moment.
        moment: name of the moment in the optimizer state, e.g. "v_row".
        parameter: the parameter, or its shape.
        sharding: sharding of the parameter.
    """
    if leaf.shape == parameter.shape:
        return sharding
    # In the order of sizes: v_row lacks the largest dimension, v_col the second largest.
    dropped = {"v_row": -1, "v_col": -2}.get(moment)
    if dropped is None or leaf.ndim != parameter.ndim - 1:
        return replicated(sharding.mesh)  # a placeholder of one element
    spec = [*sharding.spec, *(None,) * (parameter.ndim - len(sharding.spec))]
    del spec[int(np.argsort(parameter.shape)[dropped])]
    return NamedSharding(sharding.mesh, P(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, micro: bool = False) -> NamedSharding:
    """Returns the sharding of a batch, rows over the data and fsdp axes.

    Args:
        mesh: the mesh from `make_mesh`.
        micro: arrays have a leading axis of micro-batches, which is not sharded.
    """
    rows = ("data", "fsdp")
    return NamedSharding(mesh, P(None, rows) if micro else P(rows))
