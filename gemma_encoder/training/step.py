"""The compiled training step: forward, loss, backward and update in one program over the mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from gemma_encoder.inputs.batch import Batch, BatchShape, empty_batch
from gemma_encoder.inputs.task import Task
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import (
    AbstractEncoder,
    abstract_encoder,
    merge_parameters,
    select,
)
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.gradients import batch_gradient
from gemma_encoder.training.losses import LOSSES, LossOptions, Objective, TaskLoss, batch_loss
from gemma_encoder.training.optimizer import global_norm, make_optimizer, make_schedule, trainable
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.state import TrainState, abstract_state


class StepMetrics(NamedTuple):
    """Metrics of a step: scalars on the device, which are read one step later."""

    loss: jax.Array
    tasks: Mapping[str, TaskLoss]
    gradient_norm: jax.Array
    parameter_norm: jax.Array  # before the update
    learning_rate: jax.Array  # of the update
    texts: jax.Array
    real_tokens: jax.Array


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    encoder: AbstractEncoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    is_trainable: Callable[[str], bool],
    tasks: Sequence[Task],
    options: LossOptions,
    mesh: Mesh,
) -> tuple[TrainState, StepMetrics]:
    """Takes a training step.

    The dropout key is derived from (seed, step, layer), and from the micro-batch if there are
    several, so that dropout depends neither on the mesh nor on restarts.

    Args:
        state: the state before the step.
        batch: fields have a leading axis of micro-batches, which are processed in turn and whose
            gradients are summed. As the loss is a sum over texts and lists, this is the gradient
            of the whole batch.
        key: random key of the run's seed.
        encoder, optimizer, schedule, tasks, options, mesh: constants of the program.
        is_trainable: whether the parameter at a path is trained; gradients of the other
            parameters are not computed.
    """
    key = jax.random.fold_in(key, state.step)
    trained = select(state.parameters, is_trainable)
    frozen = select(state.parameters, lambda path: not is_trainable(path))

    def encode(trained, micro_batch, key):
        model = encoder.merge(merge_parameters(trained, frozen))
        return model(
            micro_batch.tokens,
            micro_batch.segment_ids,
            micro_batch.positions,
            micro_batch.weight.shape[1],
            dropout_key=key,
            mesh=mesh,
            full=True,
        )

    loss_of = functools.partial(
        batch_loss, tasks=tasks, options=options, step=state.step, mesh=mesh
    )
    gradient, sums = batch_gradient(encode, loss_of, trained, batch, key, tasks, options)
    updates, moments = optimizer.update(gradient, state.optimizer, trained)
    metrics = StepMetrics(
        loss=sums.loss,
        tasks=sums.tasks,
        gradient_norm=global_norm(gradient),
        parameter_norm=global_norm(state.parameters),
        learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
        texts=sums.texts,
        real_tokens=sums.real_tokens,
    )
    parameters = merge_parameters(optax.apply_updates(trained, updates), frozen)
    return TrainState(parameters, moments, state.step + 1), metrics


class CompiledStep(NamedTuple):
    """A jitted step, bound to the random key of a run's seed.

    The key is an argument of the program, so that runs which differ only in their seed share the
    compiled program.
    """

    function: Callable[..., tuple[TrainState, StepMetrics]]
    key: np.ndarray  # raw key data

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Returns the state after the step, and the step's metrics."""
        return self.function(state, batch, self.key)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Traces the program without running it; shapes are enough."""
        return self.function.trace(state, batch, self.key)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lowers the program without running it; shapes are enough."""
        return self.function.lower(state, batch, self.key)


class Program(NamedTuple):
    """The training step with the shapes of its inputs, compiled when first called or lowered.

    Runs and the planner of launches use the same program.

    Attributes:
        abstract: shapes, dtypes and shardings of the state.
        batch: shapes, dtypes and shardings of the batch that `step` takes, with a leading axis of
            micro-batches.
        optimizer: optimizer of the trainable parameters.
        schedule: the learning rate by step.
        is_trainable: whether the parameter at a path is trained.
        step: maps (state, batch) to (state, metrics); the state is donated.
    """

    abstract: TrainState
    batch: Batch
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    is_trainable: Callable[[str], bool]
    step: CompiledStep

    def shard(self, batch: Batch) -> Batch:
        """Returns the global batch on the mesh, given this process's rows from `TrainStream`."""
        count = self.batch.tokens.shape[0]
        # The rows are not inferred by -1, as `targets` may have no elements.
        fields = (field.reshape(count, len(field) // count, *field.shape[1:]) for field in batch)
        return Batch(
            *(
                jax.make_array_from_process_local_data(abstract.sharding, field)
                for field, abstract in zip(fields, self.batch, strict=True)
            )
        )


def make_program(recipe: Recipe, mesh: Mesh, total: int, warmup: int) -> Program:
    """Returns the program that trains a recipe on a mesh.

    Args:
        recipe: a recipe that is built for training, with `examples_per_step` set.
        mesh: the devices.
        total: steps of the whole run, which the learning-rate schedule spans.
        warmup: steps of the learning-rate warmup.
    """
    key = np.asarray(jax.random.key_data(jax.random.key(recipe.config.seed)))
    losses = recipe.losses
    program = _shared_program(
        recipe.encoder,
        recipe.optimizer,
        recipe.tasks,
        losses._replace(
            names=tuple(sorted(losses.names.items())),
            task_weights=tuple(sorted(losses.task_weights.items())),
        ),
        tuple(LOSSES[task.kind.name][losses.name(task.kind)] for task in recipe.tasks),
        recipe.stream.shape.split(recipe.stream.micro_batches),
        recipe.stream.micro_batches,
        mesh,
        total,
        warmup,
    )
    return program._replace(step=CompiledStep(program.step, key))


@functools.lru_cache(maxsize=8)
def _shared_program(
    encoder: EncoderConfig,
    options: OptimizerConfig,
    tasks: tuple[Task, ...],
    losses: LossOptions,
    objectives: tuple[Objective, ...],
    shape: BatchShape,
    micro_batches: int,
    mesh: Mesh,
    total: int,
    warmup: int,
) -> Program:
    """Returns a program whose `step` is not bound to a key, for all runs of the process.

    So a resumed run, or a run that differs in seed or data alone, neither traces nor compiles.

    Args:
        losses: with sorted items in place of mappings, which cannot be hashed.
        objectives: the registered losses of the tasks, as their names alone do not define them.
        encoder, options, tasks, shape, micro_batches, mesh, total, warmup: what else defines the
            program.
    """
    del objectives
    schedule = make_schedule(options, total, warmup)
    optimizer = make_optimizer(options, schedule, encoder)
    is_trainable = trainable(options, encoder)
    abstract = abstract_state(encoder, optimizer, mesh, is_trainable)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    constants = {
        "encoder": abstract_encoder(encoder),
        "optimizer": optimizer,
        "schedule": schedule,
        "is_trainable": is_trainable,
        "tasks": tasks,
        "options": losses._replace(
            names=dict(losses.names), task_weights=dict(losses.task_weights)
        ),
    }

    def step(state, batch, key):
        return train_step(state, batch, jax.random.wrap_key_data(key), **constants, mesh=mesh)

    by_rows = sharding.batch_sharding(mesh, micro=True)
    replicated = sharding.replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, by_rows, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
    return Program(
        abstract=abstract,
        batch=_abstract_batch(shape, micro_batches, by_rows),
        optimizer=optimizer,
        schedule=schedule,
        is_trainable=is_trainable,
        step=jitted,
    )


def _abstract_batch(shape: BatchShape, micro_batches: int, by_rows: NamedSharding) -> Batch:
    """Returns shapes, dtypes and sharding of a batch with a leading axis of micro-batches."""
    return Batch(
        *(
            jax.ShapeDtypeStruct((micro_batches, *field.shape), field.dtype, sharding=by_rows)
            for field in empty_batch(shape)
        )
    )
