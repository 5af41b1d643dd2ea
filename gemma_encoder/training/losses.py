"""Objectives: a table of losses for each kind of task.

An objective sees the encoder's whole output and the batch. Most give one number per text, or per
list for ranking and choice, so that a list counts once; one may add a term over the batch.

The loss of a batch is Σ weight · loss / examples_per_step, a constant of the config: a text weighs
the same however rows were packed, accumulated or sharded. A language model's loss is a sum over
tokens, so its divisor is tokens_per_step, which is as constant.

B rows, S segments, C outputs of a head, K width of a vector label, G lists, N documents a list.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import rax
from jaxtyping import Array, Bool, Float

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.kinds import cumulative_logits
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.encoder import EncoderOutput
from gemma_encoder.training.loss_options import LossOptionsConfig, SoftmaxCrossEntropyOptions


class LossInputs(NamedTuple):
    """Everything that an objective may depend on, for one task in one (micro-)batch.

    Attributes:
        output: hidden states, pooled states and the scores of all heads.
        batch: its labels, roles, groups and targets.
        task: whose loss it is.
        weight: 1 for segments of the task, 0 for others and for empty slots.
        groups, list_size: G and N, the static shape of the batch's lists.
    """

    output: EncoderOutput
    batch: Batch
    task: Task
    weight: Float[Array, "B S"]
    groups: int
    list_size: int

    @property
    def scores(self) -> Float[Array, "B S C"]:
        """Scores of the task's own head."""
        return self.output.scores[self.task.head]


class TaskLoss(NamedTuple):
    """The loss of one task in one batch.

    Attributes:
        total: the sum of its losses.
        count: what they are averaged over to be shown: texts, lists, or predicted tokens.
        examples: how many texts or lists there were.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    examples: Float[Array, ""]


Objective = Callable[[LossInputs, Any], TaskLoss]
TextLoss = Callable[[LossInputs, Any], Float[Array, "B S"]]
ListLoss = Callable[..., Float[Array, "G"]]


def per_text(loss: TextLoss) -> Objective:
    """The objective that sums one number per text."""

    def objective(inputs: LossInputs, options: Any) -> TaskLoss:
        values, weight = loss(inputs, options), inputs.weight
        count = weight.sum()
        return TaskLoss(jnp.sum(weight * values), count, count)

    return objective


def per_list(loss: ListLoss) -> Objective:
    """The objective that sums one number per list."""

    def objective(inputs: LossInputs, options: Any) -> TaskLoss:
        lists, grades, real = to_lists(
            inputs.scores[..., 0], inputs.batch, inputs.weight, inputs.groups, inputs.list_size
        )
        weight = real.any(axis=-1).astype(jnp.float32)
        # A list of no documents has no softmax: give it all its slots, its weight is 0.
        values = loss(lists, grades, real | ~real.any(axis=-1, keepdims=True), options)
        count = weight.sum()
        return TaskLoss(jnp.sum(weight * values), count, count)

    return objective


def softmax_cross_entropy(
    scores: Float[Array, "B S C"],
    labels: Float[Array, "B S"],
    options: SoftmaxCrossEntropyOptions | None = None,
) -> Float[Array, "B S"]:
    """−log softmax(scores)[label]: for classification. Labels are class indices."""
    options = options or SoftmaxCrossEntropyOptions()
    # Empty slots may hold anything; their weight is 0.
    classes = jnp.clip(labels.astype(jnp.int32), 0, scores.shape[-1] - 1)
    values = optax.softmax_cross_entropy_with_integer_labels(scores, classes)
    weight = jnp.ones_like(values)
    if options.focal_gamma:
        weight *= jnp.maximum(-jnp.expm1(-values), 1e-6) ** options.focal_gamma  # no 0 ** γ
    if options.label_smoothing:
        even = -jax.nn.log_softmax(scores).mean(axis=-1)
        values = (1 - options.label_smoothing) * values + options.label_smoothing * even
    if options.class_weights:
        weight *= jnp.asarray(options.class_weights, jnp.float32)[classes]
    return values * weight if options != SoftmaxCrossEntropyOptions() else values


def sigmoid_cross_entropy(
    scores: Float[Array, "B S C"], targets: Float[Array, "B S C"]
) -> Float[Array, "B S"]:
    """Binary cross entropy of each class, averaged over classes: for several classes at once."""
    return optax.sigmoid_binary_cross_entropy(scores, targets).mean(axis=-1)


def cumulative_link(
    scores: Float[Array, "B S C-1"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """−log P(label) of the cumulative link model: for ordered classes (McCullagh, 1980).

    P(class > k) = σ(c_k) with falling logits c_k, so that P(k) = σ(c_{k−1}) − σ(c_k) =
    σ(c_{k−1}) σ(−c_k) (1 − exp(c_k − c_{k−1})), whose logarithm is stable.
    """
    logits = cumulative_logits(scores, xp=jnp)
    classes = jnp.clip(labels.astype(jnp.int32), 0, scores.shape[-1])
    far = jnp.full_like(logits[..., :1], 1e4)  # P(class > −1) is 1, P(class > C − 1) is 0
    bounds = jnp.concatenate([far, logits, -far], axis=-1)
    above = jnp.take_along_axis(bounds, classes[..., None], axis=-1)[..., 0]
    below = jnp.take_along_axis(bounds, classes[..., None] + 1, axis=-1)[..., 0]
    gap = jnp.maximum(above - below, 1e-6)  # softplus is 0 in float32 far below zero
    inside = jnp.log(-jnp.expm1(-gap))
    return -(jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + inside)


def mean_squared_error(
    scores: Float[Array, "B S 1"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """(score − label)²: for regression. Labels are scaled to [0, 1]."""
    return jnp.square(scores[..., 0] - labels)


def language_model_loss(inputs: LossInputs, options: Any) -> TaskLoss:
    """−Σ log p(token | those before it) in nats, which the head of a language model gives."""
    del options
    scores, weight = inputs.scores, inputs.weight
    total = jnp.sum(weight * scores[..., 0])
    return TaskLoss(total, jnp.sum(weight * scores[..., 1]), weight.sum())


def _rax(loss: Callable[..., Array], scores, labels, real, **options) -> Float[Array, "G"]:
    """One value per list from a rax loss, which by itself averages over all lists of a batch."""
    return jax.vmap(lambda s, y, w: loss(s, y, where=w, **options))(scores, labels, real)


def point_ce(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, "G"]:
    """PointCE: sigmoid cross entropy of each document, averaged over the list.

    RankT5 (arXiv 2210.10634, section 4.3). Works with any list length; the choice when lists are
    short. Grades are clipped to [0, 1].
    """
    del options
    return _rax(rax.pointwise_sigmoid_loss, scores, labels, real)


def pairwise_logistic(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, "G"]:
    """RankNet: log(1 + exp(s_j − s_i)) averaged over pairs in which i is more relevant than j."""
    del options
    return _rax(rax.pairwise_logistic_loss, scores, labels, real)


def listwise_softmax(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, "G"]:
    """Listwise softmax: −Σ_i y_i log softmax(s)_i (RankT5, section 4.3).

    Wants lists of some 20 to 30 documents or more.
    """
    del options
    return _rax(rax.softmax_loss, scores, labels, real)


def poly1(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, "G"]:
    """Poly-1: listwise softmax + ε (1 − p_target), after PolyLoss (arXiv 2204.12511)."""
    epsilon = 1.0 if options is None else options.epsilon
    return _rax(rax.poly1_softmax_loss, scores, labels, real, epsilon=epsilon)


_LIST_LOSSES = {
    "point_ce": per_list(point_ce),
    "pairwise_logistic": per_list(pairwise_logistic),
    "softmax": per_list(listwise_softmax),
    "poly1": per_list(poly1),
}

LOSSES: dict[str, dict[str, Objective]] = {
    "classification": {
        "softmax_cross_entropy": per_text(
            lambda inputs, options: softmax_cross_entropy(
                inputs.scores, inputs.batch.label, options
            )
        )
    },
    "regression": {
        "mean_squared_error": per_text(
            lambda inputs, _: mean_squared_error(inputs.scores, inputs.batch.label)
        )
    },
    "multi_label": {
        "sigmoid_cross_entropy": per_text(
            lambda inputs, _: sigmoid_cross_entropy(
                inputs.scores, inputs.batch.targets[..., : inputs.scores.shape[-1]]
            )
        )
    },
    "ordinal": {
        "cumulative_link": per_text(
            lambda inputs, _: cumulative_link(inputs.scores, inputs.batch.label)
        )
    },
    "ranking": _LIST_LOSSES,  # over the documents of a query
    # Over the options of a question: softmax is the cross entropy of the option that is right.
    "choice": _LIST_LOSSES,
    "language_model": {"negative_log_likelihood": language_model_loss},
}


def register_loss(kind: str, name: str, objective: Objective) -> None:
    """Adds a loss for a registered kind of task; a name is registered once.

    Raises:
        InputError: no kind has that name, or the kind has such a loss.
    """
    losses = LOSSES.setdefault(kinds.get(kind).name, {})
    if name in losses:
        raise InputError(f"loss {name!r} of kind {kind} is already registered")
    losses[name] = objective


class LossOptions(NamedTuple):
    """Constants that the loss of a batch depends on.

    Attributes:
        names: for each kind of task, a name in `LOSSES`; by default the kind's default loss.
        task_weights: by task name; 1 where a task is not named.
        examples_per_step: the divisor.
        tokens_per_step: the divisor of a language model's loss: the tokens that a batch has room
            for. The loss is then, but for padding, the mean per predicted token, and beside other
            tasks a text weighs as it does there.
        groups, list_size: G and N, the static shape of a micro-batch's lists.
        options: of the losses that have some.
    """

    names: Mapping[str, str]
    task_weights: Mapping[str, float]
    examples_per_step: int
    tokens_per_step: int
    groups: int
    list_size: int
    options: LossOptionsConfig = LossOptionsConfig()

    def name(self, kind: Kind) -> str:
        """The loss of a kind of task; raises InputError naming the nearest one."""
        name, losses = self.names.get(kind.name, kind.default_loss), LOSSES.get(kind.name, {})
        if name not in losses:
            raise unknown(f"{kind} loss", name, losses)
        return name

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises InputError for an unknown loss, or an option that does not fit a task."""
        for task in tasks:
            options = getattr(self.options, self.name(task.kind), None)
            if options is not None:
                options.check_task(task)

    def objective(self, kind: Kind) -> Callable[[LossInputs], TaskLoss]:
        """The objective of a kind of task with its options."""
        name = self.name(kind)
        return lambda inputs: LOSSES[kind.name][name](inputs, getattr(self.options, name, None))


def batch_loss(
    output: EncoderOutput, batch: Batch, tasks: Sequence[Task], options: LossOptions
) -> tuple[Float[Array, ""], dict[str, TaskLoss]]:
    """The loss of a batch, and each task's part of it unweighted.

    Args:
        output: of the encoder; a segment's loss uses its own task's head.
        batch: whose `task_id` indexes `tasks`.
        tasks: the mixture.
        options: constants.
    """
    parts = {}
    loss = jnp.zeros((), jnp.float32)
    for index, task in enumerate(tasks):
        weight = jnp.where(batch.task_id == index, batch.weight, 0.0)
        inputs = LossInputs(output, batch, task, weight, options.groups, options.list_size)
        part = options.objective(task.kind)(inputs)
        tokens = task.kind.counts_tokens
        divisor = options.tokens_per_step if tokens else options.examples_per_step
        loss += options.task_weights.get(task.name, 1.0) * part.total / divisor
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
    # Past the end: dropped.
    slot = jnp.where(real, batch.group_id * list_size + batch.list_slot, groups * list_size)

    def scatter(values):
        flat = jnp.zeros((groups * list_size,), values.dtype).at[slot].set(values, mode="drop")
        return flat.reshape(groups, list_size)

    return scatter(scores), scatter(batch.label), scatter(real)
