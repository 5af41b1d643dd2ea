"""Where everything lives: the mesh, and one table from parameter paths to partition specs.

Mesh axes: `data` (replicas), `fsdp` (parameters and optimiser state cut up, batch rows too) and `tensor` (heads and hidden units).
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

# (regular expression on the whole path, spec). Paths name one layer ("backbone/layers/query"); the axis along which layers are
# stacked is never cut. Every parameter must match; the first match counts.
RULES: Sequence[tuple[str, P]] = (
    (r"backbone/embedding", P("tensor", "fsdp")),  # V, D
    (r"backbone/layers/query", P("fsdp", "tensor", None)),  # D, N, H
    (r"backbone/layers/key_value", P("fsdp", None, "tensor", None)),  # D, 2, K, H
    (r"backbone/layers/attention_out", P("tensor", None, "fsdp")),  # N, H, D
    (r"backbone/layers/gating", P("fsdp", None, "tensor")),  # D, 2, F
    (r"backbone/layers/linear", P("tensor", "fsdp")),  # F, D
    (r"backbone/.*_norm/scale", P()),
    (r"backbone/layers/.*_lora_[ab]", P()),
    (r"(pooler|heads)/.*", P()),
)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor); one of them may be −1 for "all that are left".

    Of several TPU slices, each holds a part of the data axis and the whole of the others: only gradients cross the slower network
    between slices.

    Raises:
        InputError: the shape does not use every device exactly once, or cannot be laid over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(shape)
    if (
        len(sizes) != len(AXES)
        or sizes.count(-1) > 1
        or any(size < 1 and size != -1 for size in sizes)
    ):
        raise InputError(
            f"mesh must be three sizes (data, fsdp, tensor), at most one of them -1; got {tuple(shape)}"
        )
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // rest
    if int(np.prod(sizes)) != len(devices):
        raise InputError(f"mesh {tuple(shape)} does not fit {len(devices)} devices")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise InputError(
                f"mesh {tuple(sizes)}: the data axis must be a multiple of the {slices} slices, since fsdp and tensor stay within one"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def spec_for(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The partition spec of a parameter; a mesh axis that does not divide its dimension is left out there, and logged."""
    layer = re.sub(r"^backbone/(blocks|remainder)/\d+/", "backbone/layers/", path)
    rule = next((spec for pattern, spec in RULES if re.fullmatch(pattern, layer)), None)
    if rule is None:
        raise InputError(
            f"no sharding rule matches the parameter {path!r}; add one to gemma_encoder.model.sharding.RULES"
        )
    stacked = (None,) if path.startswith("backbone/blocks/") else ()
    axes = [*stacked, *rule, *(None,) * (len(shape) - len(stacked) - len(rule))]
    for dimension, axis in enumerate(axes):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            logging.warning(
                "%s: mesh axis %r (%d) does not divide dimension %d of %s; it is not cut there",
                path,
                axis,
                mesh.shape[axis],
                dimension,
                tuple(shape),
            )
            axes[dimension] = None
    return P(*axes)


def parameter_shardings(parameters: dict, mesh: Mesh) -> dict:
    """For a nested dict of parameters (or their shapes), the sharding of each."""
    leaves = [
        NamedSharding(mesh, spec_for(path, leaf.shape, mesh))
        for path, leaf in parameter_paths(parameters).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(parameters), leaves)


def like_parameters(tree, parameters: dict, shardings: dict, mesh: Mesh):
    """Shardings for an optimiser state: a leaf that mirrors a parameter (by the end of its path) lives where that parameter does.

    Adafactor's factored moments lack one of the parameter's two largest dimensions: `v_row` the largest, `v_col` the other. They are
    cut as the parameter is along those that they have.
    """
    by_path = dict(
        zip(
            parameter_paths(parameters),
            zip(jax.tree.leaves(parameters), jax.tree.leaves(shardings), strict=True),
            strict=True,
        )
    )

    def place(path, leaf):
        names = [
            str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", ""))))
            for entry in path
        ]
        for start in range(len(names)):
            if "/".join(names[start:]) not in by_path:
                continue
            parameter, sharding = by_path["/".join(names[start:])]
            if leaf.shape == parameter.shape:
                return sharding
            lacks = {"v_row": -1, "v_col": -2}.get(names[start - 1])
            if lacks is None or leaf.ndim != parameter.ndim - 1:
                break  # a placeholder, of one number
            spec = [*sharding.spec, *(None,) * (parameter.ndim - len(sharding.spec))]
            del spec[int(np.argsort(parameter.shape)[lacks])]
            return NamedSharding(mesh, P(*spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, micro: bool = False) -> NamedSharding:
    """Rows over the data and fsdp axes; `micro` where an axis of micro-batches comes first."""
    return NamedSharding(mesh, P(None, ("data", "fsdp")) if micro else P(("data", "fsdp")))
