"""Conversion between our parameters and the tensors of other checkpoint formats.

Each format declares one table of tensor names and axes, which is used for reading and writing.
Tensors are loaded one at a time, straight to their devices, so that peak memory exceeds the
parameters by about one tensor.

V vocab, D embed, F hidden, N query heads, K kv heads, H head dim, C = 2 (keys and values; gate
and up).
"""

import abc
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.model.encoder import parameter_paths
from gemma_encoder.model.transformer import layer_index

# The axes of each parameter, without the axis along which layers are stacked.
PARAMETER_AXES = {
    "embedding": "V D",
    "final_norm/scale": "D",
    "query": "D N H",
    "key_value": "D C K H",
    "attention_out": "N H D",
    "query_norm/scale": "H",
    "key_norm/scale": "H",
    "gating": "D C F",
    "linear": "F D",
    "pre_attention_norm/scale": "D",
    "post_attention_norm/scale": "D",
    "pre_mlp_norm/scale": "D",
    "post_mlp_norm/scale": "D",
}


class Entry(NamedTuple):
    """The stored form of one parameter in another format.

    Attributes:
        names: the tensor's name, where `{layer}` stands for the layer index; or the names of two
            tensors, which are stacked along our axis C.
        axes: the stored axes in einops notation, without C where there are two names. If there are
            several layouts, the one that fits the shape is used.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]


# Elements up to which numpy converts a parameter; larger ones need programs, 40 ms to compile each.
MAX_ON_HOST = 1 << 24

TensorTable = Mapping[str, Entry]  # by parameter name, as in `PARAMETER_AXES`


class Tensor(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(abc.ABC):
    """A checkpoint of pretrained or fine-tuned weights, in any supported format.

    Attributes:
        description: format and location, for messages.
        tensors: the tensors of the text transformer, by the names that `table` uses.
        skipped: names of tensors that an encoder does not use (vision tower, output embedding,
            optimizer state).
        table: maps our parameters to stored tensors.
    """

    description: str
    tensors: Mapping[str, Tensor]
    skipped: tuple[str, ...]
    table: TensorTable

    @abc.abstractmethod
    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """Returns the transformer's config.

        Args:
            hint: config to use if the files do not determine it.

        Raises:
            InputError: the files do not determine the config, and there is no hint.
        """

    @abc.abstractmethod
    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """Reads one tensor in its stored dtype onto the devices of `sharding`."""

    def expected(self, config: TransformerConfig) -> dict[str, list[tuple[int, ...]]]:
        """Returns the valid shapes of every tensor in a checkpoint of `config`."""
        sizes = axis_sizes(config)
        result = {}
        for parameter, entry in self.table.items():
            if parameter in ("query_norm/scale", "key_norm/scale") and not config.use_qk_norm:
                continue
            shapes = [_shape(axes, sizes) for axes in entry.axes]
            for layer in range(config.num_layers):
                result |= {name.format(layer=layer): shapes for name in entry.names}
        return result

    def check(self, config: TransformerConfig) -> None:
        """Checks that the tensors are those of `config`.

        Raises:
            InputError: lists every missing or unexpected tensor and every wrong shape.
        """
        expected = self.expected(config)
        problems = [f"{name} is missing" for name in sorted(expected.keys() - self.tensors.keys())]
        unexpected = sorted(self.tensors.keys() - expected.keys())
        problems += [f"{name} is unexpected" for name in unexpected]
        for name, shapes in expected.items():
            if name in self.tensors and self.tensors[name].shape not in shapes:
                valid_shapes = " or ".join(map(str, dict.fromkeys(shapes)))
                problems.append(
                    f"{name} has shape {self.tensors[name].shape}, expected {valid_shapes}"
                )
        if problems:
            raise InputError(f"{self.description} does not match the model: {'; '.join(problems)}")

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Loads the backbone's parameters.

        Args:
            config: the transformer.
            shapes: nested dict of our parameters' shapes.
            shardings: nested dict with a sharding for each of our parameters.
            dtype: dtype of the result.

        Raises:
            InputError: the tensors are not those of `config`.
        """
        self.check(config)
        sharding_of = parameter_paths(shardings)
        abstract = parameter_paths(shapes)

        def largest_tensor(path: str) -> int:
            names = self.table[layers_of(config, path)[0]].names
            return max(math.prod(self.tensors[name.format(layer=0)].shape) for name in names)

        # Largest tensors first: their read buffers are freed before the parameters fill the memory.
        loaded = {
            path: _load_parameter(
                self, config, path, abstract[path].shape, sharding_of[path], jnp.dtype(dtype)
            )
            for path in sorted(abstract, key=largest_tensor, reverse=True)
        }
        return jax.tree.unflatten(jax.tree.structure(shapes), [loaded[path] for path in abstract])


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """Returns the size of every axis, by its letter."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.hidden_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "C": 2,
    }


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of axes such as "(N H) D"."""
    return tuple(math.prod(sizes[name] for name in group.split()) for group in _groups(axes))


def _groups(axes: str) -> list[str]:
    """Splits one side of an einops pattern into dimensions: "(N H) D" into "N H" and "D"."""
    return [inner or single for inner, single in re.findall(r"\(([^)]*)\)|(\w+)", axes)]


def layers_of(config: TransformerConfig, path: str) -> tuple[str, range | None, bool]:
    """Returns the layers that a parameter's path covers.

    Returns:
        The parameter's name in `PARAMETER_AXES`, its layers (None outside layers), and whether
        they are stacked along axis 0.
    """
    group, _, remainder = path.partition("/")
    if group not in ("blocks", "remainder"):
        return path, None, False
    position, _, name = remainder.partition("/")
    return name, layer_index(config, group, int(position)), group == "blocks"


class _Parts(NamedTuple):
    """The stored tensors of a parameter: offset of the layer, half, name and axes of each."""

    ours: str
    sizes: Mapping[str, int]
    stacked: bool
    halves: bool
    tensors: list[tuple[int, int, str, str]]


def _parts(checkpoint: Checkpoint, config: TransformerConfig, path: str) -> _Parts:
    name, layers, stacked = layers_of(config, path)
    entry = checkpoint.table[name]
    sizes = axis_sizes(config)
    tensors = []
    for offset, layer in enumerate(layers or (0,)):
        for half, pattern in enumerate(entry.names):
            source = pattern.format(layer=layer)
            shape = checkpoint.tensors[source].shape
            theirs = next(axes for axes in entry.axes if _shape(axes, sizes) == shape)
            tensors.append((offset, half, source, theirs))
    return _Parts(PARAMETER_AXES[name], sizes, stacked, len(entry.names) > 1, tensors)


def _load_parameter(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    path: str,
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: jnp.dtype,
) -> jax.Array:
    """Loads one parameter, which may be assembled from several tensors."""
    parts = _parts(checkpoint, config, path)
    if math.prod(shape) <= MAX_ON_HOST and sharding.is_fully_addressable:
        return jax.device_put(_on_host(checkpoint, parts, shape, sharding, dtype), sharding)
    ours, sizes, stacked, halves, tensors = parts
    is_single_tensor = not stacked and not halves
    result = None if is_single_tensor else _zeros(shape, dtype, sharding)()
    for offset, half, source, theirs in tensors:
        stored = checkpoint.tensors[source].shape
        tensor = checkpoint.read(source, _stored_sharding(sharding, theirs, ours, stacked, stored))
        convert = _converter(theirs, ours, tuple(sizes.items()), dtype, stacked, halves, sharding)
        result = convert(tensor) if is_single_tensor else convert(tensor, result, offset, half)
        # Finish this copy before the next read: two tensors at once would double the overhead.
        result.block_until_ready()
        del tensor
    return result


def _on_host(
    checkpoint: Checkpoint,
    parts: _Parts,
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: jnp.dtype,
) -> np.ndarray:
    """Loads one parameter into memory of the host."""
    axes = _without_parts(parts.ours) if parts.halves else parts.ours
    used = {axis: parts.sizes[axis] for axis in axes.split()}
    device = SingleDeviceSharding(min(sharding.device_set, key=lambda device: device.id))
    result = np.empty(shape, dtype)
    for offset, half, source, theirs in parts.tensors:
        target = result[offset] if parts.stacked else result
        if parts.halves:
            target = np.moveaxis(target, parts.ours.split().index("C"), 0)[half]
        tensor = np.asarray(checkpoint.read(source, device))
        target[...] = einops.rearrange(tensor, f"{theirs} -> {axes}", **used)
    return result


def _stored_sharding(
    sharding: Sharding, theirs: str, ours: str, stacked: bool, shape: tuple[int, ...]
) -> Sharding:
    """Returns a sharding of the stored tensor under which devices read little more than they need.

    Args:
        sharding: sharding of our parameter.
        theirs: the stored axes.
        ours: the parameter's axes.
        stacked: whether our parameter has a leading axis of layers.
        shape: shape of the stored tensor.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    axis_names = ours.split()
    spec = (*sharding.spec, *(None,) * len(axis_names))
    mesh_axes_of = dict(zip(axis_names, spec[1:] if stacked else spec, strict=False))
    stored_spec = []
    for group, size in zip(_groups(theirs), shape, strict=True):
        mesh_axes = mesh_axes_of.get(group.split()[0])
        divides = size % _num_shards(sharding.mesh, mesh_axes) == 0
        stored_spec.append(mesh_axes if divides else None)
    return NamedSharding(sharding.mesh, P(*stored_spec))


def _num_shards(mesh: Mesh, mesh_axes: str | tuple[str, ...] | None) -> int:
    """Returns the number of shards along a dimension with this entry in its partition spec."""
    if not mesh_axes:
        return 1
    names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
    return math.prod(mesh.shape[name] for name in names)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    """Returns a jitted function that allocates zeros; cached across checkpoints."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _converter(
    theirs: str,
    ours: str,
    sizes: tuple,
    dtype: jnp.dtype,
    stacked: bool,
    parts: bool,
    sharding: Sharding,
) -> Callable[..., jax.Array]:
    """Returns a jitted function from a stored tensor to our parameter.

    If the parameter is assembled from several tensors, the function takes (tensor, parameter, layer
    offset, part) and updates the donated parameter in place.

    Args:
        theirs: the stored axes.
        ours: the parameter's axes.
        sizes: items of `axis_sizes`, hashable.
        dtype: dtype of the parameter.
        stacked: whether layers are stacked along axis 0.
        parts: whether axis C is made of several tensors.
        sharding: sharding of the parameter.
    """
    names = ours.split()
    tensor_axes = _without_parts(ours) if parts else ours
    size_of = dict(sizes)
    used = {name: size_of[name] for group in _groups(theirs) for name in group.split()}

    def rearrange(tensor: jax.Array) -> jax.Array:
        return einops.rearrange(tensor, f"{theirs} -> {tensor_axes}", **used).astype(dtype)

    if not stacked and not parts:
        return jax.jit(rearrange, out_shardings=sharding)

    def update(
        tensor: jax.Array, parameter: jax.Array, layer_offset: jax.Array, part: jax.Array
    ) -> jax.Array:
        tensor = rearrange(tensor)
        start = [0] * parameter.ndim
        if parts:
            tensor = jnp.expand_dims(tensor, names.index("C"))
            start[names.index("C") + stacked] = part
        if stacked:
            tensor = tensor[None]
            start[0] = layer_offset
        return jax.lax.dynamic_update_slice(parameter, tensor, start)

    return jax.jit(update, out_shardings=sharding, donate_argnums=1)


def _without_parts(axes: str) -> str:
    """Returns the axes without C."""
    return " ".join(axis for axis in axes.split() if axis != "C")


def dump(
    backbone: Mapping, config: TransformerConfig, table: TensorTable
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of another format, one at a time, on the host: the inverse of `load`.

    Args:
        backbone: nested dict of our parameters.
        config: the transformer.
        table: tensor table of the format; the first of several layouts is written.

    Yields:
        (name, tensor) in the other format.
    """
    sizes = axis_sizes(config)
    for path, leaf in parameter_paths(backbone).items():
        name, layers, stacked = layers_of(config, path)
        entry = table[name]
        ours = PARAMETER_AXES[name]
        has_parts = len(entry.names) > 1
        axes = _without_parts(ours) if has_parts else ours
        used = {axis: sizes[axis] for axis in axes.split()}
        for layer_offset, layer in enumerate(layers or (0,)):
            value = np.asarray(jax.device_get(leaf[layer_offset] if stacked else leaf))
            for part, pattern in enumerate(entry.names):
                tensor = value.take(part, axis=ours.split().index("C")) if has_parts else value
                tensor = einops.rearrange(tensor, f"{axes} -> {entry.axes[0]}", **used)
                yield pattern.format(layer=layer), np.ascontiguousarray(tensor)
