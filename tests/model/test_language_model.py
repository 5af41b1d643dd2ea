"""The language-model head: parity with full logits, causality by gradients, packing, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import language_model
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.model.encoder import abstract_encoder

TEXTS = [[2, 5, 9, 7, 1], [2, 8, 1], [2, 30, 31, 32, 33, 34, 1]]
HEAD = {"heads": {"text": HeadConfig(2, "language_model")}, "attention": "causal"}


def plain(hidden, tokens, table, soft_cap):
    """The summed negative log-likelihood of one text, from full logits in numpy."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    if soft_cap is not None:
        logits = np.tanh(logits / soft_cap) * soft_cap
    logits -= logits.max(axis=-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -sum(log[i, tokens[i + 1]] for i in range(len(tokens) - 1))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("columns", [1, 3, 100])
def test_likelihoods_equal_full_logits_for_any_chunk_size(
    make_encoder, lay_out, monkeypatch, family, columns
):
    encoder = make_encoder(family, {"final_soft_cap": 2.0 if family == "gemma2" else None}, **HEAD)
    table = encoder.backbone.embedding[...]
    monkeypatch.setattr(language_model, "LOGITS", 3 * columns * table.shape[0])
    batch = lay_out([[text] for text in TEXTS], 3, 10)
    scores = jax.jit(lambda: encoder(*batch, 1).scores["text"])()
    assert scores.shape == (3, 1, 2) and scores.dtype == jnp.float32
    for text, (total, count) in zip(TEXTS, np.asarray(scores)[:, 0], strict=True):
        hidden = jax.jit(lambda text: encoder.backbone(text, attention="causal"))(
            jnp.asarray([text])
        )[0]
        assert count == len(text) - 1
        np.testing.assert_allclose(
            total, plain(hidden, text, table, encoder.config.transformer.final_soft_cap), rtol=1e-5
        )


@pytest.mark.parametrize("padding", ["right", "left"])
def test_packed_equals_unpacked(make_encoder, lay_out, padding):
    encoder = make_encoder("gemma3", **HEAD)

    def scores(rows, num_rows, length, num_segments):
        batch = lay_out(rows, num_rows, length, padding)
        return np.asarray(jax.jit(lambda: encoder(*batch, num_segments).scores["text"])())

    alone = scores([[text] for text in TEXTS], 3, 8, 1)[:, 0]
    packed = scores([TEXTS], 1, 19, 4)[0]
    np.testing.assert_allclose(packed[:3], alone, rtol=1e-5)
    np.testing.assert_array_equal(packed[3], 0)  # an empty slot


@pytest.mark.parametrize(("attention", "later"), [("causal", False), ("bidirectional", True)])
def test_no_tokens_likelihood_depends_on_a_later_one(
    tiny_config, random_parameters, attention, later
):
    """Gradients by the input embeddings; the output embedding is constant.

    Tokens are all different, so the gradient by row t of the table is the gradient by token t.
    """
    config = EncoderConfig(
        tiny_config("gemma3", sliding_window=16), compute_dtype="float32", **HEAD
    )
    parameters = random_parameters(config)
    tokens = jnp.asarray([[2, 9, 7, 11, 5, 1]])
    output = parameters["backbone"]["embedding"]

    def values(table):
        encoder = abstract_encoder(config).merge(
            parameters | {"backbone": parameters["backbone"] | {"embedding": table}}
        )
        hidden = encoder.backbone(tokens, attention=attention)
        return language_model.token_negative_log_likelihood(
            hidden, output, tokens, jnp.ones_like(tokens)
        )[0]

    jacobian = np.asarray(jax.jit(jax.jacrev(values))(output))
    influence = np.abs(jacobian).sum(axis=-1)[:, tokens[0]]  # [predicting column, input column]
    columns = np.arange(5)
    assert (influence[:5, :5][columns[:, None] >= columns] > 0).all()
    of_later = influence[:5][columns[:, None] < np.arange(6)]
    assert (of_later > 0).all() if later else not of_later.any()
    assert not influence[5].any()  # eos predicts nothing


def test_no_array_of_all_logits_is_made(make_encoder, lay_out, monkeypatch):
    encoder = make_encoder("gemma3", {"vocab_size": 5000}, **HEAD)
    monkeypatch.setattr(language_model, "LOGITS", 2 * 4 * 5000)
    batch = lay_out([[text] for text in TEXTS[:2]], 2, 64)
    table = encoder.backbone.embedding[...]

    def loss(hidden, table):
        return language_model.negative_log_likelihood(hidden, table, *batch[:2], 1).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((2, 64, 32)), table))
    assert "f32[2,4,5000]" in text and "2,64,5000]" not in text and "f32[16,2,4,5000]" not in text


def test_bidirectional_attention_is_refused(make_encoder, lay_out):
    with pytest.raises(
        InputError,
        match="language-model head 'text'.*needs attention='causal', got 'bidirectional'",
    ):
        make_encoder("gemma3", **HEAD)(*lay_out([TEXTS], 1, 19), 3, attention="bidirectional")
