"""Training objectives: losses by kind of task.

An objective sees the encoder's whole output and the batch. Most objectives give a value per text,
or per list for ranking and choice, so that a list counts once; an objective may also add a term
over the batch.

The loss of a batch is Σ weight · loss / examples_per_step. The divisor is a constant of the
config, so that the weight of a text does not depend on packing, accumulation or sharding. The loss
of a language model is a sum over tokens, and its divisor is tokens_per_step, also a constant.

Shapes: B rows, S segments, C outputs of a head, G lists, N documents per list.
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
    """Inputs of an objective, for one task in a (micro-)batch.

    Attributes:
        output: hidden states, pooled states and the scores of all heads.
        batch: the batch, with labels, groups and targets.
        task: the task.
        weight: 1 for segments of the task, 0 for other segments and for empty slots.
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


def softmax_cross_entropy(
    scores: Float[Array, "B S C"],
    labels: Float[Array, "B S"],
    options: SoftmaxCrossEntropyOptions | None = None,
) -> Float[Array, "B S"]:
    """Returns −log softmax(scores)[label], for classification. Labels are class indices."""
    options = options or SoftmaxCrossEntropyOptions()
    # Labels of empty slots may be out of range; their weight is 0.
    classes = jnp.clip(labels.astype(jnp.int32), 0, scores.shape[-1] - 1)
    values = optax.softmax_cross_entropy_with_integer_labels(scores, classes)
    weight = jnp.ones_like(values)
    if options.focal_gamma:
        error = -jnp.expm1(-values)  # 1 − p
        # Bounded, as the gradient of 0 ** γ is infinite for γ < 1.
        weight *= jnp.maximum(error, 1e-6) ** options.focal_gamma
    if options.label_smoothing:
        uniform = -jax.nn.log_softmax(scores).mean(axis=-1)
        values = (1 - options.label_smoothing) * values + options.label_smoothing * uniform
    if options.class_weights:
        weight *= jnp.asarray(options.class_weights, jnp.float32)[classes]
    return values * weight if options != SoftmaxCrossEntropyOptions() else values


def sigmoid_cross_entropy(
    scores: Float[Array, "B S C"], targets: Float[Array, "B S C"]
) -> Float[Array, "B S"]:
    """Returns the binary cross entropy averaged over classes, for multi-label classification."""
    return optax.sigmoid_binary_cross_entropy(scores, targets).mean(axis=-1)


def cumulative_link(
    scores: Float[Array, "B S C-1"], labels: Float[Array, "B S"]
) -> Float[Array, "B S"]:
    """Returns −log P(label) of the cumulative link model, for ordered classes (McCullagh, 1980).

    P(class > k) = σ(c_k) with decreasing logits c_k, so that P(k) = σ(c_{k−1}) − σ(c_k) =
    σ(c_{k−1}) σ(−c_k) (1 − exp(c_k − c_{k−1})), whose logarithm is numerically stable.
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
    """Returns (score − label)², for regression. Labels are scaled to [0, 1]."""
    return jnp.square(scores[..., 0] - labels)


def language_model_loss(inputs: LossInputs, options: Any) -> TaskLoss:
    """Returns −Σ log p(token | previous tokens) in nats, as computed by the language-model head."""
    del options
    weight = inputs.weight
    total = jnp.sum(weight * inputs.scores[..., 0])
    tokens = jnp.sum(weight * inputs.scores[..., 1])
    return TaskLoss(total, count=tokens, examples=weight.sum())


def _rax(loss: Callable[..., Array], scores, labels, real, **options) -> Float[Array, " G"]:
    """Applies a rax loss to each list; by itself, rax averages over all lists of a batch."""
    return jax.vmap(lambda s, y, w: loss(s, y, where=w, **options))(scores, labels, real)


def point_ce(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, " G"]:
    """PointCE: sigmoid cross entropy of each document, averaged over the list.

    RankT5 (arXiv 2210.10634, section 4.3). Works with any list length; recommended for short
    lists. Grades are clipped to [0, 1]. A list without a relevant document is learned from, too.
    """
    del options
    return _rax(rax.pointwise_sigmoid_loss, scores, labels, real)


def pairwise_logistic(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, " G"]:
    """RankNet: log(1 + exp(s_j − s_i)) averaged over pairs in which i is more relevant than j."""
    del options
    return _rax(rax.pairwise_logistic_loss, scores, labels, real)


def listwise_softmax(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, " G"]:
    """Listwise softmax: −Σ_i y_i log softmax(s)_i (RankT5, section 4.3).

    Needs lists of at least 20 to 30 documents. A list without a relevant document has loss 0.
    """
    del options
    return _rax(rax.softmax_loss, scores, labels, real)


def poly1(
    scores: Float[Array, "G N"],
    labels: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    options: Any = None,
) -> Float[Array, " G"]:
    """Poly-1: Σ_i w_i (−log p_i + ε (1 − p_i)), with p = softmax(s) and w_i = y_i / Σ_j y_j.

    PolyLoss (arXiv 2204.12511, section 4) of the document that is relevant. With several of them,
    both terms are averages over these by the same weights, in proportion to the grades, so that a
    list counts once and the unit of the grades does not matter. The sum of `listwise_softmax` has
    the grades themselves for weights: with ε = 0 the two are equal where grades sum to 1. A list
    without a relevant document has loss 0.
    """
    epsilon = 1.0 if options is None else options.epsilon
    log_p = jnp.where(real, jax.nn.log_softmax(scores, axis=-1, where=real), 0.0)
    grades = jnp.where(real, labels, 0.0)
    total = grades.sum(axis=-1, keepdims=True)
    weights = grades / jnp.where(total > 0, total, 1.0)
    # −expm1 is 1 − p without cancellation.
    return jnp.sum(weights * (-log_p - epsilon * jnp.expm1(log_p)), axis=-1)


_LIST_LOSSES = {
    "point_ce": per_list(point_ce),
    "pairwise_logistic": per_list(pairwise_logistic, has_pair),
    "softmax": per_list(listwise_softmax, has_positive),
    "poly1": per_list(poly1, has_positive),
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
    # Over the options of a question: softmax is the cross entropy of the correct option.
    "choice": _LIST_LOSSES,
    "language_model": {"negative_log_likelihood": language_model_loss},
}


def register_loss(kind: str, name: str, objective: Objective) -> None:
    """Registers a loss for a registered kind of task.

    Raises:
        InputError: the kind is unknown, or already has a loss of that name.
    """
    losses = LOSSES.setdefault(kinds.get(kind).name, {})
    if name in losses:
        raise InputError(f"loss {name!r} of kind {kind} is already registered")
    losses[name] = objective


class LossOptions(NamedTuple):
    """Constants of the loss of a batch.

    Attributes:
        names: name in `LOSSES` for each kind of task; by default the kind's default loss.
        task_weights: weights by task name; 1 by default.
        examples_per_step: the divisor.
        tokens_per_step: the divisor of a language model's loss: the token capacity of a batch. Up
            to padding, the loss is then the mean per predicted token, and in a mixture a text has
            the same weight as a text of another task.
        groups, list_size: G and N, the static shape of a micro-batch's lists.
        options: options by name of the loss.
    """

    names: Mapping[str, str]
    task_weights: Mapping[str, float]
    examples_per_step: int
    tokens_per_step: int
    groups: int
    list_size: int
    options: LossOptionsConfig = LossOptionsConfig()

    def name(self, kind: Kind) -> str:
        """Returns the name of the loss of a kind of task; raises InputError if it is unknown."""
        name = self.names.get(kind.name, kind.default_loss)
        losses = LOSSES.get(kind.name, {})
        if name not in losses:
            raise unknown(f"{kind} loss", name, losses)
        return name

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises InputError for an unknown loss, or options that do not fit a task."""
        for task in tasks:
            options = getattr(self.options, self.name(task.kind), None)
            if options is not None:
                options.check_task(task)

    def objective(self, kind: Kind) -> Callable[[LossInputs], TaskLoss]:
        """Returns the objective of a kind of task, with its options bound."""
        name = self.name(kind)
        return lambda inputs: LOSSES[kind.name][name](inputs, getattr(self.options, name, None))


def batch_loss(
    output: EncoderOutput, batch: Batch, tasks: Sequence[Task], options: LossOptions
) -> tuple[Float[Array, ""], dict[str, TaskLoss]]:
    """Returns the loss of a batch, and the unweighted loss of each task.

    Args:
        output: the encoder's output; a segment's loss uses the head of its own task.
        batch: the batch; `task_id` indexes `tasks`.
        tasks: the tasks of the mixture.
        options: constants of the loss.
    """
    parts = {}
    loss = jnp.zeros((), jnp.float32)
    for index, task in enumerate(tasks):
        weight = jnp.where(batch.task_id == index, batch.weight, 0.0)
        inputs = LossInputs(output, batch, task, weight, options.groups, options.list_size)
        part = options.objective(task.kind)(inputs)
        per_token = task.kind.counts_tokens
        divisor = options.tokens_per_step if per_token else options.examples_per_step
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
    """Scatters scores, grades and presence of documents to dense lists."""
    real = (batch.group_id >= 0) & (weight > 0)
    # Other segments get a slot past the end, which the scatter drops.
    slot = jnp.where(real, batch.group_id * list_size + batch.list_slot, groups * list_size)

    def scatter(values):
        flat = jnp.zeros((groups * list_size,), values.dtype).at[slot].set(values, mode="drop")
        return flat.reshape(groups, list_size)

    return scatter(scores), scatter(batch.label), scatter(real)
