"""Approximate search by FAISS, whose index is INDEX/faiss.index beside the exact vectors.

`hnsw` is a graph of neighbors, fast at a high recall; `ivf` visits the nearest of √N clusters, and
is built faster. Vectors are float32 in it, or 8 bits a dimension if the index is of int8.
"""

import pathlib
from collections.abc import Callable

import numpy as np

from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.retrieval.dense import as_float32, read_vectors
from gemma_encoder.retrieval.description import IndexDescription
from gemma_encoder.retrieval.top import Best
from gemma_encoder.runtime import require_retrieval
from gemma_encoder.whole_files import whole_file

NAME = "faiss.index"
NEIGHBORS = 32  # links of a vector in the graph
BUILD_DEPTH = 200  # candidates for the links of a vector
SEARCH_DEPTH = 128  # candidates of a query, at least twice its results
SHARE_VISITED = 1 / 8  # of the clusters
TRAINING_VECTORS = 256  # per cluster


def write_approximate(
    folder: pathlib.Path, description: IndexDescription, advance: Callable[[int], object]
) -> None:
    """Builds FAISS's index from the blocks; all vectors are in memory.

    Args:
        folder: of the index.
        description: of the index.
        advance: is called with numbers of documents.
    """
    require_retrieval("faiss")
    import faiss

    index = _empty(description)
    blocks = description.blocks
    if not index.is_trained:
        per_block = -(-TRAINING_VECTORS * _clusters(description) // blocks)
        sample = [_vectors(folder, description, block)[:per_block] for block in range(blocks)]
        index.train(np.concatenate(sample))
    for block in range(blocks):
        vectors = _vectors(folder, description, block)
        index.add(vectors)
        advance(len(vectors))
    with whole_file(folder / NAME) as temporary:
        faiss.write_index(index, str(temporary))


def _vectors(folder: pathlib.Path, description: IndexDescription, block: int) -> np.ndarray:
    return np.ascontiguousarray(as_float32(*read_vectors(folder, description, block)))


def _clusters(description: IndexDescription) -> int:
    """Returns the number of clusters: √N, of few vectors so that each has some 40."""
    return max(1, min(int(description.count**0.5), description.count // 39))


def _empty(description: IndexDescription):
    """Returns an index without vectors."""
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT
    width = description.width
    is_int8 = description.precision == "int8"
    if description.approximate == "hnsw":
        if is_int8:
            code = faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexHNSWSQ(width, code, NEIGHBORS, metric)
        else:
            index = faiss.IndexHNSWFlat(width, NEIGHBORS, metric)
        index.hnsw.efConstruction = BUILD_DEPTH
        return index
    name = f"IVF{_clusters(description)},{'SQ8' if is_int8 else 'Flat'}"
    return faiss.index_factory(width, name, metric)


class Approximate:
    """An index that `write_approximate` wrote.

    Args:
        folder: of the index.
        description: of the index.

    Raises:
        InputError: the file is missing, damaged or of other vectors.
    """

    def __init__(self, folder: pathlib.Path, description: IndexDescription):
        require_retrieval("faiss")
        import faiss

        path = folder / NAME
        with in_one_line(f"{path} cannot be read", "copy the index again, or index anew"):
            self._index = faiss.read_index(str(path))
        actual = (self._index.ntotal, self._index.d)
        if actual != (description.count, description.width):
            raise InputError(
                f"{path} holds {actual[0]} vectors of width {actual[1]}, expected "
                f"{description.count} of {description.width}; index the collection again"
            )
        self._is_graph = description.approximate == "hnsw"
        self._visited = max(8, int(_clusters(description) * SHARE_VISITED))

    def search(self, queries: np.ndarray, k: int) -> Best:
        """Returns about the k documents with the largest products.

        Args:
            queries: [Q, W] float32.
            k: number of results.
        """
        import faiss

        if self._is_graph:
            parameters = faiss.SearchParametersHNSW(efSearch=max(SEARCH_DEPTH, 2 * k))
        else:
            parameters = faiss.SearchParametersIVF(nprobe=self._visited)
        queries = np.ascontiguousarray(queries, np.float32)
        scores, indices = self._index.search(queries, k, params=parameters)
        return Best(indices, np.where(indices < 0, np.float32(-np.inf), scores))
