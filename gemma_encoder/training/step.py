"""The compiled training step: forward, loss, backward and update in one program over the mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_encoder.inputs.batch import Batch, empty_batch
from gemma_encoder.inputs.task import Task
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import AbstractEncoder, abstract_encoder, merge_parameters, select
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.losses import LossOptions, TaskLoss, batch_loss
from gemma_encoder.training.optimizer import global_norm, make_optimizer, make_schedule, trainable
from gemma_encoder.training.state import TrainState, abstract_state


class StepMetrics(NamedTuple):
    """Numbers of one step: scalars on the device, to be read one step later."""

    loss: jax.Array
    tasks: Mapping[str, TaskLoss]
    gradient_norm: jax.Array
    parameter_norm: jax.Array  # before the update
    texts: jax.Array
    real_tokens: jax.Array


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    encoder: AbstractEncoder,
    optimizer: optax.GradientTransformation,
    is_trainable: Callable[[str], bool],
    tasks: Sequence[Task],
    options: LossOptions,
    mesh: Mesh,
) -> tuple[TrainState, StepMetrics]:
    """Takes one step.

    Dropout is drawn from (seed, step, micro-batch, layer), so it depends neither on the mesh nor
    on a restart.

    Args:
        state: before the step.
        batch: with a leading axis of micro-batches, which are processed one after another and
            whose gradients are summed. The loss is a sum over texts and lists, so that this is
            the gradient of the whole batch.
        key: of the run's seed.
        encoder, optimizer, tasks, options, mesh: constants of the program.
        is_trainable: whether the parameter at a path is trained; no gradient of the others is
            computed.
    """
    key = jax.random.fold_in(key, state.step)
    trained = select(state.parameters, is_trainable)
    frozen = select(state.parameters, lambda path: not is_trainable(path))

    def loss_of(trained, part, key):
        output = encoder.merge(merge_parameters(trained, frozen))(
            part.tokens,
            part.segment_ids,
            part.positions,
            part.weight.shape[1],
            dropout_key=key,
            mesh=mesh,
        )
        loss, tasks_ = batch_loss(output, part, tasks, options)
        return loss, (loss, tasks_, part.weight.sum(), (part.segment_ids > 0).sum(dtype=jnp.int32))

    gradients, sums = _sum_over_micro_batches(jax.grad(loss_of, has_aux=True), trained, batch, key)
    loss, parts, texts, real_tokens = sums
    updates, moments = optimizer.update(gradients, state.optimizer, trained)
    metrics = StepMetrics(
        loss, parts, global_norm(gradients), global_norm(state.parameters), texts, real_tokens
    )
    parameters = merge_parameters(optax.apply_updates(trained, updates), frozen)
    return TrainState(parameters, moments, state.step + 1), metrics


def _sum_over_micro_batches(
    gradient_of: Callable[[Any, Batch, jax.Array], Any], trained: Any, batch: Batch, key: jax.Array
) -> Any:
    """`gradient_of(trained, micro-batch, key)`, summed over the leading axis of `batch`."""
    count = batch.tokens.shape[0]
    if count == 1:
        return gradient_of(trained, jax.tree.map(lambda field: field[0], batch), key)

    def add(total, numbered):
        index, part = numbered
        return jax.tree.map(
            jnp.add, total, gradient_of(trained, part, jax.random.fold_in(key, index))
        ), None

    first = jax.tree.map(lambda field: field[0], batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient_of, trained, first, key),
    )
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
    return total


class CompiledStep(NamedTuple):
    """A jitted step with the key of a run's seed.

    The key is an argument of the program: runs that differ only in their seed share it.
    """

    function: Callable[..., tuple[TrainState, StepMetrics]]
    key: np.ndarray  # its bits

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The state after the step, and the step's numbers."""
        return self.function(state, batch, self.key)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Traces the program without running it; shapes are enough."""
        return self.function.trace(state, batch, self.key)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lowers the program without running it; shapes are enough."""
        return self.function.lower(state, batch, self.key)


class Program(NamedTuple):
    """A training step and the shapes it takes, compiled when first called or lowered.

    The same for a run and for a plan of one.

    Attributes:
        abstract: shapes, dtypes and shardings of the state.
        batch: the same of the batch that `step` takes, with a leading axis of micro-batches.
        optimizer: updates the parameters.
        schedule: the learning rate by step.
        is_trainable: whether the parameter at a path is trained.
        step: from (state, batch) to (state, metrics); it donates the state that it is given.
    """

    abstract: TrainState
    batch: Batch
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    is_trainable: Callable[[str], bool]
    step: CompiledStep

    def shard(self, batch: Batch) -> Batch:
        """The global batch on the mesh, from this process's rows of it as `TrainStream` gives."""
        count = self.batch.tokens.shape[0]
        # Rows are counted, not inferred by -1: targets may be empty.
        fields = (field.reshape(count, len(field) // count, *field.shape[1:]) for field in batch)
        return Batch(
            *(
                jax.make_array_from_process_local_data(like.sharding, field)
                for field, like in zip(fields, self.batch, strict=True)
            )
        )


def make_program(recipe: Recipe, mesh: Mesh, total: int, warmup: int) -> Program:
    """The program that trains a recipe on a mesh.

    Args:
        recipe: with `examples_per_step` set (built for training).
        mesh: the devices.
        total: steps of the whole run, which the learning rate's schedule spans.
        warmup: the first steps, over which the learning rate rises.
    """
    schedule = make_schedule(recipe.optimizer, total, warmup)
    optimizer = make_optimizer(recipe.optimizer, schedule, recipe.encoder)
    is_trainable = trainable(recipe.optimizer, recipe.encoder)
    abstract = abstract_state(recipe.encoder, optimizer, mesh, is_trainable)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    constants = {
        "encoder": abstract_encoder(recipe.encoder),
        "optimizer": optimizer,
        "is_trainable": is_trainable,
        "tasks": recipe.tasks,
        "options": recipe.losses,
    }

    def step(state, batch, key):
        return train_step(state, batch, jax.random.wrap_key_data(key), **constants, mesh=mesh)

    rows, replicated = sharding.batch_sharding(mesh, micro=True), sharding.replicated(mesh)
    stream = recipe.stream
    batch = Batch(
        *(
            jax.ShapeDtypeStruct((stream.micro_batches, *field.shape), field.dtype, sharding=rows)
            for field in empty_batch(stream.shape.split(stream.micro_batches))
        )
    )
    compiled = jax.jit(
        step,
        in_shardings=(state_shardings, rows, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
    key = np.asarray(jax.random.key_data(jax.random.key(recipe.config.seed)))
    return Program(abstract, batch, optimizer, schedule, is_trainable, CompiledStep(compiled, key))
