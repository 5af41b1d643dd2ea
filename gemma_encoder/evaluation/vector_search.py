"""Exact search among the vectors of an evaluation, on the host.

Shapes: Q queries, M documents, E width of a vector, V vocabulary.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.task import ExampleTable

DEPTH = 1000  # documents of a query in the run
QUERIES_AT_ONCE = 256


def search_run(kind: Kind, table: ExampleTable, outputs: np.ndarray) -> ranking.Run:
    """Returns the best documents of every query.

    Args:
        kind: the kind of task.
        table: the examples: queries, which have a query id, and documents.
        outputs: the vector of each example.
    """
    queries, documents, best, scores = _search(kind, table, outputs, DEPTH)
    query_ids = np.array(table.query_ids, object)[queries]
    ids = np.array(table.document_ids, object)[documents]
    repeated = np.repeat(query_ids, best.shape[1])
    return ranking.make_run(repeated, ids[best.ravel()], scores.ravel())


def first_results(
    kind: Kind, table: ExampleTable, outputs: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """Returns the examples (query, best document) of the first queries; arguments as above."""
    queries, documents, best, _ = _search(kind, table, outputs, 1, count)
    return list(zip(queries.tolist(), documents[best[:, 0]].tolist(), strict=True))


def _search(
    kind: Kind, table: ExampleTable, outputs: np.ndarray, depth: int, count: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the examples that are queries (the first `count`) and documents, and `nearest`."""
    is_query = np.array([bool(query) for query in table.query_ids])
    queries = np.flatnonzero(is_query)[:count]
    documents = np.flatnonzero(~is_query)
    sparse = kind.word_weights(outputs)
    matrix = outputs if sparse is None else sparse_matrix(*sparse)
    return queries, documents, *nearest(matrix[queries], matrix[documents], depth)


def nearest(
    queries: Any, documents: Any, count: int
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Returns the documents with the highest products with each query, in no order.

    Args:
        queries, documents: [Q, E] and [M, E], dense or sparse.
        count: k, number of documents per query; fewer if there are fewer.
    """
    total = documents.shape[0]
    count = min(count, total)
    transposed = documents.T
    best = []
    scores = []
    for first in range(0, queries.shape[0], QUERIES_AT_ONCE):
        products = queries[first : first + QUERIES_AT_ONCE] @ transposed
        products = np.asarray(products.todense() if hasattr(products, "todense") else products)
        indices = np.argpartition(-products, count - 1, axis=1)[:, :count]
        best.append(indices)
        scores.append(np.take_along_axis(products, indices, axis=1))
    return np.concatenate(best), np.concatenate(scores)


def sparse_matrix(
    weights: Float[np.ndarray, "N k"], words: Int[np.ndarray, "N k"], vocabulary: int = 0
) -> Any:
    """Returns weights of words as a SciPy CSR matrix [N, V], without weights of 0.

    Args:
        weights, words: the weights and the ids of their words.
        vocabulary: V; by default as many as there are up to the largest id.
    """
    import scipy.sparse

    rows, slots = np.nonzero(weights)
    entries = weights[rows, slots], (rows, words[rows, slots])
    shape = (len(words), vocabulary or int(words.max(initial=0)) + 1)
    return scipy.sparse.csr_matrix(entries, shape, np.float32)
