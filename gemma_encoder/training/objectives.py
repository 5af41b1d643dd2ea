"""Objectives: the interface of losses, and what turns a loss per text or list into one.

Shapes: B rows, S segments, C outputs of a head, G lists, N documents per list.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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


class ListSlots(NamedTuple):
    """Positions of a batch's segments in dense lists; n = B · S segments, m = G · N slots.

    Attributes:
        source: the segment of each slot.
        is_filled: False for slots without one.
        slot: the slot of each segment.
        is_member: False for segments of no list.
    """

    source: Int[Array, " m"]
    is_filled: Bool[Array, " m"]
    slot: Int[Array, " n"]
    is_member: Bool[Array, " n"]


def list_slots(batch: Batch, weight: Float[Array, "B S"], groups: int, list_size: int) -> ListSlots:
    """Returns the slots of a batch's segments; those of weight 0 are left out.

    Slots are found by sorting: XLA turns a scatter over sharded rows into a loop over segments,
    with a message between devices in each.
    """
    is_member = ((batch.group_id >= 0) & (weight > 0)).ravel()
    slots = groups * list_size
    slot = (batch.group_id * list_size + batch.list_slot).ravel()
    slot = jnp.where(is_member, slot, slots)  # past the end
    order = jnp.argsort(slot)
    ordered = slot[order]
    index = jnp.minimum(jnp.searchsorted(ordered, jnp.arange(slots)), len(slot) - 1)
    return ListSlots(order[index], ordered[index] == jnp.arange(slots), slot, is_member)


@jax.custom_vjp
def gather_lists(values: Array, slots: ListSlots) -> Array:
    """Returns the values [n, …] of segments by slot, [m, …]; empty slots are 0.

    Its gradient is a gather, too, since no two slots hold the same segment.
    """
    return _masked(values[slots.source], slots.is_filled)


def _masked(values: Array, mask: Bool[Array, " n"]) -> Array:
    return jnp.where(jnp.expand_dims(mask, range(1, values.ndim)), values, 0)


def _gather_forward(values: Array, slots: ListSlots) -> tuple[Array, ListSlots]:
    return gather_lists(values, slots), slots


def _gather_backward(slots: ListSlots, gradient: Array) -> tuple[Array, None]:
    index = jnp.minimum(slots.slot, len(slots.source) - 1)
    return _masked(gradient[index], slots.is_member), None


gather_lists.defvjp(_gather_forward, _gather_backward)


def to_lists(
    scores: Float[Array, "B S"],
    batch: Batch,
    weight: Float[Array, "B S"],
    groups: int,
    list_size: int,
) -> tuple[Float[Array, "G N"], Float[Array, "G N"], Bool[Array, "G N"]]:
    """Returns scores, grades and presence of documents as dense lists."""
    slots = list_slots(batch, weight, groups, list_size)
    columns = (gather_lists(values.ravel(), slots) for values in (scores, batch.label))
    return tuple(column.reshape(groups, list_size) for column in (*columns, slots.is_filled))
