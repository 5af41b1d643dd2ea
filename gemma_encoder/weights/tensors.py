"""Between our parameters and somebody else's tensors: one table of names and axes for each format, read in both directions.

A tensor goes from its file to its place on the devices by itself, so the memory needed beside the parameters is that of one tensor.

V vocab, D embed, F hidden, N query heads, K kv heads, H head dim, C = 2 (keys and values; gate and up).
"""

import abc
import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import TransformerConfig
from gemma_encoder.model.encoder import parameter_paths
from gemma_encoder.model.transformer import layer_index

# Our axes of each parameter, without the one along which layers are stacked.
AXES = {
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
    """Where a parameter lies in another format.

    Attributes:
        names: their tensor; or two, that together make our axis C. `{layer}` stands for the number of the layer.
        axes: their axes in einops' notation, without C where there are two names; of several layouts, whichever fits the shape.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]


Table = Mapping[str, Entry]  # by our parameter's name in `AXES`


class Tensor(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(abc.ABC):
    """Somebody else's weights.

    Attributes:
        description: what kind of checkpoint it is, for people.
        tensors: those of the text transformer, by the names that `table` uses.
        skipped: names of what an encoder has no use for (vision, an output embedding, optimiser states).
        table: how they correspond to our parameters.
    """

    description: str
    tensors: Mapping[str, Tensor]
    skipped: tuple[str, ...]
    table: Table

    @abc.abstractmethod
    def config(self, hint: TransformerConfig | None = None) -> TransformerConfig:
        """The transformer that it holds.

        Args:
            hint: a config to believe where the files do not say enough.

        Raises:
            InputError: it cannot be told.
        """

    @abc.abstractmethod
    def read(self, name: str, sharding: Sharding) -> jax.Array:
        """One tensor in the dtype of its file, placed as `sharding` says."""

    def expected(self, config: TransformerConfig) -> dict[str, list[tuple[int, ...]]]:
        """Every tensor that a checkpoint of `config` holds, with the shapes that it may have."""
        sizes, result = axis_sizes(config), {}
        for parameter, entry in self.table.items():
            if parameter in ("query_norm/scale", "key_norm/scale") and not config.use_qk_norm:
                continue
            shapes = [_shape(axes, sizes) for axes in entry.axes]
            for layer in range(config.num_layers):
                result |= {name.format(layer=layer): shapes for name in entry.names}
        return result

    def check(self, config: TransformerConfig) -> None:
        """Raises InputError listing every tensor that is missing, surplus or of another shape than `config` wants."""
        expected = self.expected(config)
        problems = [f"{name} is missing" for name in sorted(expected.keys() - self.tensors.keys())]
        problems += [f"{name} is surplus" for name in sorted(self.tensors.keys() - expected.keys())]
        problems += [
            f"{name} has shape {self.tensors[name].shape}, expected {' or '.join(map(str, dict.fromkeys(shapes)))}"
            for name, shapes in expected.items()
            if name in self.tensors and self.tensors[name].shape not in shapes
        ]
        if problems:
            raise InputError(f"{self.description} does not hold this model: {'; '.join(problems)}")

    def load(
        self, config: TransformerConfig, shapes: dict, shardings: dict, dtype: jnp.dtype
    ) -> dict:
        """Our parameters of the backbone.

        Args:
            config: the transformer.
            shapes: nested dict of our parameters' shapes.
            shardings: nested dict, one for each of our parameters.
            dtype: of the result.

        Raises:
            InputError: the tensors are not those of `config`.
        """
        self.check(config)
        places, wanted = parameter_paths(shardings), parameter_paths(shapes)

        def largest_tensor(path: str) -> int:
            names = self.table[layers_of(config, path)[0]].names
            return max(int(np.prod(self.tensors[name.format(layer=0)].shape)) for name in names)

        # The largest tensors first: what reading them takes besides is given back before the memory fills up.
        loaded = {
            path: _load_one(self, config, path, wanted[path].shape, places[path], jnp.dtype(dtype))
            for path in sorted(wanted, key=largest_tensor, reverse=True)
        }
        return jax.tree.unflatten(jax.tree.structure(shapes), [loaded[path] for path in wanted])


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """The length of every axis."""
    D, F, N, K, H = (
        config.embed_dim,
        config.hidden_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    return {"V": config.vocab_size, "D": D, "F": F, "N": N, "K": K, "H": H, "C": 2}


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that axes such as "(N H) D" have."""
    return tuple(int(np.prod([sizes[name] for name in group.split()])) for group in _groups(axes))


def _groups(axes: str) -> list[str]:
    """The dimensions of an einops side: those of "(N H) D" are "N H" and "D"."""
    return [inner or single for inner, single in re.findall(r"\(([^)]*)\)|(\w+)", axes)]


def layers_of(config: TransformerConfig, path: str) -> tuple[str, range | None, bool]:
    """What a parameter's path means: its name in `AXES`, its layers (None outside layers), and whether they are stacked."""
    group, _, rest = path.partition("/")
    if group not in ("blocks", "remainder"):
        return path, None, False
    position, _, name = rest.partition("/")
    return name, layer_index(config, group, int(position)), group == "blocks"


def _load_one(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    path: str,
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: jnp.dtype,
) -> jax.Array:
    name, layers, stacked = layers_of(config, path)
    entry, ours, sizes = checkpoint.table[name], AXES[name], axis_sizes(config)
    whole = not stacked and len(entry.names) == 1
    destination = None if whole else _zeros(shape, dtype, sharding)()
    for place, layer in enumerate(layers or (0,)):
        for part, pattern in enumerate(entry.names):
            source = pattern.format(layer=layer)
            theirs = next(
                axes
                for axes in entry.axes
                if _shape(axes, sizes) == checkpoint.tensors[source].shape
            )
            piece = checkpoint.read(
                source,
                _their_sharding(sharding, theirs, ours, stacked, checkpoint.tensors[source].shape),
            )
            convert = _converter(
                theirs, ours, tuple(sizes.items()), dtype, stacked, len(entry.names) > 1, sharding
            )
            destination = convert(piece) if whole else convert(piece, destination, place, part)
            # One tensor at a time: nothing of the next is read before this one is where it belongs.
            destination.block_until_ready()
            del piece
    return destination


def _their_sharding(
    sharding: Sharding, theirs: str, ours: str, stacked: bool, shape: tuple[int, ...]
) -> Sharding:
    """The sharding of their tensor under which every device reads little more than it keeps."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * len(ours.split()))[1 if stacked else 0 :]
    axis_of = dict(zip(ours.split(), spec, strict=False))
    cut = [axis_of.get(group.split()[0]) for group in _groups(theirs)]
    counts = [
        int(
            np.prod(
                [
                    sharding.mesh.shape[axis]
                    for axis in (axes if isinstance(axes, tuple) else (axes,))
                ]
            )
        )
        if axes
        else 1
        for axes in cut
    ]
    return NamedSharding(
        sharding.mesh,
        P(
            *(
                axes if size % count == 0 else None
                for axes, count, size in zip(cut, counts, shape, strict=True)
            )
        ),
    )


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding):
    """A program, compiled once for each kind of parameter, whatever the number of checkpoints that are read."""
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
):
    """From their tensor to our parameter; or, where the parameter is made of several, into its place there, in place."""
    ours_without_parts = " ".join(axis for axis in ours.split() if axis != "C") if parts else ours
    named = dict(sizes)
    used = {name: named[name] for group in _groups(theirs) for name in group.split()}

    def arranged(piece: jax.Array) -> jax.Array:
        return einops.rearrange(piece, f"{theirs} -> {ours_without_parts}", **used).astype(dtype)

    if not stacked and not parts:
        return jax.jit(arranged, out_shardings=sharding)

    def into(
        piece: jax.Array, destination: jax.Array, place: jax.Array, part: jax.Array
    ) -> jax.Array:
        piece, start = arranged(piece), [0] * destination.ndim
        if parts:
            piece = jnp.expand_dims(piece, ours.split().index("C"))
            start[ours.split().index("C") + stacked] = part
        if stacked:
            piece = piece[None]
            start[0] = place
        return jax.lax.dynamic_update_slice(destination, piece, start)

    return jax.jit(into, out_shardings=sharding, donate_argnums=1)


def dump(
    backbone: Mapping, config: TransformerConfig, table: Table
) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, their tensor) of every parameter: the inverse of `load`, one at a time, on the host.

    Args:
        backbone: nested dict of our parameters.
        config: the transformer.
        table: of the format; the first of several layouts is written.
    """
    sizes = axis_sizes(config)
    for path, leaf in parameter_paths(backbone).items():
        name, layers, stacked = layers_of(config, path)
        entry, ours = table[name], AXES[name]
        theirs = entry.axes[0]
        for place, layer in enumerate(layers or (0,)):
            value = np.asarray(jax.device_get(leaf[place] if stacked else leaf))
            for part, pattern in enumerate(entry.names):
                axes = ours
                if len(entry.names) > 1:
                    axes = " ".join(axis for axis in ours.split() if axis != "C")
                    piece = value.take(part, axis=ours.split().index("C"))
                else:
                    piece = value
                used = {axis: sizes[axis] for axis in axes.split()}
                yield (
                    pattern.format(layer=layer),
                    np.ascontiguousarray(einops.rearrange(piece, f"{axes} -> {theirs}", **used)),
                )
