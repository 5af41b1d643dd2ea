"""The bag of embeddings: its checkpoint starts a retriever that equals it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.data.retrieval import retrieval_task
from gemma_encoder.data.source import DataOptions
from gemma_encoder.evaluation.ranking import Run
from gemma_encoder.experiments.pretraining import bag_of_embeddings as bag
from gemma_encoder.inputs.tokenizer import Tokenizer

SIZE = "gemma3_tiny"
WIDTH = 128 - bag.CONSTANT


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("small")


@pytest.fixture(scope="module")
def parameters(tokenizer):
    rng = np.random.default_rng(0)
    return {
        "vectors": jnp.asarray(rng.normal(size=(tokenizer.vocab_size, WIDTH)), jnp.float32),
        "weights": jnp.asarray(rng.normal(size=tokenizer.vocab_size), jnp.float32),
    }


def token_ids(tokenizer, texts, role="query"):
    return bag.tokens_of(texts, retrieval_task("t", DataOptions()), role, tokenizer)


def test_a_vector_is_the_weighted_sum_of_length_one(tokenizer, parameters):
    tokens = token_ids(tokenizer, ["red box", "a much longer text with many words"])
    vectors = np.asarray(bag.embed(parameters, tokens))
    for row, ids in zip(vectors, tokens, strict=True):
        ids = ids[ids > 0]
        weights = np.log1p(np.exp(np.asarray(parameters["weights"])[ids]))
        expected = weights @ np.asarray(parameters["vectors"])[ids]
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-5)


def test_the_transformer_starts_as_the_bag(monkeypatch, tokenizer, parameters):
    """Without its layers, the mean of states points where the bag's vector does, nearly."""
    monkeypatch.setattr(bag, "LAYERS", 0.0)
    backbone = bag.start_of(parameters, SIZE, seed=0)
    tokens = token_ids(tokenizer, ["a red box of silk and two cups of tea"])
    ones = np.ones_like(tokens)
    hidden = np.asarray(backbone(tokens, ones, np.arange(tokens.shape[1])[None]))[0].mean(axis=0)
    assert not np.any(hidden[-bag.CONSTANT :])
    vector = np.asarray(bag.embed(parameters, tokens))[0]
    cosine = hidden[:WIDTH] @ vector / np.linalg.norm(hidden)
    # RMSNorm shortens heavy tokens by the root of 1 + length² / 1.
    assert cosine > 0.98


def test_sparse_logits_have_a_negative_bias(monkeypatch, tokenizer, parameters):
    monkeypatch.setattr(bag, "LAYERS", 0.0)
    backbone = bag.start_of(parameters, SIZE, seed=0, is_sparse=True)
    tokens = token_ids(tokenizer, ["red box"])
    ones = np.ones_like(tokens)
    hidden = np.asarray(backbone(tokens, ones, np.arange(tokens.shape[1])[None]))[0]
    logits = hidden @ np.asarray(backbone.embedding[...]).T
    assert (logits < 0).mean() > 0.7
    # Rows of no token have the bias alone.
    assert np.all(logits[:, tokenizer.vocab_size :] < 0)


def test_training_finds_pairs_that_share_a_token(tokenizer, parameters, monkeypatch):
    monkeypatch.setattr(bag, "PAIRS", 8)
    words = ["river", "stone", "paper", "glass", "tower", "bread", "horse", "music"]
    queries = token_ids(tokenizer, [f"the {word}" for word in words])
    documents = token_ids(tokenizer, [f"of {word} and the box" for word in words], "document")
    start = jax.tree.map(jnp.copy, parameters)
    trained = bag.train_bag(start, queries, documents, epochs=30, seed=0)
    run: Run = bag.search_collection(trained, queries, documents, words, words, depth=8)
    assert all(run[word][0][0] == word for word in words)
