"""What training changes: parameters, optimiser state and the step, made where they live."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import initial_parameters, parameter_paths, select, skeleton


class TrainState(NamedTuple):
    """Parameters (nested dict, float32), the optimiser's state (of those that change), and how many steps were taken. Randomness is (seed, step)."""

    parameters: Any
    optimizer: Any
    step: jax.Array


def abstract_state(
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    changes: Callable[[str], bool] = lambda path: True,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Args:
        config, optimizer, mesh: what describes it.
        changes: whether the parameter at a path is trained.
    """
    shapes = skeleton(config).shapes
    moments = jax.eval_shape(optimizer.init, select(shapes, changes))
    where = sharding.parameter_shardings(shapes, mesh)
    shardings = TrainState(
        where, sharding.like_parameters(moments, shapes, where, mesh), sharding.replicated(mesh)
    )
    state = TrainState(shapes, moments, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings,
    )


def initial_state(
    config: EncoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    pretrained: dict | None = None,
    changes: Callable[[str], bool] = lambda path: True,
) -> TrainState:
    """A state with random parameters, each made on the devices that hold it; the same values on every mesh.

    Args:
        config, optimizer, mesh, seed: what describes it.
        pretrained: a part of the nested dict of parameters, already on the mesh, to take instead of random ones.
        changes: whether the parameter at a path is trained.
    """
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh, changes)
    )
    pretrained = parameter_paths(pretrained or {})

    def drawn(key):
        # What is not returned is never made: XLA drops it.
        return {
            path: leaf
            for path, leaf in parameter_paths(initial_parameters(config, key)).items()
            if path not in pretrained
        }

    places = parameter_paths(shardings.parameters)
    random = jax.jit(
        drawn,
        out_shardings={path: place for path, place in places.items() if path not in pretrained},
    )(jax.random.key(seed))
    parameters = jax.tree.unflatten(
        jax.tree.structure(shardings.parameters),
        [{**random, **pretrained}[path] for path in places],
    )
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(
        select(parameters, changes)
    )
    return TrainState(parameters, moments, jax.device_put(np.int32(0), shardings.step))
