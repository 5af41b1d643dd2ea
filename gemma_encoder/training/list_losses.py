"""Losses of a list of documents, from their scores and grades.

Shapes: G lists, N documents per list.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import rax
from jaxtyping import Array, Bool, Float

from gemma_encoder.training.objectives import ListFilter, ListLoss, has_pair, has_positive


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


# By name: the loss, and the lists that it can learn from, by default all.
LIST_LOSSES: dict[str, tuple[ListLoss, ListFilter | None]] = {
    "point_ce": (point_ce, None),
    "pairwise_logistic": (pairwise_logistic, has_pair),
    "softmax": (listwise_softmax, has_positive),
    "poly1": (poly1, has_positive),
}
