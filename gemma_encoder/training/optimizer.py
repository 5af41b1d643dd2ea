"""Optimizers and schedules by config: optax's own, with rules on parameters by their paths.

Rules see one path for each layer, "backbone/layers/17/linear", although layers are stacked: for a stacked parameter the values of
its layers become a vector along the stacked axis.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import abstract_encoder, layer_paths, parameter_paths
from gemma_encoder.training.optimizer_config import OptimizerConfig

BLOCK_ROWS = 32  # of a table, that XLA on a CPU adds up as it reads
TABLE_ROWS = BLOCK_ROWS * 256  # whole blocks for each of up to 256 shards


def is_frozen(options: OptimizerConfig, path: str) -> bool:
    """Whether the parameter at that path, one layer's, keeps its value."""
    return bool(options.freeze and re.fullmatch(options.freeze, path))


def rate_multiplier(options: OptimizerConfig, path: str, num_layers: int) -> float:
    """The factor on the learning rate of the parameter at that path, one layer's."""
    if is_frozen(options, path):
        return 0.0
    factor = next(
        (factor for pattern, factor in options.multipliers if re.fullmatch(pattern, path)), 1.0
    )
    layer = re.match(r"backbone/layers/(\d+)/", path)
    below = (
        num_layers - int(layer[1]) - 1
        if layer
        else num_layers
        if path == "backbone/embedding"
        else 0
    )
    return factor * options.layer_decay**below


def make_schedule(options: OptimizerConfig, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over `warmup` steps, then the fall."""
    if not 0 <= warmup <= steps:
        raise InputError(f"warmup of {warmup} steps does not fit in a training of {steps}")
    peak, rest = options.learning_rate, max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def trainable(options: OptimizerConfig, encoder: EncoderConfig) -> Callable[[str], bool]:
    """Whether the parameter at a path (of the stacked tree) changes in training: unless every layer of it is frozen.

    Raises:
        InputError: a rule matches no parameter, or all are frozen.
    """
    paths = {
        path: layer_paths(encoder.transformer, path)
        for path in parameter_paths(abstract_encoder(encoder).shapes)
    }
    single = [path for layers in paths.values() for path in layers]
    for name, pattern in (
        ("freeze", options.freeze),
        *(("multipliers", pair[0]) for pair in options.multipliers),
    ):
        if pattern and not any(re.fullmatch(pattern, path) for path in single):
            raise InputError(
                f"optimizer.{name}: {pattern!r} matches no parameter; paths look like {single[0]}, {single[-1]}, or {single[len(single) // 2]}"
            )
    changing = {
        path
        for path, layers in paths.items()
        if not all(is_frozen(options, layer) for layer in layers)
    }
    if not changing:
        raise InputError(f"optimizer.freeze={options.freeze!r} freezes every parameter")
    return changing.__contains__


def make_optimizer(
    options: OptimizerConfig, schedule: optax.Schedule, encoder: EncoderConfig
) -> optax.GradientTransformation:
    """The optimizer of the trainable part of an encoder's parameters."""
    transformer = encoder.transformer

    def decays(path: str) -> float:
        return 0.0 if re.search(options.no_decay, path) else options.weight_decay

    def multiplies(path: str) -> float:
        return rate_multiplier(options, path, transformer.num_layers)

    def decay(updates, parameters):
        return jax.tree.map(
            lambda update, leaf, rate: update + rate * leaf,
            updates,
            parameters,
            _by_rule(decays, parameters, transformer),
        )

    def multiply(updates, parameters):
        return jax.tree.map(
            lambda update, factor: update * factor,
            updates,
            _by_rule(multiplies, parameters, transformer),
        )

    moments = {
        "adamw": [
            optax.scale_by_adam(
                options.b1, options.b2, options.epsilon, mu_dtype=options.moment_dtype
            )
        ],
        # The two largest dimensions are factored; the axis of stacked layers, below 128, is never one of them.
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
    """For each parameter a number, or a vector along the stacked axis."""
    values = []
    for path, leaf in parameter_paths(parameters).items():
        of_layers = [rule(layer) for layer in layer_paths(transformer, path)]
        same = len(set(of_layers)) == 1
        values.append(
            of_layers[0]
            if same
            else np.array(of_layers, np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
        )
    return jax.tree.unflatten(jax.tree.structure(parameters), values)


def _clip_all(limit: float) -> Callable[[dict, dict | None], dict]:
    """Clips the global norm of the gradients, by one factor for all.

    A division by the norm, as in optax's own, would keep a second copy of all gradients on a CPU.
    """

    def clip(updates, parameters):
        del parameters
        factor = jnp.minimum(1.0, limit / jnp.maximum(global_norm(updates), 1e-12))
        return jax.tree.map(lambda update: update * factor, updates)

    return clip


def _clip_layers(updates: dict, parameters: dict | None) -> dict:
    """Scales each layer's update down to a root mean square of at most 1."""

    def clip(path, update):
        axes = tuple(range(1 if _is_stacked(path) else 0, update.ndim))
        return update / jnp.maximum(
            1.0, jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True))
        )

    del parameters
    return jax.tree.unflatten(
        jax.tree.structure(updates),
        [clip(path, update) for path, update in parameter_paths(updates).items()],
    )


def global_norm(tree: dict) -> jax.Array:
    """The Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(_sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)))


def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    """In an order that XLA on a CPU neither writes the squares to memory for, as large as the parameter, nor adds up one by one.

    A table of many rows, the embedding, goes by blocks of rows, of which every shard of it has whole ones.
    Other parameters go by rows, each as a product with itself.
    """
    if not leaf.ndim:
        return jnp.square(leaf)
    if leaf.ndim > 1 and leaf.shape[0] % TABLE_ROWS == 0:
        return jnp.sum(jnp.sum(jnp.square(leaf.reshape(-1, BLOCK_ROWS, *leaf.shape[1:])), axis=1))
    return jnp.sum(jnp.einsum("...i,...i->...", leaf, leaf, precision=jax.lax.Precision.HIGHEST))


def _is_stacked(path: str) -> bool:
    return path.startswith("backbone/blocks/")
