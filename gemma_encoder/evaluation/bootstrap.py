"""Bootstrap confidence intervals for metrics, over independent units.

Shapes: n units (examples, questions or queries), R resamples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value with the bounds of its 95 % percentile interval."""

    value: float
    low: float
    high: float


def resampled(
    statistic: Callable[[np.ndarray], float], units: int, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Computes a statistic on R resamples of n units.

    Resamples depend only on the seed and the number of units, so that values of two models on the
    same units may be subtracted.

    Args:
        statistic: function of unit indices [n] int.
        units: n.
        seed: seed of the random draws.
        resamples: R.

    Returns:
        The statistic of each resample, [R].
    """
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(0, units, units)) for _ in range(resamples)])


def counts(units: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Counts the draws of each of n units in each of R resamples, [R, n] float32.

    These are the resamples of `resampled`. From the counts, the functions of `resampled_metrics`
    compute the metrics of all resamples at once.
    """
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(resamples)]
    ).astype(np.float32)


def percentile_interval(value: float, values: np.ndarray) -> Interval:
    """Returns the percentile interval of a statistic from its resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def draw_groups(groups: Sequence[np.ndarray], drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the members of drawn groups, and the draw index of each member.

    A group that is drawn twice counts as two groups.
    """
    members = [groups[i] for i in drawn]
    draw_index = np.repeat(np.arange(len(members)), [len(group) for group in members])
    return np.concatenate(members), draw_index
