"""Searches of an evaluation: metrics against a loop over all pairs, files, sparse vectors."""

import json
import math

import numpy as np
import pytest

from gemma_encoder.evaluation import vector_search
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template

QUERIES, DOCUMENTS = 13, 60
TEMPLATES = (("query", Template("Q: {query}")), ("document", Template("D: {document}")))
METRICS = ("ndcg@10", "mrr@10", "recall@100", "map")


def searched(kind="retrieval", seed=0):
    """Returns predictions of random vectors, and the judgments as {query: {document: grade}}."""
    rng = np.random.default_rng(seed)
    table = ExampleTable()
    for query in range(QUERIES):
        table.add(Example({"query": f"query {query}"}, 0.0, f"q{query}", role="query"))
    for document in range(DOCUMENTS):
        example = Example({"document": f"text {document}"}, 0.0, document_id=f"d{document}")
        table.add(example._replace(role="document"))
    grades = {
        f"q{query}": {f"d{d}": int(rng.integers(0, 3)) for d in rng.permutation(DOCUMENTS)[:4]}
        for query in range(QUERIES)
    }
    grades["q0"]["not in the collection"] = 1
    outputs = rng.normal(size=(QUERIES + DOCUMENTS, 16)).astype(np.float32)
    if kind == "sparse_retrieval":
        words = np.stack([rng.permutation(30)[:8] for _ in outputs])
        outputs = np.concatenate([np.abs(outputs[:, :8]), words], axis=1).astype(np.float32)
    task = Task("find", kind, TEMPLATES[1][1], METRICS, role_templates=TEMPLATES)
    return Predictions(task, "validation", outputs, table=table, qrels=grades)


def dense(predictions):
    """Returns the vectors [N, E] of dense or sparse outputs."""
    sparse = predictions.task.kind.word_weights(predictions.outputs)
    if sparse is None:
        return predictions.outputs
    vectors = np.zeros((len(predictions.outputs), 30), np.float32)
    for row, (weights, words) in enumerate(zip(*sparse, strict=True)):
        vectors[row, words] = weights
    return vectors


def naive_metrics(predictions):
    """Computes the metrics by sorting all documents of each query."""
    vectors = dense(predictions).astype(np.float64)
    totals = dict.fromkeys(METRICS, 0.0)
    for query in range(QUERIES):
        grades = predictions.qrels[f"q{query}"]
        scores = vectors[QUERIES:] @ vectors[query]
        order = [f"d{document}" for document in np.argsort(-scores, kind="stable")]
        gains = [grades.get(name, 0) for name in order]
        ideal = sorted(grades.values(), reverse=True)

        def dcg(values):
            return sum(g / math.log2(rank + 2) for rank, g in enumerate(values[:10]))

        relevant = sum(grade > 0 for grade in grades.values())
        ranks = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
        totals["ndcg@10"] += dcg(gains) / dcg(ideal) if relevant else 0.0
        totals["mrr@10"] += 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0
        if relevant:
            totals["recall@100"] += sum(rank <= 100 for rank in ranks) / relevant
            totals["map"] += sum(n / rank for n, rank in enumerate(ranks, 1)) / relevant
    return {name: total / QUERIES for name, total in totals.items()}


@pytest.mark.parametrize("kind", ["retrieval", "sparse_retrieval"])
@pytest.mark.parametrize("depth", [12, 1000])
def test_metrics_equal_those_of_a_loop(monkeypatch, kind, depth):
    monkeypatch.setattr(vector_search, "DEPTH", max(depth, 10))
    monkeypatch.setattr(vector_search, "QUERIES_AT_ONCE", 5)
    predictions = searched(kind)
    expected = naive_metrics(predictions)
    metrics = predictions.metrics()
    for name in METRICS if depth >= 100 else METRICS[:2]:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-9), name
    assert 0 < metrics["ndcg@10"] < 1


def test_nearest_returns_the_highest_products():
    rng = np.random.default_rng(1)
    queries, documents = rng.normal(size=(7, 4)), rng.normal(size=(30, 4))
    best, scores = vector_search.nearest(queries, documents, 6)
    products = queries @ documents.T
    for query in range(7):
        assert set(best[query]) == set(np.argsort(-products[query])[:6])
        np.testing.assert_allclose(scores[query], products[query, best[query]])
    assert vector_search.nearest(queries, documents, 99)[0].shape == (7, 30)


@pytest.mark.parametrize("kind", ["retrieval", "sparse_retrieval"])
def test_first_results_are_the_first_of_the_run(kind):
    predictions = searched(kind)
    vectors = dense(predictions)
    results = vector_search.first_results(
        predictions.task.kind, predictions.table, predictions.outputs, 3
    )
    assert [query for query, _ in results] == [0, 1, 2]
    for query, document in results:
        assert document - QUERIES == np.argmax(vectors[QUERIES:] @ vectors[query])


def test_files_of_a_search_are_read_back(tmp_path):
    predictions = searched()
    path = predictions.write(tmp_path)
    assert path.name == "find.validation.trec"
    lines = [line.split() for line in path.read_text().splitlines()]
    assert len(lines) == QUERIES * DOCUMENTS and lines[0][0] == "q0"
    products = dense(predictions)
    best = {line[0]: line[2] for line in reversed(lines)}
    for query in range(QUERIES):
        top = np.argmax(products[QUERIES:] @ products[query])
        assert best[f"q{query}"] == f"d{top}"
    queries = (tmp_path / "find.validation.queries.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in queries] == [
        {"query": f"q{query}", "text": f"query {query}"} for query in range(QUERIES)
    ]
    qrels = (tmp_path / "find.validation.qrels").read_text().splitlines()
    assert len(qrels) == 4 * QUERIES + 1
    assert not (tmp_path / "find.validation.first_stage.trec").exists()
