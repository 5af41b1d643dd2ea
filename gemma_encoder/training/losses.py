"""Losses. Each gives one number per text, or per list for ranking and choice, so that a list counts once.

The loss of a batch is Σ weight · loss / examples_per_step, a constant of the config: a text weighs the same however rows were
packed, accumulated or sharded. A language model's loss is a sum over tokens, so its divisor is tokens_per_step, which is as constant.

B rows, S segments, G lists, N documents a list.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import rax
from jaxtyping import Array, Bool, Float

from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import unknown
from gemma_encoder.inputs.task import Task

ListLoss = Callable[
    [Float[Array, "G N"], Float[Array, "G N"], Bool[Array, "G N"]], Float[Array, "G"]
]


def softmax_cross_entropy(
    scores: Float[Array, "B S C"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """−log softmax(scores)[label]: for classification. Labels are class indices."""
    classes = jnp.clip(
        labels.astype(jnp.int32), 0, scores.shape[-1] - 1
    )  # empty slots may hold anything; their weight is 0
    return optax.softmax_cross_entropy_with_integer_labels(scores, classes)


def mean_squared_error(
    scores: Float[Array, "B S 1"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """(score − label)²: for regression. Labels are scaled to [0, 1]."""
    return jnp.square(scores[..., 0] - labels)


def negative_log_likelihood(
    scores: Float[Array, "B S 2"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """−Σ log p(token | those before it) over a text's tokens, in nats: for language models, whose head has it ready."""
    del labels
    return scores[..., 0]


def _per_list(loss: Callable[..., Array], **options) -> ListLoss:
    """One value per list from a rax loss, which by itself averages over all lists of a batch."""

    def per_list(scores, labels, where):
        return jax.vmap(lambda s, y, w: loss(s, y, where=w, **options))(scores, labels, where)

    return per_list


def point_ce(
    scores: Float[Array, "G N"], labels: Float[Array, "G N"], where: Bool[Array, "G N"]
) -> Float[Array, "G"]:
    """PointCE: sigmoid cross entropy of each document by itself, averaged over the list (RankT5, arXiv 2210.10634, section 4.3).

    Works with any list length; the choice when lists are short. Grades are clipped to [0, 1].
    """
    return _per_list(rax.pointwise_sigmoid_loss)(scores, labels, where)


def pairwise_logistic(
    scores: Float[Array, "G N"], labels: Float[Array, "G N"], where: Bool[Array, "G N"]
) -> Float[Array, "G"]:
    """RankNet: log(1 + exp(s_j − s_i)) averaged over the pairs in which i is more relevant than j."""
    return _per_list(rax.pairwise_logistic_loss)(scores, labels, where)


def softmax(
    scores: Float[Array, "G N"], labels: Float[Array, "G N"], where: Bool[Array, "G N"]
) -> Float[Array, "G"]:
    """Listwise softmax: −Σ_i y_i log softmax(s)_i (RankT5, section 4.3). Wants lists of some 20 to 30 documents or more."""
    return _per_list(rax.softmax_loss)(scores, labels, where)


def poly1(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    where: Bool[Array, "G N"],
    epsilon: float = 1.0,
) -> Float[Array, "G"]:
    """Poly-1: listwise softmax + ε (1 − p_target), after PolyLoss (arXiv 2204.12511); RankT5 compares it with the others."""
    return _per_list(rax.poly1_softmax_loss, epsilon=epsilon)(scores, labels, where)


_LIST_LOSSES = {
    "point_ce": point_ce,
    "pairwise_logistic": pairwise_logistic,
    "softmax": softmax,
    "poly1": poly1,
}

LOSSES: Mapping[str, Mapping[str, Callable]] = {
    "classification": {"softmax_cross_entropy": softmax_cross_entropy},
    "regression": {"mean_squared_error": mean_squared_error},
    "ranking": _LIST_LOSSES,  # over the documents of a query
    "language_model": {"negative_log_likelihood": negative_log_likelihood},
    "choice": _LIST_LOSSES,  # over the options of a question; softmax is then the cross entropy of the option that is right
}


class LossOptions(NamedTuple):
    """What the loss of a batch depends on, all of it constant.

    Attributes:
        names: for each kind of task, a name in `LOSSES`.
        task_weights: by task name; 1 where a task is not named.
        examples_per_step: the divisor.
        tokens_per_step: the divisor of a language model's loss: the tokens that a batch has room for. The loss is then, but for padding, the
            mean per predicted token, and beside other tasks a text weighs as it does there.
        groups, list_size: G and N, the static shape of a micro-batch's lists.
        poly1_epsilon: ε of Poly-1.
    """

    names: Mapping[str, str]
    task_weights: Mapping[str, float]
    examples_per_step: int
    tokens_per_step: int
    groups: int
    list_size: int
    poly1_epsilon: float = 1.0

    def function(self, kind: str) -> Callable:
        """The loss of a kind of task."""
        name = self.names[kind]
        if name not in LOSSES[kind]:
            raise unknown(f"{kind} loss", name, LOSSES[kind])
        return (
            functools.partial(poly1, epsilon=self.poly1_epsilon)
            if name == "poly1"
            else LOSSES[kind][name]
        )


class TaskLoss(NamedTuple):
    """Of one task in one batch.

    Attributes:
        total: the sum of its losses.
        count: what they are averaged over to be shown: texts, lists, or a language model's predicted tokens.
        examples: how many texts or lists there were.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    examples: Float[Array, ""]


def batch_loss(
    scores: Mapping[str, Array], batch: Batch, tasks: Sequence[Task], options: LossOptions
) -> tuple[Float[Array, ""], dict[str, TaskLoss]]:
    """The loss of a batch, and each task's part of it unweighted.

    Args:
        scores: [B, S, C] of each head; a segment's loss uses its own task's head.
        batch: whose `task_id` indexes `tasks`.
        tasks: the mixture.
        options: constants.
    """
    parts = {}
    loss = jnp.zeros((), jnp.float32)
    for number, task in enumerate(tasks):
        weight = jnp.where(batch.task_id == number, batch.weight, 0.0)
        if task.is_list:
            lists, grades, where = to_lists(
                scores[task.head][..., 0], batch, weight, options.groups, options.list_size
            )
            weight = where.any(axis=-1).astype(jnp.float32)
            # A list of no documents has no softmax: give it all its slots, its weight is 0.
            values = options.function(task.kind)(
                lists, grades, where | ~where.any(axis=-1, keepdims=True)
            )
        else:
            values = options.function(task.kind)(scores[task.head], batch.label)
        by_token = task.kind == "language_model"
        count = jnp.sum(weight * scores[task.head][..., 1]) if by_token else weight.sum()
        part = TaskLoss(jnp.sum(weight * values), count, weight.sum())
        loss += (
            options.task_weights.get(task.name, 1.0)
            * part.total
            / (options.tokens_per_step if by_token else options.examples_per_step)
        )
        parts[task.name] = part
    return loss, parts


def to_lists(
    scores: Float[Array, "B S"],
    batch: Batch,
    weight: Float[Array, "B S"],
    groups: int,
    list_size: int,
) -> tuple[Float[Array, "G N"], Float[Array, "G N"], Bool[Array, "G N"]]:
    """Scores, grades and presence of each list's documents, dense."""
    real = (batch.group_id >= 0) & (weight > 0)
    place = jnp.where(
        real, batch.group_id * list_size + batch.list_slot, groups * list_size
    )  # past the end: dropped

    def scatter(values):
        return (
            jnp.zeros((groups * list_size,), values.dtype)
            .at[place]
            .set(values, mode="drop")
            .reshape(groups, list_size)
        )

    return scatter(scores), scatter(batch.label), scatter(real)
