"""A checkpoint evaluated by mteb, on data in memory."""

import importlib.util
import sys
import types

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval.mteb_model import MtebModel
from tests.retrieval.conftest import WEIGHTS, roles, texts

HAS_MTEB = importlib.util.find_spec("mteb") is not None
DOCUMENTS = texts(40)
QUERIES = texts(12, seed=1, words=2)
TITLED = roles(document="{title} : {text}")


@pytest.fixture
def meta(monkeypatch):
    """A stand-in for mteb's description of a model, where mteb is not installed."""
    if HAS_MTEB:
        return
    create_empty = lambda overwrites: types.SimpleNamespace(**overwrites)  # noqa: E731
    models = types.ModuleType("mteb.models")
    models.ModelMeta = types.SimpleNamespace(create_empty=create_empty)
    package = types.ModuleType("mteb")
    package.__spec__ = importlib.machinery.ModuleSpec("mteb", None)
    monkeypatch.setitem(sys.modules, "mteb", package)
    monkeypatch.setitem(sys.modules, "mteb.models", models)


def batches(texts, size=5, **columns):
    columns = {"text": texts, **columns}
    return [
        {name: values[start : start + size] for name, values in columns.items()}
        for start in range(0, len(texts), size)
    ]


def role(name):
    return types.SimpleNamespace(value=name)


def test_texts_are_formatted_by_role(dense, meta):
    model = MtebModel(dense)
    for name in ("query", "document"):
        expected = dense.embed(QUERIES, role=name)
        actual = model.encode(batches(QUERIES), prompt_type=role(name))
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(model.encode(batches(QUERIES)), dense.embed(QUERIES))
    assert model.mteb_model_meta.embed_dim == dense.spec.encoder.pooled_dim


def test_documents_fill_title_and_text(searcher, meta):
    predictor = searcher(tasks=(TITLED,))
    titles = [f"title {index}" for index in range(len(DOCUMENTS))]
    joined = [f"{title} {text}" for title, text in zip(titles, DOCUMENTS, strict=True)]
    actual = MtebModel(predictor).encode(
        batches(joined, title=titles, body=DOCUMENTS), prompt_type=role("document")
    )
    fields = [{"title": title, "text": text} for title, text in zip(titles, DOCUMENTS, strict=True)]
    np.testing.assert_array_equal(actual, predictor.embed(fields, "find", role="document"))


def test_similarities_are_those_of_training(searcher, meta):
    """Cosines of normalized vectors, also of their first dimensions; else dot products."""
    predictor = searcher(normalize=False, tasks=(retrieval_task(),))
    model = MtebModel(predictor)
    vectors = model.encode(batches(QUERIES))
    products = vectors @ vectors.T
    np.testing.assert_array_equal(model.similarity(vectors[:3], vectors), products[:3])
    pairs = model.similarity_pairwise(vectors, vectors)
    np.testing.assert_allclose(pairs, np.diag(products), rtol=1e-5)
    assert np.abs(np.diag(products) - 1).max() > 0.1
    short = MtebModel(searcher(), width=8)
    vectors = short.encode(batches(QUERIES))
    assert vectors.shape == (len(QUERIES), 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.diag(short.similarity(3 * vectors, vectors)), 1, rtol=1e-5)


def retrieval_task():
    task = roles()
    return ge.Task(
        "find", "retrieval", task.template, head="find", role_templates=task.role_templates
    )


def test_results_are_those_of_one_state_of_a_model(searcher, meta):
    """The revision, by which mteb looks up cached results, differs by parameters."""
    first, other = (MtebModel(searcher(seed=seed)).mteb_model_meta for seed in (0, 1))
    assert first.revision == MtebModel(searcher()).mteb_model_meta.revision != other.revision
    assert not set(" /,") & set(first.revision)
    named = MtebModel(searcher(), "mine", name="r").mteb_model_meta
    assert (named.name, named.revision) == ("gemma_encoder/r", "mine")


def test_models_that_mteb_would_compare_wrongly_are_refused(searcher, sparse, meta, monkeypatch):
    with pytest.raises(InputError, match="width=9999: the model's vectors have"):
        MtebModel(searcher(), width=9999)
    assert sparse.spec.encoder.heads["find"].outputs == 2 * WEIGHTS
    with pytest.raises(InputError, match="task 'find' has sparse vectors: evaluate them by"):
        MtebModel(sparse)
    monkeypatch.setattr("gemma_encoder.retrieval.mteb_model.similarity_name", lambda spec: "x")
    with pytest.raises(InputError, match="similarity 'x'; expected cosine or dot"):
        MtebModel(searcher())


def test_without_mteb_one_line_says_what_to_install(dense, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'gemma_encoder\[mteb\]'"):
        MtebModel(dense)


@pytest.mark.skipif(not HAS_MTEB, reason="needs mteb: pip install 'gemma_encoder[mteb]'")
def test_a_retrieval_task_of_mteb_gives_our_figures(searcher):
    """The metrics equal those of ir-measures on the ranking of our own vectors."""
    import ir_measures
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    relevant = {f"q{index}": {f"p{3 * index}": 1} for index in range(len(QUERIES))}
    documents = {
        f"p{index}": {"title": f"title {index}", "text": text}
        for index, text in enumerate(DOCUMENTS)
    }

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="Documents in memory.",
            type="Retrieval",
            dataset={"path": "local/local", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **options):
            self.queries = {"test": {f"q{index}": text for index, text in enumerate(QUERIES)}}
            self.corpus = {"test": documents}
            self.relevant_docs = {"test": relevant}
            self.data_loaded = True

    predictor = searcher(tasks=(TITLED,))
    result = mteb.evaluate(
        MtebModel(predictor), LocalRetrieval(), cache=None, show_progress_bar=False
    )
    (scores,) = result.task_results[0].scores["test"]
    queries = predictor.embed(QUERIES, role="query")
    vectors = predictor.embed(list(documents.values()), "find", role="document")
    run = {
        f"q{query}": {f"p{index}": float(score) for index, score in enumerate(row)}
        for query, row in enumerate(queries @ vectors.T)
    }
    measures = {
        "ndcg_at_10": ir_measures.nDCG @ 10,
        "recall_at_20": ir_measures.R @ 20,
        "mrr_at_10": ir_measures.RR @ 10,
    }
    expected = ir_measures.calc_aggregate(list(measures.values()), relevant, run)
    for name, measure in measures.items():
        assert scores[name] == pytest.approx(expected[measure], abs=1e-5), name
    assert 0 < scores["ndcg_at_10"] < 1
