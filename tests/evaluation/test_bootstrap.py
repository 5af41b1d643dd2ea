"""Intervals contain the truth as often as they state, and never collapse."""

import itertools

import numpy as np
import pytest
import scipy.stats

from gemma_encoder.evaluation import bootstrap, metrics, ranking, resampled_metrics

CASES = [(units, share) for units in (50, 200) for share in (0.5, 0.9, 0.99)]
DRAWS = 2000


def estimate(value, resampled, units, limits):
    """Returns the interval of a metric of a model."""
    mass = bootstrap.prior_mass(value, resampled, units, limits)
    return bootstrap.interval(value, resampled, units, limits, mass)


def intervals(values, limits, of=estimate):
    """Returns the intervals of the means of draws [D, n]."""
    count = values.shape[1]
    weights = bootstrap.weights(count)
    resampled = weights @ values.T.astype(np.float32) / weights.sum(axis=1, keepdims=True)
    return [
        of(drawn.mean(), means, count, limits)
        for drawn, means in zip(values, resampled.T, strict=True)
    ]


def coverage(values, truth, limits, of=estimate):
    """Returns the share of draws [D, n] whose interval contains the true mean."""
    return np.mean([low <= truth <= high for _, low, high in intervals(values, limits, of)])


@pytest.mark.parametrize(("units", "share"), CASES)
def test_accuracy_intervals_contain_the_truth_in_95_percent(units, share):
    right = np.random.default_rng(0).random((DRAWS, units)) < share
    assert 0.93 <= coverage(right, share, bootstrap.bounds("accuracy")) <= 0.97


def test_no_function_of_the_count_could_do_so_in_each_case():
    """At n = 50 and p = 0.99, no set of counts has a probability of 93 to 97 %."""
    likely = scipy.stats.binom.pmf(np.arange(51), 50, 0.99)[40:]  # the others sum to 1e-10
    masks = np.array(list(itertools.product([False, True], repeat=len(likely))))
    sums = masks @ likely
    assert not ((sums > 0.925) & (sums < 0.986)).any()


@pytest.mark.parametrize(("units", "share"), CASES)
def test_exact_coverage_of_the_limit_of_many_resamples(units, share):
    """Beta(k + PRIOR, n − k + PRIOR), by sums of the binomial: at least 93 % in each case."""
    right = np.arange(units + 1)
    shapes = right + bootstrap.PRIOR, units - right + bootstrap.PRIOR
    low = np.where(right == 0, 0, scipy.stats.beta.ppf(0.025, *shapes))
    high = np.where(right == units, 1, scipy.stats.beta.ppf(0.975, *shapes))
    inside = (low <= share) & (share <= high)
    exact = scipy.stats.binom.pmf(right, units, share)[inside].sum()
    assert 0.93 <= exact <= (0.987 if (units, share) == (50, 0.99) else 0.97)


@pytest.mark.parametrize(("right", "units"), [(80, 80), (79, 80), (0, 80), (40, 80), (3, 10)])
def test_intervals_of_accuracy_are_those_of_a_beta(right, units):
    (interval,) = intervals((np.arange(units) < right)[None], (0.0, 1.0))
    shapes = right + bootstrap.PRIOR, units - right + bootstrap.PRIOR
    expected = scipy.stats.beta.ppf([0.025, 0.975], *shapes)
    # 1,000 resamples: the bounds' own error is about a tenth of the width.
    width = expected[1] - expected[0]
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.12 * width)


@pytest.mark.parametrize(("gained", "lost"), [(0.05, 0.05), (0.1, 0.02), (0.02, 0.0), (0.3, 0.1)])
@pytest.mark.parametrize("units", [50, 200])
def test_intervals_of_differences_contain_the_truth(units, gained, lost):
    """Of two runs' paired answers; where few differ, coverage is above 95 %."""
    draws = np.random.default_rng(1).random((DRAWS, units))
    difference = (draws < gained).astype(float) - (draws > 1 - lost)
    limits = bootstrap.bounds_of_difference(bootstrap.bounds("accuracy"))
    assert coverage(difference, gained - lost, limits, bootstrap.interval) >= 0.93


def test_intervals_of_reciprocal_ranks_contain_the_truth():
    values = np.array([1, 1 / 2, 1 / 3, 1 / 10, 0])
    shares = np.array([0.8, 0.1, 0.05, 0.03, 0.02])
    drawn = values[np.random.default_rng(2).choice(5, (DRAWS, 100), p=shares)]
    assert 0.93 <= coverage(drawn, values @ shares, bootstrap.bounds("mrr@10")) <= 0.97


def test_examples_of_a_group_count_as_one_unit():
    """100 questions of four answers that are all right or all wrong hold as much as 100 answers."""
    rng = np.random.default_rng(3)
    weights = bootstrap.weights(100)[:, np.repeat(np.arange(100), 4)]
    covered = []
    for _ in range(200):
        right = np.repeat(rng.random(100) < 0.9, 4)
        values = resampled_metrics.accuracy(weights, np.ones(400), right)
        _, low, high = bootstrap.interval(right.mean(), values, 100, (0.0, 1.0))
        covered.append(low <= 0.9 <= high)
    assert np.mean(covered) >= 0.9  # 80 % if answers were taken for independent ones, or less


def rare_class(rng, units):
    labels = (rng.random(units) < 0.02).astype(int)
    wrong = rng.random(units) < np.where(labels == 1, 0.1, 0.002)
    return labels, np.where(wrong, 1 - labels, labels)


def correlated(rng, units):
    targets = rng.normal(size=units)
    return targets, 0.98 * targets + np.sqrt(1 - 0.98**2) * rng.normal(size=units)


@pytest.mark.parametrize(
    ("name", "draw", "units", "widest"),
    [
        ("pearson", correlated, 100, 0.03),
        ("f1", rare_class, 500, 0.4),
        ("macro_f1", rare_class, 500, 0.2),
        ("matthews_correlation", rare_class, 500, 0.4),
    ],
)
def test_other_metrics_have_intervals_of_their_variance(name, draw, units, widest):
    """Of high correlations and rare classes, with some room for the bootstrap's own error."""
    rng = np.random.default_rng(4)
    metric = resampled_metrics.METRICS[name]
    limits = bootstrap.bounds(name)
    many = draw(rng, 500_000)
    truth = metric(np.ones((1, 500_000), np.float32), *many)[0]
    covered = []
    widths = []
    for _ in range(100):
        drawn = draw(rng, units)
        value = metric(np.ones((1, units), np.float32), *drawn)[0]
        resampled = metric(bootstrap.weights(units, resamples=300), *drawn)
        effective = bootstrap.effective_units(name, *drawn)
        _, low, high = estimate(value, resampled, effective, limits)
        covered.append(low <= truth <= high)
        widths.append(high - low)
    assert np.mean(covered) >= 0.89
    assert np.mean(widths) <= widest


def test_values_close_together_have_little_prior_mass():
    """Seventy-five queries with nDCG of 0.01 to 0.1: the interval is that of their mean."""
    values = np.random.default_rng(5).beta(2, 40, (300, 75))
    assert coverage(values, 2 / 42, (0.0, 1.0)) >= 0.91
    assert np.mean([high - low for _, low, high in intervals(values, (0.0, 1.0))]) < 0.02


def test_perfect_f1_of_ten_among_a_thousand_is_not_certain():
    labels = (np.arange(1000) < 10).astype(int)
    assert bootstrap.effective_units("f1", labels, labels) == 10
    interval = estimate(1.0, np.ones(1000), 10, (0.0, 1.0))
    assert interval.low < 0.85 and interval.high == 1
    assert bootstrap.effective_units("macro_f1", labels, labels) == pytest.approx(39.6)
    assert bootstrap.effective_units("accuracy", labels, labels) == 1000


def test_large_splits_have_fewer_resamples():
    def count(units):
        return len(bootstrap.weighted(lambda weights: weights[:, 0], units))

    assert count(10) == bootstrap.RESAMPLES and count(40_000) == 500


ALL = sorted(ranking.METRICS) + sorted({n for names in metrics.METRICS.values() for n in names})
BOUNDED = [name for name in ALL if bootstrap.bounds(name)]


@pytest.mark.parametrize("name", BOUNDED)
def test_no_interval_collapses(name):
    low, high = bootstrap.bounds(name)
    span = high - low
    for value in (low, (low + high) / 2, high):
        interval = bootstrap.interval(value, np.full(1000, value), 80, (low, high))
        assert low <= interval.low <= value <= interval.high <= high
        assert 0.01 < (interval.high - interval.low) / span < 0.06
    limits = bootstrap.bounds_of_difference((low, high))
    equal = bootstrap.interval(0.0, np.zeros(1000), 80, limits)
    assert equal.low < -0.01 * span and equal.high > 0.01 * span


@pytest.mark.parametrize("name", ALL)
def test_each_metric_has_bounds_or_is_an_error(name):
    """Errors, and the coefficient of determination, have no worst value."""
    assert (name in BOUNDED) != (metrics.lowest_is_best(name) or name == "r2")


def test_bounds_ignore_cutoffs_and_registered_metrics():
    assert bootstrap.bounds("mrr(rel=2)@10") == (0, 1)
    assert bootstrap.bounds("my_metric") is None
    assert bootstrap.bounds_of_difference(None) is None


def test_equal_values_without_bounds_have_no_interval():
    interval = bootstrap.interval(7.0, np.full(1000, 7.0), 1, None)
    assert interval.value == 7 and not interval.exists
    assert bootstrap.interval(7.0, np.linspace(6, 8, 1000), 9, None).exists


def test_blocks_of_resamples_equal_the_whole(monkeypatch):
    monkeypatch.setattr(bootstrap, "_BLOCK", 7 * 30)
    blocks = bootstrap.weighted(lambda weights: weights.sum(axis=1), 30)
    np.testing.assert_allclose(blocks, bootstrap.weights(30).sum(axis=1), rtol=1e-6)


def test_the_interval_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    means = resampled_metrics.mean(bootstrap.weights(400, resamples=4000), values)
    interval = bootstrap.interval(values.mean(), means, 400, None)
    error = values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
