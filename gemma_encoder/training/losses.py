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
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.kinds import cumulative_logits
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.encoder import EncoderOutput
from gemma_encoder.training.list_losses import (
    LIST_LOSSES,
    listwise_softmax,
    pairwise_logistic,
    point_ce,
    poly1,
)
from gemma_encoder.training.loss_options import LossOptionsConfig, SoftmaxCrossEntropyOptions
from gemma_encoder.training.objectives import (
    LossInputs,
    Objective,
    TaskLoss,
    per_list,
    per_text,
)
from gemma_encoder.training.retrieval_losses import RETRIEVAL_LOSSES

__all__ = [
    "LOSSES",
    "LossInputs",
    "LossOptions",
    "Objective",
    "TaskLoss",
    "batch_loss",
    "listwise_softmax",
    "pairwise_logistic",
    "point_ce",
    "poly1",
    "register_loss",
]


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


_PER_LIST = {name: per_list(*loss) for name, loss in LIST_LOSSES.items()}

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
    "ranking": _PER_LIST,  # over the documents of a query
    # Over the options of a question: softmax is the cross entropy of the correct option.
    "choice": _PER_LIST,
    "retrieval": RETRIEVAL_LOSSES,
    "sparse_retrieval": RETRIEVAL_LOSSES,
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
        options: options by name of the loss, or for all losses of retrieval.
        is_normalized: pooled states have length 1.
        retrieval_list_size: N of retrieval, the query included.
    """

    names: Mapping[str, str]
    task_weights: Mapping[str, float]
    examples_per_step: int
    tokens_per_step: int
    groups: int
    list_size: int
    options: LossOptionsConfig = LossOptionsConfig()
    is_normalized: bool = False
    retrieval_list_size: int = 2

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
            options = self._options(task.kind)
            if options is not None:
                options.check_task(task)

    def objective(self, kind: Kind) -> Callable[[LossInputs], TaskLoss]:
        """Returns the objective of a kind of task, with its options bound."""
        name = self.name(kind)
        return lambda inputs: LOSSES[kind.name][name](inputs, self._options(kind))

    def _options(self, kind: Kind) -> Any:
        """Returns the options of a kind's loss, None if it has none."""
        if kind.embeds:
            return self.options.retrieval
        return getattr(self.options, self.name(kind), None)


def batch_loss(
    output: EncoderOutput,
    batch: Batch,
    tasks: Sequence[Task],
    options: LossOptions,
    *,
    step: Int[Array, ""] | int = 0,
    mesh: Mesh | None = None,
    includes: Callable[[Task], bool] = lambda task: True,
) -> tuple[Float[Array, ""], dict[str, TaskLoss]]:
    """Returns the loss of a batch, and the unweighted loss of each task.

    Args:
        output: the encoder's output; a segment's loss uses the head of its own task.
        batch: the batch; `task_id` indexes `tasks`.
        tasks: the tasks of the mixture.
        options: constants of the loss.
        step, mesh: see `LossInputs`.
        includes: the tasks whose losses are computed.
    """
    parts = {}
    loss = jnp.zeros((), jnp.float32)
    for index, task in enumerate(tasks):
        if not includes(task):
            continue
        inputs = LossInputs(
            output,
            batch,
            task,
            jnp.where(batch.task_id == index, batch.weight, 0.0),
            options.groups,
            options.retrieval_list_size if task.kind.embeds else options.list_size,
            options.is_normalized,
            step,
            mesh,
        )
        part = options.objective(task.kind)(inputs)
        per_token = task.kind.counts_tokens
        divisor = options.tokens_per_step if per_token else options.examples_per_step
        loss += options.task_weights.get(task.name, 1.0) * part.total / divisor
        parts[task.name] = part
    return loss, parts
