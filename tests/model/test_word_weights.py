"""Sparse vectors of texts, against all logits of the vocabulary at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.special_ids import SPECIAL_IDS
from gemma_encoder.model import word_weights
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.model.encoder import GemmaEncoder
from gemma_encoder.model.word_weights import all_word_weights, largest_word_weights

B, L, S, D, V = 3, 12, 3, 8, 37


@pytest.fixture
def texts():
    """Three rows of packed texts, with bos and eos, and one row of padding alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, V, (B, L)).astype(np.int32)
    segment_ids = np.zeros((B, L), np.int32)
    segment_ids[0] = [1] * 5 + [2] * 4 + [3] * 3
    segment_ids[1, 3:] = [1] * 9  # padded on the left
    for row in range(B):
        for segment in range(1, S + 1):
            members = np.flatnonzero(segment_ids[row] == segment)
            if len(members):
                tokens[row, members[[0, -1]]] = [2, 1]
    hidden = rng.normal(size=(B, L, D)).astype(np.float32)
    embedding = rng.normal(size=(V, D)).astype(np.float32)
    return hidden, embedding, tokens, segment_ids


def expected(hidden, embedding, tokens, segment_ids, soft_cap=None):
    result = np.zeros((B, S, V), np.float32)
    for row in range(B):
        for index in range(L):
            if not segment_ids[row, index] or tokens[row, index] in SPECIAL_IDS:
                continue
            logits = embedding @ hidden[row, index]
            if soft_cap:
                logits = soft_cap * np.tanh(logits / soft_cap)
            weights = np.log1p(np.maximum(logits, 0))
            weights[list(SPECIAL_IDS)] = 0
            slot = segment_ids[row, index] - 1
            result[row, slot] = np.maximum(result[row, slot], weights)
    return result


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("limit", [1 << 25, 200])
def test_weights_are_the_maximum_over_words(monkeypatch, texts, limit, soft_cap):
    monkeypatch.setattr(word_weights, "LOGITS", limit)
    weights = all_word_weights(*texts, S, soft_cap=soft_cap)
    # Products of eight terms in another order.
    np.testing.assert_allclose(weights, expected(*texts, soft_cap), rtol=1e-5, atol=1e-6)
    assert not np.any(weights[2])


@pytest.mark.parametrize("limit", [1 << 25, 200])
def test_the_largest_weights_are_those_of_all_words(monkeypatch, texts, limit):
    monkeypatch.setattr(word_weights, "LOGITS", limit)
    whole = np.asarray(all_word_weights(*texts, S))
    weights, words = np.split(np.asarray(largest_word_weights(*texts, S, 6)), 2, axis=-1)
    np.testing.assert_allclose(weights, -np.sort(-whole, axis=-1)[..., :6], rtol=1e-6)
    words = words.astype(int)
    taken = np.take_along_axis(whole, words, axis=-1)
    np.testing.assert_allclose(np.where(weights > 0, taken, 0), weights, rtol=1e-6)
    assert not np.any(words[weights == 0])


def test_more_words_than_have_a_weight_are_zeros(texts):
    outputs = np.asarray(largest_word_weights(*texts, S, V))
    weights, words = np.split(outputs, 2, axis=-1)
    assert outputs.shape == (B, S, 2 * V)
    assert (weights[0, 0] > 0).sum() == (expected(*texts)[0, 0] > 0).sum() < V
    assert not np.any(words[weights == 0])


@pytest.mark.parametrize("limit", [1 << 25, 200])
def test_the_gradient_is_that_of_all_logits_at_once(monkeypatch, texts, limit):
    monkeypatch.setattr(word_weights, "LOGITS", limit)
    hidden, embedding, tokens, segment_ids = map(jnp.asarray, texts)
    direction = np.random.default_rng(1).normal(size=(B, S, V)).astype(np.float32)

    def naive(hidden, embedding):
        logits = jnp.einsum("BLD,VD->BLV", hidden, embedding)
        member = segment_ids[:, None, :] == jnp.arange(1, S + 1)[None, :, None]
        member &= ~jnp.isin(tokens, jnp.array(SPECIAL_IDS))[:, None, :]
        highest = jnp.where(member[..., None], logits[:, None], -1.0).max(axis=2)
        weights = jnp.log1p(jax.nn.relu(1.5 * jnp.tanh(highest / 1.5)))
        return jnp.sum(weights.at[..., : len(SPECIAL_IDS)].set(0) * direction)

    def ours(hidden, embedding):
        weights = all_word_weights(hidden, embedding, tokens, segment_ids, S, soft_cap=1.5)
        return jnp.sum(weights * direction)

    expected_parts = jax.grad(naive, (0, 1))(hidden, embedding)
    for ours_part, part in zip(
        jax.grad(ours, (0, 1))(hidden, embedding), expected_parts, strict=True
    ):
        np.testing.assert_allclose(ours_part, part, rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
    """Yields the number of elements of every value of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(value.aval.shape)) for value in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_no_array_holds_the_logits_of_all_words(monkeypatch):
    """Neither forward nor backward, of a row of 1,024 tokens and Gemma's vocabulary."""
    monkeypatch.setattr(word_weights, "LOGITS", 1 << 20)
    length, vocabulary = 1024, 262_144
    shapes = [(1, length, 8), (vocabulary, 8)]
    hidden, embedding = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def trained(hidden, embedding, tokens, segment_ids):
        return all_word_weights(hidden, embedding, tokens, segment_ids, 2).sum()

    def predicted(hidden, embedding, tokens, segment_ids):
        return largest_word_weights(hidden, embedding, tokens, segment_ids, 2, 64)

    for function in (jax.grad(trained, (0, 1)), predicted):
        program = jax.make_jaxpr(function)(hidden, embedding, tokens, tokens)
        assert max(sizes(program.jaxpr)) <= 8 * vocabulary  # the embedding table


def encoder_of(tiny_config, outputs, **changes):
    from flax import nnx

    head = HeadConfig(outputs, "sparse")
    config = EncoderConfig(
        tiny_config("gemma2"), {"words": head}, compute_dtype="float32", **changes
    )
    return GemmaEncoder(config, rngs=nnx.Rngs(0))


def test_the_head_returns_the_largest_or_all_weights(tiny_config, texts):
    encoder = encoder_of(tiny_config, 10)
    _, _, tokens, segment_ids = texts
    positions = np.zeros_like(tokens)
    short = encoder(tokens, segment_ids, positions, S).scores["words"]
    full = encoder(tokens, segment_ids, positions, S, full=True).scores["words"]
    assert short.shape == (B, S, 10)
    assert full.shape == (B, S, tiny_config("gemma2").vocab_size)
    np.testing.assert_allclose(short[..., :5], -np.sort(-full, axis=-1)[..., :5], rtol=1e-6)


@pytest.mark.parametrize(("outputs", "message"), [(9, "even number"), (10**7, "at most")])
def test_an_impossible_number_of_words_is_refused(tiny_config, outputs, message):
    with pytest.raises(InputError, match=message):
        encoder_of(tiny_config, outputs)
