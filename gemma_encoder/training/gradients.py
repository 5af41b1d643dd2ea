"""Gradient of the loss of a global batch, computed a micro-batch at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.encoder import EncoderOutput
from gemma_encoder.training.losses import LossOptions, TaskLoss


class Sums(NamedTuple):
    """Sums over a batch: the loss, those of the tasks, texts, and tokens without padding."""

    loss: jax.Array
    tasks: Mapping[str, TaskLoss]
    texts: jax.Array
    real_tokens: jax.Array


def batch_gradient(
    encode: Callable[[Any, Batch, jax.Array], EncoderOutput],
    loss_of: Callable[..., tuple[jax.Array, dict[str, TaskLoss]]],
    trained: Any,
    batch: Batch,
    key: jax.Array,
    tasks: Sequence[Task],
    options: LossOptions,
) -> tuple[Any, Sums]:
    """Returns the gradient of the loss of a whole batch, computed a micro-batch at a time.

    The losses of most tasks are sums over texts or lists, and so are their gradients. A task whose
    loss couples all texts of the batch takes three steps (GradCache, arXiv 2101.06983, section 3):
    the scores of all micro-batches without a gradient; the gradient of the loss at these scores;
    then, with the same dropout keys, its product with the scores' Jacobian. The result is the
    gradient of the large batch, in the memory of a micro-batch and the scores.

    Args:
        encode: the encoder of (trained parameters, micro-batch, key), with dropout.
        loss_of: `losses.batch_loss` of (output, batch), with its constants.
        trained, batch, key, tasks, options: see `train_step`.
    """
    heads = sorted({task.head for task in tasks if task.kind.couples})
    if batch.tokens.shape[0] == 1:
        heads = []

    def loss_of_micro_batch(trained, inputs, key):
        micro_batch, cotangents = inputs
        output = encode(trained, micro_batch, key)
        loss, task_losses = loss_of(
            output, micro_batch, includes=lambda task: not (heads and task.kind.couples)
        )
        products = [jnp.vdot(output.scores[name], cotangents[name]) for name in heads]
        real_tokens = (micro_batch.segment_ids > 0).sum(dtype=jnp.int32)
        sums = Sums(loss, task_losses, micro_batch.weight.sum(), real_tokens)
        return sum(products, loss), sums

    cotangents = {}
    if heads:
        scores = _scores(encode, heads, trained, batch, key)
        coupled = functools.partial(_coupled_loss, loss_of, batch, options)
        (loss, task_losses), cotangents = jax.value_and_grad(coupled, has_aux=True)(scores)
    gradient_of = jax.grad(loss_of_micro_batch, has_aux=True)
    gradient, sums = _sum_over_micro_batches(gradient_of, trained, (batch, cotangents), key)
    if heads:
        sums = sums._replace(loss=sums.loss + loss, tasks=sums.tasks | task_losses)
    return gradient, sums


def _scores(
    encode: Callable[[Any, Batch, jax.Array], EncoderOutput],
    heads: Sequence[str],
    trained: Any,
    batch: Batch,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the scores of some heads for all micro-batches, [M, B, S, C] each."""

    def call(carry, indexed):
        index, micro_batch = indexed
        scores = encode(trained, micro_batch, jax.random.fold_in(key, index)).scores
        return carry, {name: scores[name] for name in heads}

    return jax.lax.scan(call, None, (jnp.arange(batch.tokens.shape[0]), batch))[1]


def _coupled_loss(
    loss_of: Callable[..., tuple[jax.Array, dict[str, TaskLoss]]],
    batch: Batch,
    options: LossOptions,
    scores: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, TaskLoss]]:
    """Returns the losses that couple the texts of all micro-batches, from the scores of all."""
    joined = {name: values.reshape(-1, *values.shape[2:]) for name, values in scores.items()}
    return loss_of(
        EncoderOutput(None, None, joined),
        join_micro_batches(batch, options.groups),
        options=options._replace(groups=options.groups * batch.tokens.shape[0]),
        includes=lambda task: task.kind.couples,
    )


def join_micro_batches(batch: Batch, groups: int) -> Batch:
    """Returns the rows of all micro-batches as one batch; `groups` is the lists of each."""
    first = jnp.arange(batch.tokens.shape[0], dtype=batch.group_id.dtype)[:, None, None] * groups
    shifted = jnp.where(batch.group_id < 0, -1, batch.group_id + first)
    fields = batch._replace(group_id=shifted)
    return Batch(*(field.reshape(-1, *field.shape[2:]) for field in fields))


def _sum_over_micro_batches(
    gradient_of: Callable[[Any, Any, jax.Array], Any], trained: Any, inputs: Any, key: jax.Array
) -> Any:
    """Sums `gradient_of(trained, micro_batch, key)` over the leading axis of `inputs`."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    first = jax.tree.map(lambda field: field[0], inputs)
    if count == 1:
        return gradient_of(trained, first, key)

    def add(total, indexed_micro_batch):
        index, micro_batch = indexed_micro_batch
        value = gradient_of(trained, micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, value), None

    shapes = jax.eval_shape(gradient_of, trained, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), inputs))
    return total
