"""Dense vectors: what a block holds of them, and exact search by matrix products on the mesh.

Shapes: Q queries, n documents of a block, W width, E width of the model's vectors, k results.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.embedding import unit_vectors
from gemma_encoder.retrieval.blocks import array_of, block_path, load_block
from gemma_encoder.retrieval.description import IndexDescription
from gemma_encoder.retrieval.top import Best

QUERY_ROWS = (1, 8, 64, 512)  # queries of a program; each is compiled once
LARGEST_INT8 = 127.0
SMALLEST_BLOCK = 128  # documents of a program, for indexes of a single block
AXES = ("data", "fsdp", "tensor")


def narrowed(vectors: np.ndarray, description: IndexDescription) -> np.ndarray:
    """Returns the first W dimensions of vectors, scaled to length 1 if cosines are compared.

    Args:
        vectors: [N, E] or [N, W].
        description: of the index.
    """
    vectors = np.ascontiguousarray(vectors[:, : description.width])
    return unit_vectors(vectors) if description.similarity == "cosine" else vectors


def dense_arrays(vectors: np.ndarray, description: IndexDescription) -> dict[str, np.ndarray]:
    """Returns the arrays of a block from the model's vectors, [n, E].

    In int8 each vector has a scale: its largest magnitude becomes 127.
    """
    vectors = narrowed(vectors, description)
    if description.precision == "float32":
        return {"vectors": vectors}
    scales = np.abs(vectors).max(axis=1) / np.float32(LARGEST_INT8)
    scales = np.where(scales > 0, scales, np.float32(1))
    return {"vectors": np.rint(vectors / scales[:, None]).astype(np.int8), "scales": scales}


def read_vectors(
    folder: pathlib.Path, description: IndexDescription, block: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the stored vectors of a block, and of int8 their scales."""
    path = block_path(folder, block)
    rows = len(description.rows(block))
    arrays = load_block(folder, block)
    shape = (rows, description.width)
    if description.precision == "float32":
        return array_of(arrays, "vectors", shape, np.float32, path), None
    vectors = array_of(arrays, "vectors", shape, np.int8, path)
    return vectors, array_of(arrays, "scales", (rows,), np.float32, path)


def as_float32(vectors: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Returns stored vectors as float32."""
    return vectors if scales is None else vectors.astype(np.float32) * scales[:, None]


def search_dense(
    folder: pathlib.Path,
    description: IndexDescription,
    queries: np.ndarray,
    k: int,
    mesh: Mesh,
    advance: Callable[[int], object],
) -> Best:
    """Returns the k documents with the largest products, exactly; ties in the documents' order.

    The scores of a block are in memory at a time. Documents are sharded over all devices of the
    mesh, queries are replicated. Vectors of int8 are multiplied as float32.

    Args:
        folder: of the index.
        description: of the index.
        queries: [Q, W] float32.
        k: number of results.
        mesh: the mesh, whose devices are all of this process.
        advance: is called with 1 after each block.
    """
    devices = mesh.devices.size
    rows = description.block
    if description.blocks == 1:
        rows = min(rows, max(SMALLEST_BLOCK, 1 << (description.count - 1).bit_length()))
    rows = -(-rows // devices) * devices
    parts = list(_query_batches(queries))
    program = _search_program(mesh, k, description.precision == "int8")
    best = [
        (np.full((len(part), k), -np.inf, np.float32), np.full((len(part), k), -1, np.int32))
        for part, _ in parts
    ]
    by_rows = NamedSharding(mesh, P(AXES))
    for block in range(description.blocks):
        vectors, scales = read_vectors(folder, description, block)
        count = len(vectors)
        scales = np.ones(count, np.float32) if scales is None else scales
        arrays = jax.device_put((_padded(vectors, rows), _padded(scales, rows)), by_rows)
        first = block * description.block
        best = [
            program(part, *arrays, np.int32(count), np.int32(first), *former)
            for (part, _), former in zip(parts, best, strict=True)
        ]
        advance(1)
    scores, indices = zip(*jax.device_get(best), strict=True)
    counts = [count for _, count in parts]
    return Best(
        np.concatenate([x[:n] for x, n in zip(indices, counts, strict=True)]).astype(np.int64),
        np.concatenate([x[:n] for x, n in zip(scores, counts, strict=True)]),
    )


def _query_batches(queries: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Returns queries in batches of a few sizes, padded, each with its number of real ones."""
    largest = QUERY_ROWS[-1]
    batches = []
    for start in range(0, len(queries), largest):
        part = queries[start : start + largest]
        rows = next(rows for rows in QUERY_ROWS if rows >= len(part))
        batches.append((_padded(part, rows), len(part)))
    return batches


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns an array with rows of zeros at its end."""
    if len(array) == rows:
        return array
    padded = np.zeros((rows, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded


@functools.lru_cache(maxsize=32)
def _search_program(mesh: Mesh, k: int, is_int8: bool) -> Callable:
    """Returns the jitted search of a block, which merges its results with the former ones."""

    def local(queries, vectors, scales, count):
        """Returns the best documents of one device's rows, [Q, min(k, rows)]."""
        scores = jnp.matmul(
            queries, vectors.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
        )
        if is_int8:
            scores = scores * scales[None]
        rows = vectors.shape[0]
        indices = jax.lax.axis_index(AXES) * rows + jnp.arange(rows, dtype=jnp.int32)
        scores = jnp.where(indices < count, scores, -jnp.inf)
        top, index = jax.lax.top_k(scores, min(k, rows))
        return top, indices[index]

    shards = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(AXES), P(AXES), P()),
        out_specs=(P(None, AXES), P(None, AXES)),
    )

    def search(queries, vectors, scales, count, first, best_scores, best_indices):
        top, indices = shards(queries, vectors, scales, count)
        indices = jnp.where(jnp.isneginf(top), -1, indices + first)
        # Former results come first, and devices in order: of ties, `top_k` takes the first.
        scores = jnp.concatenate([best_scores, top], axis=1)
        indices = jnp.concatenate([best_indices, indices], axis=1)
        best, order = jax.lax.top_k(scores, k)
        return best, jnp.take_along_axis(indices, order, axis=1)

    return jax.jit(search, out_shardings=NamedSharding(mesh, P()))
