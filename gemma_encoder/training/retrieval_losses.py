"""Losses of retrieval: compare the vectors of queries and documents over the global batch.

The vectors of a batch are put into dense lists: a query and its documents. A loss sees all lists of
a step, whatever the number of micro-batches, devices and hosts, see `training.step`.

Shapes: B rows, S segments, E width of a vector, G lists, N documents per list, D = G · N, T anchors
in a chunk, M candidates, I chunks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.model.pooling import with_length_one
from gemma_encoder.training.list_losses import LIST_LOSSES
from gemma_encoder.training.loss_options import RetrievalLossOptions
from gemma_encoder.training.objectives import (
    ListFilter,
    ListLoss,
    LossInputs,
    Objective,
    TaskLoss,
    gather_lists,
    has_positive,
    list_slots,
)

MASKED = -1e30  # finite: a log-sum-exp over no negative stays finite
SIMILARITIES = 1 << 25  # per device and chunk: 128 MiB of float32


class VectorLists(NamedTuple):
    """Lists of a batch: a query each, and its documents. Empty slots are 0.

    Attributes:
        queries, documents: the vectors.
        query_ids, document_ids: equal for equal texts.
        grades: relevance grades; a document is positive from above 0.
        teacher: scores of a teacher.
        real: False for empty slots.
    """

    queries: Float[Array, "G E"]
    documents: Float[Array, "G N E"]
    query_ids: Int[Array, " G"]
    document_ids: Int[Array, "G N"]
    grades: Float[Array, "G N"]
    teacher: Float[Array, "G N"]
    real: Bool[Array, "G N"]

    @property
    def positive(self) -> Bool[Array, "G N"]:
        """True for relevant documents."""
        return self.real & (self.grades > 0)

    def first(self, width: int, normalize: bool) -> "VectorLists":
        """Returns the lists with the first dimensions of the vectors.

        Args:
            width: number of dimensions.
            normalize: scale the shortened vectors to length 1.
        """

        def shorten(vectors: Float[Array, "*n E"]) -> Float[Array, "*n width"]:
            vectors = vectors[..., :width]
            return with_length_one(vectors) if normalize else vectors

        return self._replace(queries=shorten(self.queries), documents=shorten(self.documents))


def vector_lists(inputs: LossInputs) -> VectorLists:
    """Returns the lists of a task in a batch; slot 0 of a list is its query."""
    batch = inputs.batch
    slots = list_slots(batch, inputs.weight, inputs.groups, inputs.list_size)

    def lists(values: Array) -> Array:
        columns = gather_lists(values.reshape(-1, *values.shape[2:]), slots)
        return columns.reshape(inputs.groups, inputs.list_size, *values.shape[2:])

    vectors = lists(inputs.scores)
    ids = lists(batch.example_id)
    return VectorLists(
        vectors[:, 0],
        vectors[:, 1:],
        ids[:, 0],
        ids[:, 1:],
        lists(batch.label)[:, 1:],
        lists(batch.targets[..., 0])[:, 1:],
        slots.is_filled.reshape(inputs.groups, inputs.list_size)[:, 1:],
    )


class _Side(NamedTuple):
    """Texts of one side of a contrastive comparison: queries, or documents.

    Attributes:
        vectors: the vectors.
        lists: the list of each text.
        ids: ids of the texts.
        is_positive: True for a query, and for a relevant document.
        real: False for empty slots.
    """

    vectors: Float[Array, "M E"]
    lists: Int[Array, " M"]
    ids: Int[Array, " M"]
    is_positive: Bool[Array, " M"]
    real: Bool[Array, " M"]


def _sides(lists: VectorLists) -> tuple[_Side, _Side]:
    """Returns the queries and the documents of all lists."""
    groups, size = lists.real.shape
    index = jnp.arange(groups)
    has_query = lists.real.any(axis=-1)
    queries = _Side(lists.queries, index, lists.query_ids, has_query, has_query)
    documents = _Side(
        lists.documents.reshape(groups * size, -1),
        jnp.repeat(index, size),
        lists.document_ids.ravel(),
        lists.positive.ravel(),
        lists.real.ravel(),
    )
    return queries, documents


def info_nce(
    lists: VectorLists, options: RetrievalLossOptions, mesh: Mesh | None = None
) -> Float[Array, " G"]:
    """InfoNCE: tells the positives of a query from all other documents of the batch.

    For query q with positives P, −1/|P| Σ_p log(exp(s_p) / (exp(s_p) + Σ_n exp(s_n))), where s is
    the similarity divided by the temperature (arXiv 1807.03748, equation 4; in-batch negatives as
    in arXiv 2004.04906, section 3.2). Negatives n are the query's own ones, and the documents of
    all other lists except

    - documents with the id of a positive of q, and positives of lists with the id of q;
    - with `false_negative_margin`, documents more similar to q than its best positive by that
      margin (arXiv 2506.05176, section 3).

    With `both_directions`, the mean of this and of the same loss of a positive among all queries.
    A list without a positive has loss 0.
    """
    queries, documents = _sides(lists)
    positive_ids = jnp.where(lists.positive, lists.document_ids, -1)  # [G, N]
    size = lists.real.shape[1]

    def query_loss(anchors: _Side, ids: Int[Array, "T N"]) -> Float[Array, " T"]:
        is_own = anchors.lists[:, None] == documents.lists
        is_own_positive = is_own & documents.is_positive
        is_same = (anchors.ids[:, None] == queries.ids[documents.lists]) & documents.is_positive
        for slot in range(size):
            is_same |= ids[:, slot, None] == documents.ids
        excluded = is_own_positive | is_same | ~documents.real
        return _contrast(anchors, documents, is_own_positive, excluded, options)

    loss = _in_chunks(query_loss, (queries, positive_ids), len(documents.ids), mesh)
    if not options.both_directions:
        return loss

    def document_loss(anchors: _Side) -> Float[Array, " T"]:
        is_own = anchors.lists[:, None] == queries.lists
        is_same = queries.ids[anchors.lists][:, None] == queries.ids
        for slot in range(size):
            is_same |= anchors.ids[:, None] == positive_ids[:, slot]
        excluded = is_own | is_same | ~queries.real
        return _contrast(anchors, queries, is_own, excluded, options)

    reverse = _in_chunks(document_loss, (documents,), len(queries.ids), mesh)
    reverse = jnp.where(lists.positive, reverse.reshape(lists.real.shape), 0.0)
    count = jnp.maximum(lists.positive.sum(axis=-1), 1)
    return (loss + reverse.sum(axis=-1) / count) / 2


def _contrast(
    anchors: _Side,
    candidates: _Side,
    is_target: Bool[Array, "T M"],
    excluded: Bool[Array, "T M"],
    options: RetrievalLossOptions,
) -> Float[Array, " T"]:
    """Returns the mean over targets of −log of the target's share among it and the negatives.

    Args:
        anchors, candidates: the compared texts.
        is_target: the candidates that belong to an anchor.
        excluded: candidates that are no negatives of an anchor; the targets are among them.
        options: temperature and margin.
    """
    similarity = jnp.einsum("TE,ME->TM", anchors.vectors, candidates.vectors)
    if options.false_negative_margin:
        best = jnp.where(is_target, similarity, -jnp.inf).max(axis=-1, keepdims=True)
        excluded |= similarity > best + options.false_negative_margin
    logits = similarity / options.temperature
    negatives = jax.nn.logsumexp(jnp.where(excluded, MASKED, logits), axis=-1, keepdims=True)
    losses = jnp.where(is_target, jax.nn.softplus(negatives - logits), 0.0)
    return losses.sum(axis=-1) / jnp.maximum(is_target.sum(axis=-1), 1)


def _in_chunks(
    loss: Callable[..., Float[Array, " T"]],
    arguments: Sequence[Any],
    num_candidates: int,
    mesh: Mesh | None,
) -> Float[Array, " n"]:
    """Applies `loss` to chunks of the arguments' leading axis, so that similarities stay small.

    Anchors of a chunk are sharded over the devices like rows of a batch; candidates are replicated.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    count = len(jax.tree.leaves(arguments)[0])
    width = min(max(SIMILARITIES // num_candidates, 1) * shards, -(-count // shards) * shards)
    chunks = -(-count // width)

    def split(values: Array) -> Array:
        padding = [(0, chunks * width - count)] + [(0, 0)] * (values.ndim - 1)
        parts = jnp.pad(values, padding).reshape(chunks, width, *values.shape[1:])
        if mesh is None:
            return parts
        by_rows = NamedSharding(mesh, P(None, ("data", "fsdp")))
        return jax.lax.with_sharding_constraint(parts, by_rows)

    parts = jax.tree.map(split, tuple(arguments))
    if chunks == 1:
        values = loss(*jax.tree.map(lambda part: part[0], parts))
    else:  # similarities are recomputed in the backward pass
        values = jax.lax.map(lambda part: jax.checkpoint(loss)(*part), parts)
    return values.ravel()[:count]


def similarities(lists: VectorLists, temperature: float) -> Float[Array, "G N"]:
    """Returns the similarity of each query to its own documents, divided by the temperature."""
    return jnp.einsum("GE,GNE->GN", lists.queries, lists.documents) / temperature


def margin_mse(
    scores: Float[Array, "G N"],
    grades: Float[Array, "G N"],
    teacher: Float[Array, "G N"],
    real: Bool[Array, "G N"],
) -> Float[Array, " G"]:
    """MarginMSE: ((s_p − s_n) − (t_p − t_n))², the mean over pairs of a positive and a negative.

    arXiv 2010.02666, equation 7. Scores and the teacher's scores t must have the same scale: 1 is
    the usual temperature for dot products.
    """
    positive = real & (grades > 0)
    pairs = positive[:, :, None] & (real & ~positive)[:, None, :]
    difference = scores - teacher
    squares = jnp.square(difference[:, :, None] - difference[:, None, :])
    return jnp.where(pairs, squares, 0.0).sum(axis=(1, 2)) / jnp.maximum(pairs.sum(axis=(1, 2)), 1)


def kl_divergence(
    scores: Float[Array, "G N"],
    teacher: Float[Array, "G N"],
    real: Bool[Array, "G N"],
    teacher_temperature: float,
) -> Float[Array, " G"]:
    """KL(softmax(t) ‖ softmax(s)) over the documents of a query, t the scores of a teacher."""
    mask = real | ~real.any(axis=-1, keepdims=True)  # the softmax of an empty list is undefined
    log_p = jnp.where(mask, jax.nn.log_softmax(scores, axis=-1, where=mask), 0.0)
    log_t = jax.nn.log_softmax(teacher / teacher_temperature, axis=-1, where=mask)
    log_t = jnp.where(mask, log_t, 0.0)
    return jnp.sum(jnp.where(real, jnp.exp(log_t) * (log_t - log_p), 0.0), axis=-1)


def flops(vectors: Float[Array, "n V"], real: Bool[Array, " n"]) -> Float[Array, ""]:
    """FLOPS regularizer: Σ_v (mean over texts of |w_v|)², from arXiv 2004.05665, section 4."""
    total = jnp.where(real[:, None], jnp.abs(vectors), 0.0).sum(axis=0)
    return jnp.sum(jnp.square(total / jnp.maximum(real.sum(), 1)))


ListsLoss = Callable[[VectorLists, RetrievalLossOptions, Mesh | None], Float[Array, " G"]]


def _objective(loss: ListsLoss, learnable: ListFilter) -> Objective:
    """Returns the objective of a loss of lists, with Matryoshka widths and FLOPS regularization."""

    def objective(inputs: LossInputs, options: RetrievalLossOptions) -> TaskLoss:
        lists = vector_lists(inputs)
        widths = (lists.queries.shape[-1], *options.widths)
        values = loss(lists, options, inputs.mesh)
        for width in widths[1:]:
            values += loss(lists.first(width, inputs.is_normalized), options, inputs.mesh)
        is_list = lists.real.any(axis=-1)
        examples = is_list.sum(dtype=jnp.float32)
        weight = (is_list & learnable(lists.grades, lists.real)).astype(jnp.float32)
        total = jnp.sum(weight * values)
        if options.query_flops or options.document_flops:
            # Times the number of lists: the divisor of the loss then makes it a term per list.
            total += examples * _regularization(lists, options, inputs.step)
        return TaskLoss(total, weight.sum(), examples)

    return objective


def _regularization(
    lists: VectorLists, options: RetrievalLossOptions, step: Int[Array, ""] | int
) -> Float[Array, ""]:
    """Returns the weighted FLOPS of queries and documents; weights rise over `flops_ramp` steps."""
    queries, documents = _sides(lists)
    ramp = jnp.square(jnp.minimum((step + 1) / max(options.flops_ramp, 1), 1.0))
    return ramp * (
        options.query_flops * flops(queries.vectors, queries.real)
        + options.document_flops * flops(documents.vectors, documents.real)
    )


def _of_scores(loss: ListLoss) -> ListsLoss:
    """Returns a loss of the ranking kind, over the documents of each query."""

    def value(lists: VectorLists, options: RetrievalLossOptions, mesh: Mesh | None) -> Array:
        del mesh
        mask = lists.real | ~lists.real.any(axis=-1, keepdims=True)
        return loss(similarities(lists, options.temperature), lists.grades, mask)

    return value


def _margin_mse(lists: VectorLists, options: RetrievalLossOptions, mesh: Mesh | None) -> Array:
    del mesh
    scores = similarities(lists, options.temperature)
    return margin_mse(scores, lists.grades, lists.teacher, lists.real)


def _kl(lists: VectorLists, options: RetrievalLossOptions, mesh: Mesh | None) -> Array:
    del mesh
    scores = similarities(lists, options.temperature)
    return kl_divergence(scores, lists.teacher, lists.real, options.teacher_temperature)


def _any_list(grades: Array, real: Array) -> Array:
    del grades
    return real.any(axis=-1)


RETRIEVAL_LOSSES: dict[str, Objective] = {
    "info_nce": _objective(info_nce, has_positive),
    "margin_mse": _objective(_margin_mse, has_positive),
    "kl": _objective(_kl, _any_list),
    **{
        name: _objective(_of_scores(loss), learnable or _any_list)
        for name, (loss, learnable) in LIST_LOSSES.items()
    },
}
NEED_TEACHER = ("margin_mse", "kl")
