"""Metrics of many resamples at once equal those of each resample."""

import numpy as np
import pytest

from gemma_encoder.evaluation import bootstrap, metrics, resampled_metrics
from gemma_encoder.inputs.task import ExampleTable

KINDS = {
    name: kind
    for kind in ("classification", "ordinal", "regression")
    for name in metrics.METRICS[kind]
    if name in resampled_metrics.METRICS
}


@pytest.mark.parametrize("name", sorted(resampled_metrics.METRICS))
@pytest.mark.parametrize("classes", [2, 3])
def test_resampled_metrics_equal_those_of_the_drawn_examples(name, classes):
    rng = np.random.default_rng(classes)
    if KINDS[name] in ("classification", "ordinal"):
        if name in ("f1", "f1a"):
            classes = 2
        labels = rng.integers(0, classes, 40)
        predictions = np.where(rng.random(40) < 0.6, labels, rng.integers(0, classes, 40))
    else:  # many ties in labels and predictions
        labels = rng.integers(0, 6, 40) / 2
        predictions = np.round(labels + rng.normal(0, 1, 40), 1)
    metric = metrics.METRICS[KINDS[name]][name]
    rng = np.random.default_rng(3)
    counts = np.stack([np.bincount(rng.integers(0, 40, 40), minlength=40) for _ in range(20)])
    actual = resampled_metrics.METRICS[name](counts, labels, predictions)
    expected = bootstrap.resampled(
        lambda drawn: metric(labels[drawn], predictions[drawn], ExampleTable()),
        40,
        seed=3,
        resamples=20,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["matthews_correlation", "pearson", "spearman", "f1", "quadratic_weighted_kappa"]
)
def test_constant_predictions_score_zero(name):
    labels = np.array([0, 1, 0, 1, 1])
    weights = bootstrap.weights(5, resamples=10)
    values = resampled_metrics.METRICS[name](weights, labels, np.zeros(5, int))
    assert (values == 0).all()


@pytest.mark.parametrize("name", ["macro_f1", "matthews_correlation"])
def test_thousands_of_classes_fit_in_memory(name):
    labels = np.arange(4000) % 2000
    predictions = np.where(np.arange(4000) % 3, labels, 0)
    weights = np.ones((2, 4000), np.float32)
    expected = metrics.METRICS["classification"][name](labels, predictions, ExampleTable())
    actual = resampled_metrics.METRICS[name](weights, labels, predictions)
    np.testing.assert_allclose(actual, expected)
