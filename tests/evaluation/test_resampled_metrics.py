"""Metrics of many resamples at once are those of each resample, and the bootstrap's interval is the known one."""

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
def test_every_resample_has_the_metric_of_the_examples_drawn(name, classes):
    rng = np.random.default_rng(classes)
    if KINDS[name] == "classification":
        if name in ("f1", "f1a"):
            classes = 2
        labels = rng.integers(0, classes, 40)
        said = np.where(rng.random(40) < 0.6, labels, rng.integers(0, classes, 40))
    else:  # many ties on both sides
        labels = rng.integers(0, 6, 40) / 2
        said = np.round(labels + rng.normal(0, 1, 40), 1)
    found = resampled_metrics.METRICS[name](
        bootstrap.counts(40, seed=3, resamples=20), labels, said
    )
    expected = bootstrap.resampled(
        lambda chosen: metrics.METRICS[KINDS[name]][name](
            labels[chosen], said[chosen], ExampleTable()
        ),
        40,
        seed=3,
        resamples=20,
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["matthews_correlation", "pearson", "spearman", "f1"])
def test_a_constant_answer_is_worth_nothing(name):
    labels = np.array([0, 1, 0, 1, 1])
    assert (
        resampled_metrics.METRICS[name](bootstrap.counts(5, resamples=10), labels, np.zeros(5, int))
        == 0
    ).all()


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = bootstrap.percentile_interval(
        values.mean(), resampled_metrics.mean(bootstrap.counts(400, resamples=4000), values)
    )
    error = values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
