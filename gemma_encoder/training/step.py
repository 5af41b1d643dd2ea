"""The compiled step: forward, loss, backward, update, in one program over the mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_encoder.inputs.batch import Batch, empty_batch
from gemma_encoder.inputs.task import Task
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import Skeleton, merge_parameters, select, skeleton
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.losses import LossOptions, TaskLoss, batch_loss
from gemma_encoder.training.optimizer import global_norm, make_optimizer, make_schedule, trainable
from gemma_encoder.training.state import TrainState, abstract_state


class StepMetrics(NamedTuple):
    """What a step says of itself; scalars on the device, read one step later."""

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
    encoder: Skeleton,
    optimizer: optax.GradientTransformation,
    changes: Callable[[str], bool],
    tasks: Sequence[Task],
    options: LossOptions,
    mesh: Mesh,
) -> tuple[TrainState, StepMetrics]:
    """One update. Dropout is drawn from (seed, step, micro-batch, layer), so it does not depend on the mesh or on a restart.

    Args:
        state: before.
        batch: with a leading axis of micro-batches, which are worked on one after another and whose gradients are summed. The loss
            is a sum over texts and lists, so that this is the gradient of the whole batch.
        key: of the run's seed.
        encoder, optimizer, tasks, options, mesh: constants of the program.
        changes: whether the parameter at a path is trained; the gradient of the others is never made.
    """
    key = jax.random.fold_in(key, state.step)
    trained, frozen = (
        select(state.parameters, changes),
        select(state.parameters, lambda path: not changes(path)),
    )

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

    gradient_of = jax.grad(loss_of, has_aux=True)
    count = batch.tokens.shape[0]
    if count == 1:
        gradients, sums = gradient_of(trained, jax.tree.map(lambda field: field[0], batch), key)
    else:

        def add(total, numbered):
            number, part = numbered
            return jax.tree.map(
                jnp.add, total, gradient_of(trained, part, jax.random.fold_in(key, number))
            ), None

        first = jax.tree.map(lambda field: field[0], batch)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient_of, trained, first, key),
        )
        (gradients, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
    loss, parts, texts, real_tokens = sums
    updates, moments = optimizer.update(gradients, state.optimizer, trained)
    metrics = StepMetrics(
        loss, parts, global_norm(gradients), global_norm(state.parameters), texts, real_tokens
    )
    return TrainState(
        merge_parameters(optax.apply_updates(trained, updates), frozen), moments, state.step + 1
    ), metrics


class CompiledStep(NamedTuple):
    """A jitted step with the key of a run's seed. The key is an argument of the program: runs that differ in their seed share it."""

    function: Callable[..., tuple[TrainState, StepMetrics]]
    key: np.ndarray  # its bits

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The state after the step, and what the step says of itself."""
        return self.function(state, batch, self.key)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """For programs that are looked at, not run; shapes are enough."""
        return self.function.trace(state, batch, self.key)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The same, one stage further."""
        return self.function.lower(state, batch, self.key)


class Program(NamedTuple):
    """A training step and what it works on, compiled when it is first called or lowered; the same for a run and for a plan of one.

    Attributes:
        abstract: shapes, dtypes and shardings of the state.
        batch: the same of the batch that `step` takes, with a leading axis of micro-batches.
        optimizer, schedule: what changes the state, and its learning rate by step.
        step: from (state, batch) to (state, metrics); it donates the state that it is given.
    """

    abstract: TrainState
    batch: Batch
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    changes: Callable[[str], bool]
    step: CompiledStep

    def place(self, batch: Batch) -> Batch:
        """The global batch on the mesh, from this process's rows of it as `TrainStream` gives them."""
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
    """What trains `recipe` on `mesh` for `total` steps, of which the learning rate rises over `warmup`."""
    schedule = make_schedule(recipe.optimizer, total, warmup)
    optimizer, changes = (
        make_optimizer(recipe.optimizer, schedule, recipe.encoder),
        trainable(recipe.optimizer, recipe.encoder),
    )
    abstract = abstract_state(recipe.encoder, optimizer, mesh, changes)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    constants = {
        "encoder": skeleton(recipe.encoder),
        "optimizer": optimizer,
        "changes": changes,
        "tasks": recipe.tasks,
        "options": recipe.losses,
    }

    def step(state, batch, key):
        return train_step(state, batch, jax.random.wrap_key_data(key), **constants, mesh=mesh)

    where, everywhere, stream = (
        sharding.batch_sharding(mesh, micro=True),
        sharding.replicated(mesh),
        recipe.stream,
    )
    rows = empty_batch(stream.shape.split(stream.micro_batches))
    batch = Batch(
        *(
            jax.ShapeDtypeStruct((stream.micro_batches, *field.shape), field.dtype, sharding=where)
            for field in rows
        )
    )
    compiled = jax.jit(
        step,
        in_shardings=(places, where, everywhere),
        out_shardings=(places, everywhere),
        donate_argnums=0,
    )
    key = np.asarray(jax.random.key_data(jax.random.key(recipe.config.seed)))
    return Program(abstract, batch, optimizer, schedule, changes, CompiledStep(compiled, key))
