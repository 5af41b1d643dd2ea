"""Seeded permutations of records, looked up by index."""

import functools

import numpy as np

SMALL = 10_000  # records up to which an epoch's order is held in memory


def shuffled(index: int, size: int, seed: int) -> int:
    """The record at `index` of a permutation of `size` records.

    Grain's shuffle needs no memory, but takes 0.5 ms a record where there are 48: it walks through
    a domain of 65,536 numbers.
    """
    if size <= SMALL:
        return int(_permutation(size, seed)[index])
    from grain.experimental import index_shuffle  # and with it JAX, which naming a task needs not

    return index_shuffle(index, max_index=size - 1, seed=seed % 2**32, rounds=4)


@functools.lru_cache(64)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
