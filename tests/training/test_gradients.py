"""Gradient of a batch in micro-batches: that of all texts at once, also where a loss couples them.

The reference puts the forward passes of all micro-batches, with the same dropout keys, and one loss
over their outputs into one differentiated function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import (
    EncoderOutput,
    abstract_encoder,
    initial_parameters,
    parameter_paths,
)
from gemma_encoder.training import gradients
from gemma_encoder.training.build import build
from gemma_encoder.training.losses import batch_loss
from gemma_encoder.training.state import TrainState
from gemma_encoder.training.step import train_step

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
# Keeps the gradient as the state of the optimizer, and leaves the parameters as they are.
RECORD = optax.GradientTransformation(
    lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    lambda gradient, state, parameters: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def recipe_of(micro, **changes):
    defaults = {
        "tasks": ("toy_retrieval", "toy_ranking", "toy_sentiment"),
        "mixture__mixing": "equal",
        "model__compute_dtype": "float32",
        "model__pooling__normalize": True,
        "model__attention_dropout": 0.1,
        "model__feed_forward_dropout": 0.1,
        "batch__rows": 16,
        "batch__micro_batches": 2,
        "batch__segments": 6,
        "ranking__list_size": 3,
        "retrieval__negatives": 2,
        "retrieval__positives": 2,
        "loss_options__retrieval__both_directions": True,
        "loss_options__retrieval__widths": (8,),
        "loss_options__retrieval__temperature": 0.2,
        "loss_options__retrieval__false_negative_margin": 0.3,
    }
    return build(micro(**(defaults | changes)), for_training=True)


@pytest.fixture(scope="module")
def example():
    """A recipe, parameters, a batch of two micro-batches, and a key."""
    from tests.micro import micro_config

    recipe = recipe_of(micro_config)
    return recipe, *inputs_of(recipe)


def inputs_of(recipe):
    """Returns parameters, a batch of micro-batches, and a key."""
    stream = TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream)
    batch = next(stream)
    stream.close()
    count = recipe.stream.micro_batches
    batch = jax.tree.map(lambda field: field.reshape(count, -1, *field.shape[1:]), batch)
    parameters = jax.jit(initial_parameters, static_argnums=0)(recipe.encoder, jax.random.key(3))
    return parameters, batch, jax.random.key(7)


def on_mesh(parameters, batch, shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    parameters = jax.device_put(parameters, sharding.parameter_shardings(parameters, mesh))
    return mesh, parameters, jax.device_put(batch, sharding.batch_sharding(mesh, micro=True))


def by_step(recipe, parameters, batch, key, shape):
    """Returns the gradient, the loss, and the losses of tasks by `train_step` on a mesh."""
    mesh, parameters, batch = on_mesh(parameters, batch, shape)
    state = TrainState(parameters, RECORD.init(parameters), jnp.int32(0))
    after, metrics = jax.jit(step_of(recipe, mesh))(state, batch, key)
    return jax.device_get((parameter_paths(after.optimizer), metrics.loss, metrics.tasks))


def step_of(recipe, mesh):
    return functools.partial(
        train_step,
        encoder=abstract_encoder(recipe.encoder),
        optimizer=RECORD,
        schedule=lambda step: 0.0,
        is_trainable=lambda path: True,
        tasks=recipe.tasks,
        options=recipe.losses,
        mesh=mesh,
    )


def loss_at_once(recipe, batch, key):
    """Returns the loss of the parameters as a single function of all micro-batches."""
    encoder = abstract_encoder(recipe.encoder)
    key = jax.random.fold_in(key, 0)
    count = len(batch.tokens)

    def encode(parameters, index):
        part = jax.tree.map(lambda field: field[index], batch)
        return encoder.merge(parameters)(
            part.tokens,
            part.segment_ids,
            part.positions,
            part.weight.shape[1],
            dropout_key=jax.random.fold_in(key, index),
            full=True,
        )

    def loss_of(parameters):
        outputs = [encode(parameters, index) for index in range(count)]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        whole = gradients.join_micro_batches(batch, recipe.losses.groups)
        options = recipe.losses._replace(groups=count * recipe.losses.groups)
        return batch_loss(EncoderOutput(*joined), whole, recipe.tasks, options)

    return loss_of


def at_once(recipe, parameters, batch, key):
    """Returns the same as `by_step`, from a single differentiated function."""
    gradient_of = jax.jit(jax.value_and_grad(loss_at_once(recipe, batch, key), has_aux=True))
    (loss, parts), gradient = gradient_of(parameters)
    return jax.device_get((parameter_paths(gradient), loss, parts))


@pytest.fixture(scope="module")
def reference(example):
    return at_once(*example)


@pytest.mark.parametrize("shape", MESHES)
def test_the_gradient_is_that_of_the_large_batch(example, reference, shape):
    compare(by_step(*example, shape), reference)


def compare(result, reference, atol=1e-6):
    gradient, loss, parts = result
    expected, expected_loss, expected_parts = reference
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for task, part in expected_parts.items():
        np.testing.assert_allclose(parts[task], part, rtol=1e-6, err_msg=task)
    norm = np.sqrt(sum(np.sum(np.square(value)) for value in expected.values()))
    for path, value in expected.items():
        # A millionth of the whole gradient: sums over rows in another order, in float32.
        np.testing.assert_allclose(gradient[path] / norm, value / norm, atol=atol, err_msg=path)


def test_every_part_of_the_loss_reaches_the_gradient(example, reference):
    """The batch must be able to tell a wrong gradient: each task matters, and so does coupling."""
    recipe, parameters, batch, key = example
    _, loss, parts = reference
    assert all(part.count > 2 for part in parts.values())
    separate = 0.0
    for index in range(len(batch.tokens)):
        alone = jax.tree.map(lambda field: field[index : index + 1], batch)  # noqa: B023
        separate += at_once(recipe, parameters, alone, key)[1]
    assert abs(separate - loss) > 0.01 * loss  # in-batch negatives of one micro-batch are fewer


def test_sparse_vectors_have_the_gradient_of_the_large_batch(micro):
    changes = {
        "tasks": ("toy_retrieval",),
        "retrieval__representation": "sparse",
        "model__pooling__normalize": False,
        "loss_options__retrieval__widths": (),
        "loss_options__retrieval__temperature": 1.0,
        "loss_options__retrieval__query_flops": 0.1,
        "loss_options__retrieval__document_flops": 0.1,
        "batch__rows": 8,
    }
    recipe = recipe_of(micro, **changes)
    inputs = inputs_of(recipe)
    compare(by_step(recipe, *inputs, (1, 1, 1)), at_once(recipe, *inputs))
    # Shards round otherwise, so the maximum of a few words is at another token.
    compare(by_step(recipe, *inputs, (2, 2, 2)), at_once(recipe, *inputs), 2e-5)


def test_memory_is_that_of_a_micro_batch_and_the_vectors(example):
    recipe, parameters, batch, key = example
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    state = TrainState(parameters, RECORD.init(parameters), jnp.int32(0))

    def temporary(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    larger = jax.tree.map(lambda field: np.concatenate([field] * 4), batch)
    step = step_of(recipe, mesh)
    growth = temporary(step, state, larger, key) - temporary(step, state, batch, key)
    rows, segments = np.prod(batch.weight.shape[:2]), batch.weight.shape[2]
    vectors = rows * segments * recipe.encoder.pooled_dim * 4
    lists = recipe.losses.groups * len(batch.tokens) * recipe.losses.retrieval_list_size
    similarities = recipe.losses.groups * len(batch.tokens) * lists * 4
    # Three more of the batch: vectors, their lists, their gradients; 16 times the similarities, as
    # both sides of them grow, for each width and direction.
    assert growth < 3 * 8 * vectors + 15 * 8 * similarities
    at_once = temporary(jax.grad(loss_at_once(recipe, larger, key), has_aux=True), parameters)
    assert at_once > 4 * growth
