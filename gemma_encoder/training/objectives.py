"""Objectives: the interface of losses, and what turns a loss per text or list into one.

Shapes: B rows, S segments, C outputs of a head, G lists, N documents per list.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.encoder import EncoderOutput


class LossInputs(NamedTuple):
    """Inputs of an objective, for one task in a (micro-)batch.

    Attributes:
        output: hidden states, pooled states and the scores of all heads.
        batch: the batch, with labels, groups and targets.
        task: the task.
        weight: 1 for segments of the task, 0 for other segments and for empty slots.
        groups, list_size: G and N, the static shape of the batch's lists.
        is_normalized: pooled states have length 1.
        step: training steps taken, for weights that change; 0 if unknown.
        mesh: the mesh that rows are sharded over; None on one device.
    """

    output: EncoderOutput
    batch: Batch
    task: Task
    weight: Float[Array, "B S"]
    groups: int
    list_size: int
    is_normalized: bool = False
    step: Int[Array, ""] | int = 0
    mesh: Mesh | None = None

    @property
    def scores(self) -> Float[Array, "B S C"]:
        """Scores of the task's head."""
        return self.output.scores[self.task.head]


class TaskLoss(NamedTuple):
    """Loss of a task in a batch.

    Attributes:
        total: sum of the losses.
        count: divisor of the mean loss in the log: texts, lists that can be learned from, or
            predicted tokens.
        examples: count of texts or lists.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    examples: Float[Array, ""]


Objective = Callable[[LossInputs, Any], TaskLoss]
TextLoss = Callable[[LossInputs, Any], Float[Array, "B S"]]
ListLoss = Callable[..., Float[Array, " G"]]
# Tells from grades and presence [G, N] which lists can be learned from, [G].
ListFilter = Callable[[Array, Array], Bool[Array, " G"]]


def per_text(loss: TextLoss) -> Objective:
    """Returns the objective that sums a loss per text."""

    def objective(inputs: LossInputs, options: Any) -> TaskLoss:
        values = loss(inputs, options)
        weight = inputs.weight
        count = weight.sum()
        return TaskLoss(jnp.sum(weight * values), count, count)

    return objective


def has_positive(grades: Float[Array, "G N"], real: Bool[Array, "G N"]) -> Bool[Array, " G"]:
    """Returns True for lists with a relevant document."""
    return ((grades > 0) & real).any(axis=-1)


def has_pair(grades: Float[Array, "G N"], real: Bool[Array, "G N"]) -> Bool[Array, " G"]:
    """Returns True for lists with documents of different grades."""
    lowest = jnp.where(real, grades, jnp.inf).min(axis=-1)
    highest = jnp.where(real, grades, -jnp.inf).max(axis=-1)
    return highest > lowest


def per_list(loss: ListLoss, learnable: ListFilter | None = None) -> Objective:
    """Returns the objective that sums a loss per list.

    Args:
        loss: values by list.
        learnable: lists that the mean loss in the log is over; by default all. Values of the
            others are replaced by 0. The divisor of the training loss is a constant, and counts
            them as well.
    """

    def objective(inputs: LossInputs, options: Any) -> TaskLoss:
        lists, grades, real = to_lists(
            inputs.scores[..., 0], inputs.batch, inputs.weight, inputs.groups, inputs.list_size
        )
        weight = real.any(axis=-1).astype(jnp.float32)
        # The softmax of an empty list is undefined: unmask all its slots, since its weight is 0.
        mask = real | ~real.any(axis=-1, keepdims=True)
        values = loss(lists, grades, mask, options)
        examples = weight.sum()
        if learnable is not None:
            weight *= learnable(grades, real)
        return TaskLoss(jnp.sum(weight * values), weight.sum(), examples)

    return objective


def to_lists(
    scores: Float[Array, "B S"],
    batch: Batch,
    weight: Float[Array, "B S"],
    groups: int,
    list_size: int,
) -> tuple[Float[Array, "G N"], Float[Array, "G N"], Bool[Array, "G N"]]:
    """Scatters scores, grades and presence of documents to dense lists."""
    columns = (scores, batch.label, jnp.ones_like(weight, bool))
    return tuple(scatter_to_lists(value, batch, weight, groups, list_size) for value in columns)


def scatter_to_lists(
    values: Array, batch: Batch, weight: Float[Array, "B S"], groups: int, list_size: int
) -> Array:
    """Scatters values [B, S, …] of segments to dense lists [G, N, …]; empty slots are 0.

    Segments of weight 0 are left out.
    """
    real = (batch.group_id >= 0) & (weight > 0)
    # Other segments get a slot past the end, which the scatter drops.
    slot = jnp.where(real, batch.group_id * list_size + batch.list_slot, groups * list_size)
    shape = values.shape[2:]
    flat = jnp.zeros((groups * list_size, *shape), values.dtype).at[slot].set(values, mode="drop")
    return flat.reshape(groups, list_size, *shape)
