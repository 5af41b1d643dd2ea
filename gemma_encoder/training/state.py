"""The training state: parameters, optimizer state and step, created where they live."""

from collections.abc import Callable
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


class TrainState(NamedTuple):
    """All that training changes. Randomness needs no state: it is a function of (seed, step).

    Attributes:
        parameters: nested dict, float32.
        optimizer: optax's state of the trainable parameters.
        step: updates taken, int32.
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
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Args:
        config: the encoder.
        optimizer: of the trainable parameters.
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
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec),
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
) -> TrainState:
    """A state with random parameters, each created on the devices that hold it.

    The values are the same on every mesh.

    Args:
        config: the encoder.
        optimizer: of the trainable parameters.
        mesh: the devices.
        seed: of the random parameters.
        pretrained: a part of the nested dict of parameters, already on the mesh, that replaces
            random ones.
        is_trainable: whether the parameter at a path is trained.
    """
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh, is_trainable)
    )
    pretrained = parameter_paths(pretrained or {})

    def draw(key):
        # Values that are not returned are never computed: XLA drops them.
        return {
            path: leaf
            for path, leaf in parameter_paths(initial_parameters(config, key)).items()
            if path not in pretrained
        }

    by_path = parameter_paths(shardings.parameters)
    random = jax.jit(
        draw,
        out_shardings={path: spec for path, spec in by_path.items() if path not in pretrained},
    )(jax.random.key(seed))
    parameters = jax.tree.unflatten(
        jax.tree.structure(shardings.parameters),
        [{**random, **pretrained}[path] for path in by_path],
    )
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(
        select(parameters, is_trainable)
    )
    return TrainState(parameters, moments, jax.device_put(np.int32(0), shardings.step))
