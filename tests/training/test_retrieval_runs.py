"""Runs of retrieval tasks: training, other collections, own files, prediction, the report."""

import json

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.cli import summary
from gemma_encoder.inference import refuse_vectors
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.predict_file import predict_file
from gemma_encoder.report import render_report
from gemma_encoder.training import loop
from tests.data.retrieval_files import DOCUMENTS, QUERIES, write_beir, write_msmarco
from tests.micro import SMALL, micro_config

MICRO = {
    "tasks": ("msmarco_retrieval",),
    "evaluate_every": "2 steps",
    "max_train_examples": 0,
    "max_eval_examples": 0,
    "model__pooling__normalize": True,
    "retrieval__negatives": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder in MS MARCO's layout beside one in BEIR's, and its result."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_msmarco(folder)
    write_beir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSMARCO_DIR", str(folder))
        patch.setenv("BEIR_DIR", str(folder))
        yield folder, loop.train(micro_config(**MICRO), folder / "run")


def test_training_evaluates_a_search(trained):
    folder, result = trained
    metrics = result.metrics["msmarco_retrieval"]
    assert set(metrics) == {"ndcg@10", "mrr@10", "recall@100"}
    assert metrics["recall@100"] == 1.0 and 0 < metrics["mrr@10"] < 1  # of 40 documents
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if any("ndcg@10" in name for name in str(line).split("'"))]
    assert len(evaluated) == 2  # at steps 2 and 4
    run = (folder / "run/predictions/msmarco_retrieval.validation.trec").read_text().splitlines()
    assert len(run) == QUERIES * DOCUMENTS


def test_another_collection_is_searched_zero_shot(trained):
    folder, _ = trained
    changes = {"tasks": ("beir_scifact_retrieval",), "evaluate_split": "test"}
    result = loop.evaluate(micro_config(**MICRO | changes), folder / "run")
    metrics = result.metrics["beir_scifact_retrieval"]
    assert all(0 < value <= 1 for value in metrics.values()) and len(metrics) == 3
    (predictions,) = result.predictions["beir_scifact_retrieval"]
    predictor = ge.Predictor.load(folder / "run")
    vectors = predictor.embed(
        [fields["query"] for fields in predictions.table.fields[:QUERIES]],
        "msmarco_retrieval",
        role="query",
    )
    np.testing.assert_allclose(vectors, predictions.outputs[:QUERIES], atol=1e-5)


def test_predict_points_to_the_index(trained, tmp_path):
    folder, _ = trained
    predictor = ge.Predictor.load(folder / "run")
    message = r"is for searching: index documents with gemma-encoder index, or use Predictor.embed"
    with pytest.raises(InputError, match=message):
        predictor.predict(["a text"])
    with pytest.raises(InputError, match=message):
        refuse_vectors(predictor.task())
    (tmp_path / "texts.txt").write_text("a text\n")
    with pytest.raises(InputError, match=message) as error:
        predict_file(predictor, predictor.task(), tmp_path / "texts.txt", tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)


def test_the_report_and_the_summary_show_a_search(trained):
    folder, result = trained
    page = render_report([folder / "run"])
    assert "msmarco_retrieval" in page and "recall@100" in page
    text = summary._summary(result, "validation")
    assert "  query dev0  ->  document " in text and "dimensions" not in text
    assert f"index --model={folder}/run --collection=collection.tsv --output=INDEX" in text


@pytest.mark.parametrize("representation", ["dense", "sparse"])
def test_rows_in_memory_train_a_retriever(tmp_path, representation):
    rows = [
        {
            "query": f"query {i}",
            "positives": [f"answer {i}"],
            "negatives": [f"other {i}"],
            "scores": [2.5, 0.25],
        }
        for i in range(24)
    ]
    overrides = {
        "train_for": "2 steps",
        "model.size": "gemma2_tiny",
        "model.transformer": SMALL,
        "retrieval.representation": representation,
        "model.pooling.normalize": representation == "dense",
        "losses": {"retrieval": "kl", "sparse_retrieval": "kl"},
        "batch.rows": 8,
    }
    predictor = ge.fine_tune(
        "retrieval,smoke", train=rows, workdir=tmp_path / "run", overrides=overrides
    )
    assert predictor.task().kind.embeds
    assert predictor.spec.encoder.pooling.normalize == (representation == "dense")
    with pytest.raises(InputError, match="name the kind, 'retrieval', in place of a task"):
        task = ge.Task("a", "retrieval", ge.Template("{document}"))
        ge.fine_tune(task, train=rows, workdir=tmp_path / "other")


def test_without_data_retrieval_is_the_config(tmp_path, monkeypatch):
    monkeypatch.delenv("MSMARCO_DIR", raising=False)
    with pytest.raises(InputError, match="MSMARCO_DIR is not set"):
        ge.fine_tune("retrieval", workdir=tmp_path / "run")
