"""Optax optimizers and schedules from a config, with rules by parameter path.

Although layers are stacked, rules see a path per layer, e.g. "backbone/layers/17/linear": for a
stacked parameter, the values of its layers become a vector along the stacked axis.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import abstract_encoder, layer_paths, parameter_paths
from gemma_encoder.training.optimizer_config import OptimizerConfig

MAX_SHARDS = 256  # of an axis, for which its blocks are whole
MAX_BLOCK = 32  # rows that are summed in one expression
MANY = 1 << 20  # values above which a sum of squares is worth several operations to compile


def is_frozen(options: OptimizerConfig, path: str) -> bool:
    """Returns True if the parameter at a path of a single layer is frozen."""
    return bool(options.freeze and re.fullmatch(options.freeze, path))


def rate_multiplier(options: OptimizerConfig, path: str, num_layers: int) -> float:
    """Returns the learning-rate multiplier of the parameter at a path of a single layer."""
    if is_frozen(options, path):
        return 0.0
    matching = (factor for pattern, factor in options.multipliers if re.fullmatch(pattern, path))
    factor = next(matching, 1.0)
    layers_above = 0
    if layer := re.match(r"backbone/layers/(\d+)/", path):
        layers_above = num_layers - int(layer[1]) - 1
    elif path == "backbone/embedding":
        layers_above = num_layers
    return factor * options.layer_decay**layers_above


def make_schedule(options: OptimizerConfig, steps: int, warmup: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warmup over `warmup` steps, then the decay."""
    if not 0 <= warmup <= steps:
        raise InputError(f"warmup of {warmup} steps does not fit in a training of {steps} steps")
    peak = options.learning_rate
    decay_steps = max(steps - warmup, 1)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    return optax.join_schedules([rise, decay], [warmup])


def trainable(options: OptimizerConfig, encoder: EncoderConfig) -> Callable[[str], bool]:
    """Returns the predicate of trainable parameters, by path in the stacked tree.

    A stacked parameter is trainable unless it is frozen in every layer.

    Raises:
        InputError: a rule matches no parameter, or all parameters are frozen.
    """
    paths = {
        path: layer_paths(encoder.transformer, path)
        for path in parameter_paths(abstract_encoder(encoder).shapes)
    }
    _check_rules(options, [layer for layers in paths.values() for layer in layers])
    trainable_paths = {
        path
        for path, layers in paths.items()
        if not all(is_frozen(options, layer) for layer in layers)
    }
    if not trainable_paths:
        raise InputError(f"optimizer.freeze={options.freeze!r} freezes every parameter")
    return trainable_paths.__contains__


def _check_rules(options: OptimizerConfig, paths: Sequence[str]) -> None:
    """Raises InputError if `freeze` or a multiplier matches none of the paths of single layers."""
    rules = [("freeze", options.freeze)]
    rules += [("multipliers", pattern) for pattern, _ in options.multipliers]
    for name, pattern in rules:
        if pattern and not any(re.fullmatch(pattern, path) for path in paths):
            middle = paths[len(paths) // 2]
            raise InputError(
                f"optimizer.{name}: {pattern!r} matches no parameter; "
                f"paths look like {paths[0]}, {paths[-1]}, or {middle}"
            )


def make_optimizer(
    options: OptimizerConfig, schedule: optax.Schedule, encoder: EncoderConfig
) -> optax.GradientTransformation:
    """Returns the optimizer of the trainable parameters of an encoder."""
    transformer = encoder.transformer

    def decay_rate(path: str) -> float:
        return 0.0 if re.search(options.no_decay, path) else options.weight_decay

    def multiplier(path: str) -> float:
        return rate_multiplier(options, path, transformer.num_layers)

    def decay(updates, parameters):
        rates = _by_rule(decay_rate, parameters, transformer)
        return jax.tree.map(
            lambda update, leaf, rate: update + rate * leaf, updates, parameters, rates
        )

    def multiply(updates, parameters):
        factors = _by_rule(multiplier, parameters, transformer)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    moments = {
        "adamw": [
            optax.scale_by_adam(
                options.b1, options.b2, options.epsilon, mu_dtype=options.moment_dtype
            )
        ],
        # Factors the two largest dimensions; the axis of stacked layers, below 128, is not one.
        "adafactor": [optax.scale_by_factored_rms(), optax.stateless(_clip_layers)],
    }[options.name]
    clip = [optax.stateless(_clip_all(options.clip_norm))] if options.clip_norm else []
    decayed = [optax.stateless(decay)] if options.weight_decay else []
    return optax.chain(
        *clip, *moments, *decayed, optax.stateless(multiply), optax.scale_by_learning_rate(schedule)
    )


def _by_rule(
    rule: Callable[[str], float], parameters: dict, transformer: TransformerConfig
) -> dict:
    """Applies a rule to all parameters: gives a scalar, or a vector along the stacked axis."""
    values = []
    for path, leaf in parameter_paths(parameters).items():
        layer_values = [rule(layer) for layer in layer_paths(transformer, path)]
        if len(set(layer_values)) == 1:
            values.append(layer_values[0])
        else:
            shape = (-1, *(1,) * (leaf.ndim - 1))
            values.append(np.array(layer_values, np.float32).reshape(shape))
    return jax.tree.unflatten(jax.tree.structure(parameters), values)


def _clip_all(limit: float) -> Callable[[dict, dict | None], dict]:
    """Clips the global norm of the gradients, by multiplying all of them by one factor.

    Dividing by the norm, as optax does, would keep a second copy of all gradients on a CPU.
    """

    def clip(updates, parameters):
        del parameters
        factor = jnp.minimum(1.0, limit / jnp.maximum(global_norm(updates), 1e-12))
        return jax.tree.map(lambda update: update * factor, updates)

    return clip


def _clip_layers(updates: dict, parameters: dict | None) -> dict:
    """Scales each layer's update down to a root mean square of at most 1."""

    def clip(path, update):
        first_axis = 1 if _is_stacked(path) else 0
        axes = tuple(range(first_axis, update.ndim))
        root_mean_square = jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True))
        return update / jnp.maximum(1.0, root_mean_square)

    del parameters
    clipped = [clip(path, update) for path, update in parameter_paths(updates).items()]
    return jax.tree.unflatten(jax.tree.structure(updates), clipped)


def global_norm(tree: dict) -> jax.Array:
    """Returns the Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(_sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)))


def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    """Sums the squares of a leaf in an order that is fast on a CPU.

    There, XLA computes a product and a reduction apart: the squares, as large as the parameter, are
    written to memory; and a dot product of a row with itself is a loop over single values. A sum
    that is written out is one loop over vectors. So the rows of a block are added up like that, one
    array for each position in the block, and only the result is reduced: a block's share of the
    leaf. No block crosses the boundary of a shard.
    """
    if not leaf.ndim:
        return jnp.square(leaf)
    axis, rows = _blocks(leaf.shape)
    if leaf.size <= MANY or rows == 1:
        precision = jax.lax.Precision.HIGHEST
        return jnp.sum(jnp.einsum("...i,...i->...", leaf, leaf, precision=precision))
    blocks = leaf.reshape(*leaf.shape[:axis], -1, rows, *leaf.shape[axis + 1 :])
    parts = (jax.lax.index_in_dim(blocks, row, axis + 1, keepdims=False) for row in range(rows))
    return jnp.sum(sum(jnp.square(part) for part in parts))


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns an axis before the last and the rows of its blocks: as many as are allowed."""
    choices = [(0, 1)]
    for axis, size in enumerate(shape[:-1]):
        # An axis is sharded only where the shards divide it.
        whole = size // math.gcd(size, MAX_SHARDS)
        rows = max(rows for rows in range(1, MAX_BLOCK + 1) if whole % rows == 0)
        choices.append((axis, rows))
    return max(choices, key=lambda choice: choice[1])


def _is_stacked(path: str) -> bool:
    return path.startswith("backbone/blocks/")
