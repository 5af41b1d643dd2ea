"""How sure a metric is: percentile bootstrap over what is independent (examples, questions or queries).

n units, R resamples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value and the bounds between which 95 % of its resampled values lie."""

    value: float
    low: float
    high: float


def resampled(
    statistic: Callable[[np.ndarray], float], units: int, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of R resamples of n units, [R].

    The same seed and number of units draw the same resamples, so that values of two models on the same units can be subtracted.

    Args:
        statistic: of the units with these numbers, [n] int.
        units: n.
        seed: of the draws.
        resamples: R.
    """
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(0, units, units)) for _ in range(resamples)])


def counts(units: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of n units is drawn in each of R resamples, [R, n] float32; the resamples that `resampled` draws.

    What `weighted` computes from these counts is the statistic of every resample at once.
    """
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(resamples)]
    ).astype(np.float32)


def percentile_interval(value: float, values: np.ndarray) -> Interval:
    """The percentile interval of a statistic whose value is `value`, from its resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def draw_groups(groups: Sequence[np.ndarray], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members of the chosen groups, and for each member which draw it came with: a group that is drawn twice is two groups."""
    members = [groups[i] for i in chosen]
    return np.concatenate(members), np.repeat(
        np.arange(len(members)), [len(group) for group in members]
    )
