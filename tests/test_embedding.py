"""Embedder: templates of roles, prompts, sparse vectors, misuse in one line."""

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import embedding
from gemma_encoder.inputs.errors import InputError
from tests.retrieval import conftest
from tests.retrieval.conftest import roles

searcher, dense, sparse = conftest.searcher, conftest.dense, conftest.sparse


def test_a_role_selects_the_template(dense):
    texts = ["a river", "stone"]
    bare = dense.embed([f"query: {text}" for text in texts])
    np.testing.assert_allclose(dense.embed(texts, role="query"), bare, atol=1e-6)
    np.testing.assert_allclose(dense.embed(texts, "find", role="query"), bare, atol=1e-6)
    assert not np.allclose(dense.embed(texts, role="document"), bare)
    np.testing.assert_allclose(dense.embed(texts, prompt="query: "), bare, atol=1e-6)
    braces = dense.embed(texts, prompt="{x} ")
    np.testing.assert_allclose(braces, dense.embed(["{x} a river", "{x} stone"]), atol=1e-6)


def test_titles_are_fields_of_the_template(searcher):
    titled = searcher(tasks=(roles("{title} | {text}"),))
    expected = titled.embed(["document: moon | a stone"])
    for text in ({"title": "moon", "text": "a stone"}, ("moon", "a stone")):
        np.testing.assert_allclose(titled.embed([text], role="document"), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"f:1: task 'find' needs 2 fields .* for a document, got"):
        titled.embed(["moon"], role="document", names=["f:1"])


def test_sparse_vectors_are_the_head_scores(sparse):
    ids, weights = sparse.embed_sparse(["a river", "stone"], role="query")
    assert ids.shape == weights.shape == (2, conftest.WEIGHTS)
    assert ids.dtype == np.int32 and (np.diff(weights, axis=1) <= 0).all()
    pooled = sparse.embed(["a river", "stone"], role="query")
    table = np.asarray(sparse.parameters["backbone"]["embedding"])
    dots = np.maximum(pooled @ table.T, 0)
    np.testing.assert_allclose(np.take_along_axis(dots, ids, axis=1), weights, atol=1e-5)


def test_words_are_the_tokens_of_the_largest_weights(sparse):
    texts = ["a river", "stone"]
    ids, weights = sparse.embed_sparse(texts, role="query")
    words = sparse.words(texts, role="query", count=3)
    for row, of_text in enumerate(words):
        positive = weights[row, :3] > 0
        pieces = sparse.spec.tokenizer.pieces(ids[row, :3][positive])
        assert of_text == list(zip(pieces, weights[row, :3][positive].tolist(), strict=True))


def test_misuse_of_roles_is_refused_in_one_line(searcher, dense, random_predictor):
    two = searcher(tasks=(roles(), roles(name="seek")))
    cases = [
        (lambda: dense.embed(["x"], role="answer"), "unknown role 'answer'.*document, query"),
        (
            lambda: random_predictor().embed(["x"], role="query"),
            "role 'query' needs a task with templates",
        ),
        (
            lambda: random_predictor().embed(["x"], "toy_sentiment", role="query"),
            "task 'toy_sentiment' has no template for role 'query'",
        ),
        (lambda: two.embed(["x"], role="query"), r"name a task: .*'query' \(find, seek\)"),
        (lambda: dense.embed_sparse(["x"], role="query"), "task 'find' has no head of kind"),
        (lambda: dense.embed_sparse(["x"]), "the checkpoint has no head of kind 'sparse'"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert two.embed(["x"], "seek", role="query").shape == (1, 32)


def test_the_only_retrieval_task_is_preferred():
    plain = ge.Task("plain", "ranking", ge.Template("{text}"))
    assert embedding.task_with_roles([plain]) is None
    assert embedding.task_with_roles([plain, roles()]).name == "find"
