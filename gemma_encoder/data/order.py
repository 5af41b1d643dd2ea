"""Seeded permutations of records, looked up by index."""

import functools

import numpy as np

SMALL = 10_000  # splits of up to this many records keep the permutation of an epoch in memory


def shuffled(index: int, size: int, seed: int) -> int:
    """Returns element `index` of a seeded permutation of `size` records.

    Large splits use Grain's index shuffle, which needs no memory. For small ones it is slow (0.5 ms
    per record for 48 records), because it cycle-walks a domain of at least 65,536 indices.
    """
    if size <= SMALL:
        return int(_permutation(size, seed)[index])
    from grain.experimental import index_shuffle  # imports JAX, which listing tasks does not need

    return index_shuffle(index, max_index=size - 1, seed=seed % 2**32, rounds=4)


@functools.lru_cache(64)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
