"""Searching for the queries of a file: runs that every reader accepts, and metrics by hand."""

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.evaluation.ranking import compute_ranking_metrics
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval import search_file as module
from gemma_encoder.retrieval.collection import open_collection, open_queries
from gemma_encoder.retrieval.search_file import search_file
from tests.retrieval.conftest import texts


@pytest.fixture
def index(dense, collection, tmp_path):
    return ge.Index.build(dense, collection(60), tmp_path / "INDEX", block=32)


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    lines = [f'{{"_id": "q {i}", "text": "{text}"}}\n' for i, text in enumerate(texts(12, 1, 3))]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".trec", ".tsv"])
def test_a_run_is_read_as_the_search_has_it(index, queries, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 5)
    output = tmp_path / f"run{suffix}"
    assert search_file([index], queries, output, 7) == (12, {}, {})
    corpus = open_queries(queries)
    candidates = Candidates(output, corpus, open_collection(tmp_path / "collection.tsv"))
    expected = index.search([corpus.text(i) for i in range(12)], k=7)
    for query, results in enumerate(expected):
        assert [f"p{i}" for i in candidates.of(query)] == [name for name, _ in results]


def test_metrics_are_those_of_the_written_run(index, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 5)
    qrels = tmp_path / "qrels.tsv"
    # The last query has no judgment; q 10's document is not among the results of 40.
    rows = [(f"q {i}", f"p{(7 * i) % 60}", 1 + i % 2) for i in range(11)]
    table = "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in rows)
    qrels.write_text(f"query-id\tcorpus-id\tscore\n{table}")
    count, metrics, _ = search_file([index], queries, tmp_path / "run.trec", 40, qrels=qrels)
    corpus = open_queries(queries)
    results = index.search([corpus.text(i) for i in range(12)], k=40)
    run = {f"q {i}": ranking for i, ranking in enumerate(results)}
    grades = {query: {document: grade} for query, document, grade in rows}
    expected = compute_ranking_metrics(module.METRICS, grades, run)
    assert count == 12
    assert {name: value.value for name, value in metrics.items()} == pytest.approx(expected)
    assert all(low <= value <= high for value, low, high in metrics.values())


def test_misuse_of_files_is_refused_in_one_line(index, queries, tmp_path):
    empty = tmp_path / "empty.tsv"
    empty.write_text("q1\t \n")
    strange = tmp_path / "strange.tsv"
    strange.write_text("q 1\t0\tp1\t1\n")
    other = tmp_path / "queries.parquet"
    other.write_text("x")
    output = tmp_path / "run.trec"
    cases = [
        ((queries, tmp_path / "run.csv", 5), {}, r"expected a file that ends in .trec, .tsv"),
        ((empty, output, 5), {}, "empty.tsv:1: expected 2 tab-separated columns, none empty"),
        ((other, output, 5), {}, "expected a .tsv file with an id and a text a line"),
        ((tmp_path / "no.tsv", output, 5), {}, "--queries=.*no.tsv: there is no such file"),
        ((queries, output, 5), {"qrels": tmp_path / "no"}, "--qrels=.*no: there is no such file"),
        ((queries, output, 5), {"qrels": empty}, "empty.tsv:1"),
        ((queries, tmp_path / "queries.jsonl" / "x.trec", 5), {}, "cannot be written"),
    ]
    for words, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            search_file([index], *words, **options)
        assert "\n" not in str(caught.value) and not output.exists()


def test_documents_of_the_index_serve_as_a_collection_for_qrels(index, queries, tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("q%200 0 p3 2\nq%201 0 absent 1\n")
    grades = module._grades(path, open_queries(queries), index)
    assert grades == {"q 0": {"p3": 2}, "q 1": {"absent": 1}}
    corpus = open_collection(tmp_path / "collection.tsv")
    assert Qrels(path, open_queries(queries), corpus).by_id(np.arange(12)) == grades


def test_a_baseline_is_compared_query_by_query(index, queries, tmp_path):
    qrels = tmp_path / "qrels.tsv"
    rows = [f"q {i}\tp{(7 * i) % 60}\t1\n" for i in range(12)]
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    first = tmp_path / "first.trec"
    alone = search_file([index], queries, first, 40, qrels=qrels)
    again = search_file([index], queries, tmp_path / "again.trec", 40, qrels=qrels, baseline=first)
    for interval in again.differences.values():
        assert interval.value == 0
        assert interval.low <= 0 <= interval.high
    best = tmp_path / "best.trec"
    best.write_text("".join(f"q%20{i} Q0 p{(7 * i) % 60} 1 1.0 t\n" for i in range(12)))
    less = search_file([index], queries, tmp_path / "less.trec", 40, qrels=qrels, baseline=best)
    for name, interval in less.differences.items():
        assert interval.value == pytest.approx(alone.metrics[name].value - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("x Q0 p1 1 1.0 t\n", "none of the judged queries"), ("x p1 1\n", "is no TREC run")],
)
def test_an_unusable_baseline_is_refused(index, queries, tmp_path, text, message):
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("q 1\t0\tp1\t1\n")
    baseline = tmp_path / "run.trec"
    baseline.write_text(text)
    with pytest.raises(InputError, match=message):
        search_file([index], queries, tmp_path / "o.trec", 3, qrels=qrels, baseline=baseline)
    with pytest.raises(InputError, match="needs --qrels"):
        search_file([index], queries, tmp_path / "o.trec", 3, baseline=baseline)
