"""Bootstrap confidence intervals for metrics, over independent units.

Units are examples, or the questions, pairs or queries that a metric groups examples by: a unit is
drawn as a whole, so that examples of one group are not taken for independent ones.

A plain percentile bootstrap collapses where a metric is at its edge: of 80 correct answers every
resample is 1.000, and so would be both bounds. Resamples here are those of the Bayesian bootstrap
(Rubin, 1981: The Bayesian bootstrap), and a value of the metric's best and of its worst enter each
resample with a prior mass of `PRIOR` units (a proper Bayesian bootstrap; Muliere and Secchi, 1996:
Bayesian nonparametric predictive inference and bootstrap techniques). Of a mean of zeros and ones,
k of n, the bounds are then those of the posterior Beta(k + PRIOR, n − k + PRIOR), up to the error
of drawing. A prior mass of 1/2 would be Jeffreys' interval, of 1 nearly Wilson's (Brown, Cai and
DasGupta, 2001: Interval estimation for a binomial proportion). For a difference, the masses are at
the largest possible loss and gain, much as Bonett and Price (2012: Adjusted Wald confidence
interval for a difference of binomial proportions based on paired data) add pairs that disagree.

Values that lie closer together than zeros and ones, such as nDCG of hard queries, or a high
correlation, have a smaller prior mass, in proportion to the variance (`prior_mass`): the whole
mass would widen the interval several times, and move it away from the value. Of F1 and metrics like
it, the mass counts beside the examples of the rare class alone (`effective_units`), which decide
them: ten of ten found among a thousand is not 0.997 to 1.000.

Coverage of the interval at 95 %, for n units of which a share p is correct, by simulation:

    n     p = 0.5   0.9     0.99
    50    0.946     0.941   0.947
    200   0.946     0.950   0.960

Limits: coverage of a mean of few units is a mean over p, not a guarantee at each p. No interval
that depends on the count k alone can have a coverage of 93 to 97 % at n = 50 and p = 0.99, where
the probabilities of its possible values leave a gap between 0.924 and 0.986; the error of drawing
fills the gap. For metrics that are no means, such as F1 or a correlation, the prior mass is an
approximation to first order, and coverage at 100 units is 90 to 93 %. Metrics without bounds, such
as perplexity, have no prior mass. Differences have the whole mass, which makes their intervals
wider than needed where values lie close together.

Shapes: n units (examples, questions or queries), R resamples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# Units' worth of prior mass at each bound. Of the masses from 0.5 to 1, this one has a coverage
# nearest to 95 % in the six cases of the table.
PRIOR = 0.7
_BLOCK = 2**22  # weights that are drawn at once, 16 MiB
_MOST_WEIGHTS = 20_000_000  # weights that are drawn in all, with at least `_FEWEST` resamples
_FEWEST = 200

Bounds = tuple[float, float]

_BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(
        (
            "accuracy",
            "exact_match",
            "gender_parity",
            "f1",
            "f1a",
            "macro_f1",
            "micro_f1",
            "token_f1",
            "average_precision",
            "subset_accuracy",
            "mrr",
            "ndcg",
            "map",
            "recall",
        ),
        (0.0, 1.0),
    ),
    **dict.fromkeys(
        ("matthews_correlation", "pearson", "spearman", "quadratic_weighted_kappa"), (-1.0, 1.0)
    ),
}


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval; NaN if there is no interval."""

    value: float
    low: float
    high: float

    @property
    def exists(self) -> bool:
        """False if the units do not allow an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def bounds(metric: str) -> Bounds | None:
    """Returns the worst and best value of a metric; None if it has none, or if it is registered.

    Args:
        metric: name of the metric, for ranking with "@10" and "(rel=…)", without the part of a
            split.
    """
    return _BOUNDS.get(metric.partition("@")[0].partition("(")[0])


def bounds_of_difference(limits: Bounds | None) -> Bounds | None:
    """Returns the largest loss and gain of a metric with these bounds; None without bounds."""
    return None if limits is None else (limits[0] - limits[1], limits[1] - limits[0])


def resampled(
    statistic: Callable[[np.ndarray], float], units: int, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Computes a statistic on R resamples of n units, each drawn with replacement.

    This is the bootstrap of metrics that take no weights; for others see `weights`. Resamples
    depend only on the seed and the number of units, so that values of two models on the same units
    may be subtracted.

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


def weights(units: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Draws the weight of each of n units in each of R resamples, [R, n] float32.

    Weights are those of the Bayesian bootstrap, up to a factor: exponential, with mean 1. From
    them, the functions of `resampled_metrics` compute the metrics of all resamples at once. They
    depend only on the seed and the number of units.
    """
    return np.random.default_rng(seed).standard_exponential((resamples, units), np.float32)


def weighted(
    statistic: Callable[[np.ndarray], np.ndarray], units: int, seed: int = 0
) -> np.ndarray:
    """Computes a statistic on all resamples of n units, [R], in blocks that fit in memory.

    R is `RESAMPLES`; of more than 20,000 units fewer, at least 200, so that a split of a million
    examples takes minutes. The bounds of an interval then have an error of a tenth of its width.

    Args:
        statistic: function from weights [r, n] to values [r].
        units: n.
        seed: seed of the random draws; weights are those of `weights`.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // units)
    resamples = int(np.clip(_MOST_WEIGHTS // units, _FEWEST, RESAMPLES))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    blocks = (rng.standard_exponential((size, units), np.float32) for size in sizes)
    return np.concatenate([statistic(block) for block in blocks])


def prior_mass(value: float, values: np.ndarray, units: float, limits: Bounds) -> float:
    """Returns the prior mass at each bound for the interval of a metric.

    It is `PRIOR` times the variance of the resampled values, relative to that of a mean of worst
    and best values; `PRIOR` at a bound, and where all resampled values are equal.

    Args:
        value: the metric on all units.
        values: the metric on each resample, [R].
        units: n.
        limits: worst and best value.
    """
    spread = (value - limits[0]) * (limits[1] - value)
    variance = float(np.var(values))
    if spread <= 1e-9 or variance <= 1e-9 * spread:
        return PRIOR
    # Means of zeros and ones have a ratio of 1, up to the error of drawing.
    return PRIOR * min(1.0, variance * (units + 1) / spread / 0.8)


def effective_units(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Returns the number of units that decide a metric; all but for metrics of rare classes.

    For F1 those with the class as label or prediction; for metrics that weight classes alike, the
    number whose mean has the variance of the mean over classes, C² / Σ 1 / n_c.

    Args:
        metric: name of the metric.
        labels, predictions: classes, [n].
    """
    if metric in ("f1", "f1a"):
        return float(max(((labels == 1) | (predictions == 1)).sum(), 1))
    if metric in ("macro_f1", "matthews_correlation") and labels.ndim == 1:
        counts = np.unique(labels, return_counts=True)[1]
        return float(len(counts) ** 2 / (1 / counts).sum())
    return float(len(labels))


def interval(
    value: float,
    values: np.ndarray,
    units: float,
    limits: Bounds | None,
    mass: float = PRIOR,
) -> Interval:
    """Returns the 95 % interval of a metric, or of a difference, from its resampled values.

    It contains the value. With bounds it never has a width of zero; without bounds it does not
    exist where all resampled values are equal, as for a single unit.

    Args:
        value: the metric on all units.
        values: the metric on each resample, [R].
        units: n, or `effective_units`.
        limits: worst and best value, from `bounds` or `bounds_of_difference`.
        mass: units' worth of prior mass at each bound, see `prior_mass`.
    """
    if limits is not None:
        rng = np.random.default_rng([round(units), 1])
        share, worst, best = rng.dirichlet((units, mass, mass), len(values)).T
        values = share * values + worst * limits[0] + best * limits[1]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if limits is None and high - low <= 1e-12 * max(abs(low), abs(high)):
        return Interval(float(value), np.nan, np.nan)
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def draw_groups(groups: Sequence[np.ndarray], drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the members of drawn groups, and the draw index of each member.

    A group that is drawn twice counts as two groups.
    """
    members = [groups[i] for i in drawn]
    draw_index = np.repeat(np.arange(len(members)), [len(group) for group in members])
    return np.concatenate(members), draw_index
