"""Metrics of many resamples equal those of each resample; the bootstrap interval is correct."""

import numpy as np
import pytest

from gemma_encoder.evaluation import bootstrap, metrics, resampled_metrics
from gemma_encoder.inputs.task import ExampleTable

KINDS = {
    name: kind
    for kind in ("classification", "regression")
    for name in metrics.METRICS[kind]
    if name in resampled_metrics.METRICS
}


@pytest.mark.parametrize("name", sorted(resampled_metrics.METRICS))
@pytest.mark.parametrize("classes", [2, 3])
def test_resampled_metrics_equal_those_of_the_drawn_examples(name, classes):
    rng = np.random.default_rng(classes)
    if KINDS[name] == "classification":
        if name in ("f1", "f1a"):
            classes = 2
        labels = rng.integers(0, classes, 40)
        predictions = np.where(rng.random(40) < 0.6, labels, rng.integers(0, classes, 40))
    else:  # many ties in labels and predictions
        labels = rng.integers(0, 6, 40) / 2
        predictions = np.round(labels + rng.normal(0, 1, 40), 1)
    metric = metrics.METRICS[KINDS[name]][name]
    counts = bootstrap.counts(40, seed=3, resamples=20)
    actual = resampled_metrics.METRICS[name](counts, labels, predictions)
    expected = bootstrap.resampled(
        lambda drawn: metric(labels[drawn], predictions[drawn], ExampleTable()),
        40,
        seed=3,
        resamples=20,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["matthews_correlation", "pearson", "spearman", "f1"])
def test_constant_predictions_score_zero(name):
    labels = np.array([0, 1, 0, 1, 1])
    counts = bootstrap.counts(5, resamples=10)
    values = resampled_metrics.METRICS[name](counts, labels, np.zeros(5, int))
    assert (values == 0).all()


def test_the_interval_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    means = resampled_metrics.mean(bootstrap.counts(400, resamples=4000), values)
    interval = bootstrap.percentile_interval(values.mean(), means)
    error = values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
