"""Sparse vectors: an inverted index per block, and search by products of scipy's CSR matrices.

Shapes: Q queries, n documents of a block, K weights of a vector, V vocabulary, k results.
"""

import pathlib
from collections.abc import Callable

import numpy as np

from gemma_encoder.embedding import SparseVectors
from gemma_encoder.evaluation.vector_search import sparse_matrix
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval.blocks import array_of, block_path, load_block
from gemma_encoder.retrieval.description import IndexDescription
from gemma_encoder.retrieval.top import Best, largest, merge, nothing


def sparse_arrays(vectors: SparseVectors, description: IndexDescription) -> dict[str, np.ndarray]:
    """Returns the arrays of a block: the weights of documents, token by token.

    A query then reads only the weights of its own tokens.
    """
    matrix = sparse_matrix(vectors.weights, vectors.ids, description.full_width).tocsc()
    matrix.sort_indices()
    return {
        "starts": matrix.indptr.astype(np.int32),
        "documents": matrix.indices.astype(np.int32),
        "weights": matrix.data,
    }


def _read_matrix(folder: pathlib.Path, description: IndexDescription, block: int):
    """Returns the transposed matrix of a block, [V, n] CSR."""
    import scipy.sparse

    path = block_path(folder, block)
    arrays = load_block(folder, block)
    vocabulary, rows = description.full_width, len(description.rows(block))
    starts = array_of(arrays, "starts", (vocabulary + 1,), np.int32, path)
    size = max(int(starts[-1]), 0)
    documents = array_of(arrays, "documents", (size,), np.int32, path)
    weights = array_of(arrays, "weights", (size,), np.float32, path)
    is_valid = starts[0] == 0 and (np.diff(starts) >= 0).all()
    if not is_valid or (size and not 0 <= documents.min() <= documents.max() < rows):
        raise InputError(f"{path} is damaged: it names documents that the block does not have")
    return scipy.sparse.csr_matrix((weights, documents, starts), (vocabulary, rows))


def search_sparse(
    folder: pathlib.Path,
    description: IndexDescription,
    queries: SparseVectors,
    k: int,
    advance: Callable[[int], object],
) -> Best:
    """Returns the k documents with the largest products above 0; ties in the documents' order.

    Args:
        folder: of the index.
        description: of the index.
        queries: Q vectors.
        k: number of results.
        advance: is called with 1 after each block.
    """
    matrix = sparse_matrix(queries.weights, queries.ids, description.full_width)
    best = nothing(matrix.shape[0], k)
    for block in range(description.blocks):
        first = block * description.block
        scores = matrix @ _read_matrix(folder, description, block)
        scores.sort_indices()
        for query in range(matrix.shape[0]):
            entries = slice(scores.indptr[query], scores.indptr[query + 1])
            values, documents = scores.data[entries], scores.indices[entries]
            is_better = values > best.scores[query, -1]
            values, documents = values[is_better], documents[is_better]
            if len(values):
                order = largest(values, k)
                merge(best, query, documents[order] + first, values[order])
        advance(1)
    return best
