"""The k best documents of each query, merged over blocks; ties are in the documents' order.

Shapes: Q queries, n documents of a block, k results.
"""

from typing import NamedTuple

import numpy as np


class Best(NamedTuple):
    """Results of a search.

    Attributes:
        indices: documents, best first, [Q, k] int64; -1 where there are fewer than k.
        scores: their scores, [Q, k] float32; -inf where there is no document.
    """

    indices: np.ndarray
    scores: np.ndarray


def nothing(queries: int, k: int) -> Best:
    """Returns results without a document."""
    return Best(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the k largest scores above 0, largest first; of ties the first.

    Args:
        scores: [n], none of them NaN.
        k: the most that are returned.
    """
    if k < len(scores):
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > threshold)
        ties = np.flatnonzero(scores == threshold)[: k - len(above)]
        indices = np.sort(np.concatenate([above, ties]))
    else:
        indices = np.arange(len(scores))
    indices = indices[scores[indices] > 0]
    return indices[np.argsort(-scores[indices], kind="stable")]


def merge(best: Best, query: int, indices: np.ndarray, scores: np.ndarray) -> None:
    """Enters documents of a later block into the results of a query.

    Args:
        best: the results so far, which are changed.
        query: index of the query.
        indices, scores: the documents, best first.
    """
    k = best.scores.shape[1]
    all_indices = np.concatenate([best.indices[query], indices])
    all_scores = np.concatenate([best.scores[query], scores])
    order = np.argsort(-all_scores, kind="stable")[:k]
    best.indices[query] = all_indices[order]
    best.scores[query] = all_scores[order]
