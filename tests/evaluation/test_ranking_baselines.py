"""Expected metrics of a random order equal the mean over all orders, or over many."""

import itertools

import numpy as np
import pytest

from gemma_encoder.evaluation import ranking
from gemma_encoder.evaluation.ranking_baselines import EXPECTED, random_order

METRICS = (*ranking.METRICS, "mrr(rel=2)@10", "map(rel=2)", "recall(rel=2)@100")
# Graded and unjudged candidates; a relevant document that is not a candidate; no relevant document
# among the candidates, or at all; no candidate; a single candidate; a grade below 0.
QRELS = {
    "graded": {"a": 2, "b": 1, "c": 0, "missed": 3},
    "missed": {"missed": 1, "a": 0},
    "nothing": {"a": 0},
    "absent": {"a": 1},
    "single": {"a": 1},
    "spam": {"a": -2, "b": 1},
}
CANDIDATES = {
    "graded": ["a", "b", "c", "d", "e"],
    "missed": ["a", "b"],
    "nothing": ["a", "b"],
    "single": ["a"],
    "spam": ["a", "b", "c"],
    "unjudged": ["a", "b"],
}


def mean_over_orders(metric, qrels, orders):
    values = [
        ranking.compute_ranking_metrics([metric], qrels, {query: run})[metric]
        for query, runs in orders.items()
        for run in runs
    ]
    return np.mean(values)


def as_run(order):
    return [(document, -float(rank)) for rank, document in enumerate(order)]


@pytest.mark.parametrize("metric", METRICS)
def test_the_expectation_is_the_mean_over_all_orders(metric):
    values = []
    for query in QRELS:
        qrels = {query: QRELS[query]}
        orders = map(as_run, itertools.permutations(CANDIDATES.get(query, ())))
        values.append(mean_over_orders(metric, qrels, {query: orders}))
    expected = random_order([metric], QRELS, CANDIDATES)
    assert expected[metric] == pytest.approx(np.mean(values), abs=1e-6)  # float32 of pytrec_eval


@pytest.mark.parametrize("metric", METRICS)
def test_the_expectation_of_long_lists_counts_cutoffs(metric):
    """130 candidates, 12 of them relevant, in 400 random orders; errors of about a tenth."""
    rng = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(130)]
    qrels = {"q": {document: i % 3 + 1 for i, document in enumerate(documents[:12])}}
    orders = (as_run(rng.permutation(documents).tolist()) for _ in range(400))
    sampled = mean_over_orders(metric, qrels, {"q": orders})
    expected = random_order([metric], qrels, {"q": documents})[metric]
    assert expected == pytest.approx(sampled, rel=0.15)


def test_each_ranking_metric_has_an_expectation():
    assert set(EXPECTED) == set(ranking.METRICS)


def test_without_judgments_nothing_is_expected():
    assert random_order(METRICS, {}, CANDIDATES) == {}
