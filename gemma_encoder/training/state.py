"""The training state: parameters, optimizer state and step, created sharded on the mesh."""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import (
    abstract_encoder,
    initial_parameters,
    parameter_paths,
    select,
)

# On a CPU, the random values of the tiny model take 1.4 s to compile in place of 3 to 7; they are
# drawn as fast, and are the same to the bit.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 1}


class TrainState(NamedTuple):
    """State that training updates. It has no RNG state: randomness depends on (seed, step).

    Attributes:
        parameters: nested dict of float32 arrays.
        optimizer: optax state of the trainable parameters.
        step: training steps taken, int32.
    """

    parameters: Any
    optimizer: Any
    step: jax.Array


def abstract_state(
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    is_trainable: Callable[[str], bool] = lambda path: True,
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, without allocating it.

    Args:
        config: the encoder config.
        optimizer: optimizer of the trainable parameters.
        mesh: the devices.
        is_trainable: whether the parameter at a path is trained.
    """
    shapes = abstract_encoder(config).shapes
    moments = jax.eval_shape(optimizer.init, select(shapes, is_trainable))
    parameter_shardings = sharding.parameter_shardings(shapes, mesh)
    shardings = TrainState(
        parameter_shardings,
        sharding.like_parameters(moments, shapes, parameter_shardings, mesh),
        sharding.replicated(mesh),
    )
    state = TrainState(shapes, moments, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def initial_state(
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    pretrained: dict | None = None,
    is_trainable: Callable[[str], bool] = lambda path: True,
    constants: Mapping[str, float] = types.MappingProxyType({}),
) -> TrainState:
    """Initializes a state with random parameters, each created on the devices of its shards.

    The values do not depend on the mesh.

    Args:
        config: the encoder config.
        optimizer: optimizer of the trainable parameters.
        mesh: the devices.
        seed: seed of the random parameters.
        pretrained: a subtree of the parameters, already on the mesh, to use instead of random
            ones.
        is_trainable: whether the parameter at a path is trained.
        constants: value of all elements of the parameters at these paths, unless `pretrained` has
            them.
    """
    abstract = abstract_state(config, optimizer, mesh, is_trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    pretrained = parameter_paths(pretrained or {})

    by_path = parameter_paths(shardings.parameters)
    draw = _draw(config, mesh, frozenset(by_path).difference(pretrained))
    filled = {
        path: jax.device_put(np.full(leaf.shape, constants[path], leaf.dtype), leaf.sharding)
        for path, leaf in parameter_paths(abstract.parameters).items()
        if path in constants
    }
    values = {**draw(jax.random.key(seed)), **filled, **pretrained}
    parameters = jax.tree.unflatten(
        jax.tree.structure(shardings.parameters), [values[path] for path in by_path]
    )
    init_optimizer = jax.jit(optimizer.init, out_shardings=shardings.optimizer)
    moments = init_optimizer(select(parameters, is_trainable))
    return TrainState(parameters, moments, jax.device_put(np.int32(0), shardings.step))


@functools.lru_cache(maxsize=8)
def _draw(
    config: EncoderConfig, mesh: Mesh, paths: frozenset[str]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns the jitted function that draws the parameters at some paths from a key."""

    def drawn(values):
        return {path: value for path, value in values.items() if path in paths}

    def draw(key):
        # XLA does not compute the values that are not returned.
        return drawn(parameter_paths(initial_parameters(config, key)))

    shardings = sharding.parameter_shardings(abstract_encoder(config).shapes, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        draw,
        out_shardings=drawn(parameter_paths(shardings)),
        compiler_options=QUICKLY_COMPILED if on_cpu else None,
    )
