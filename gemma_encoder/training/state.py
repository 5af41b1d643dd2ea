"""What training changes: parameters, optimiser state and the step, made where they live."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import initial_parameters, skeleton
from gemma_encoder.training import sharding


class TrainState(NamedTuple):
    """Parameters (nested dict, float32), the optimiser's state, and how many steps were taken. Randomness is (seed, step)."""

    parameters: Any
    optimizer: Any
    step: jax.Array


def abstract_state(config: EncoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = skeleton(config).shapes
    moments = jax.eval_shape(optimizer.init, shapes)
    where = sharding.parameter_shardings(shapes, mesh)
    shardings = TrainState(where, sharding.like_parameters(moments, shapes, where, mesh), sharding.replicated(mesh))
    state = TrainState(shapes, moments, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings)


def initial_state(config: EncoderConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A state with random parameters, each made on the devices that hold it; the same values on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

    def make(key):
        parameters = initial_parameters(config, key)
        return TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))

    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
