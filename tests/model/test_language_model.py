"""The language model's head: its likelihoods against full logits, its causality by gradients, and texts that do not care how they share rows."""

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
    """−log softmax of each position's logits at the token after it, summed, by numpy; for one text alone."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    if soft_cap is not None:
        logits = np.tanh(logits / soft_cap) * soft_cap
    logits -= logits.max(axis=-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -sum(log[i, tokens[i + 1]] for i in range(len(tokens) - 1))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("columns", [1, 3, 100])
def test_likelihoods_equal_full_logits_however_they_are_chunked(
    make_encoder, lay_out, monkeypatch, family, columns
):
    encoder = make_encoder(family, {"final_soft_cap": 2.0 if family == "gemma2" else None}, **HEAD)
    table = encoder.backbone.embedding[...]
    monkeypatch.setattr(language, "LOGITS", 3 * columns * table.shape[0])
    batch = lay_out([[text] for text in TEXTS], 3, 10)
    found = jax.jit(lambda: encoder(*batch, 1).scores["text"])()
    assert found.shape == (3, 1, 2) and found.dtype == jnp.float32
    for text, (total, count) in zip(TEXTS, np.asarray(found)[:, 0], strict=True):
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

    def said(rows, num_rows, length, num_segments):
        batch = lay_out(rows, num_rows, length, padding)
        return np.asarray(jax.jit(lambda: encoder(*batch, num_segments).scores["text"])())

    alone, packed = said([[text] for text in TEXTS], 3, 8, 1)[:, 0], said([TEXTS], 1, 19, 4)[0]
    np.testing.assert_allclose(packed[:3], alone, rtol=1e-5)
    np.testing.assert_array_equal(packed[3], 0)  # an empty slot


@pytest.mark.parametrize(("attention", "later"), [("causal", False), ("bidirectional", True)])
def test_no_tokens_likelihood_depends_on_a_later_one(
    tiny_config, random_parameters, attention, later
):
    """Every token comes once, so row t of the input's table is what token t put in; the output's table is held."""
    config = EncoderConfig(
        tiny_config("gemma3", sliding_window=16), compute_dtype="float32", **HEAD
    )
    parameters, tokens = random_parameters(config), jnp.asarray([[2, 9, 7, 11, 5, 1]])
    output = parameters["backbone"]["embedding"]

    def values(table):
        encoder = abstract_encoder(config).merge(
            parameters | {"backbone": parameters["backbone"] | {"embedding": table}}
        )
        hidden = encoder.backbone(tokens, attention=attention)
        return language_model.token_negative_log_likelihood(
            hidden, output, tokens, jnp.ones_like(tokens)
        )[0]

    gradient = np.abs(np.asarray(jax.jit(jax.jacrev(values))(output))).sum(axis=-1)[
        :, tokens[0]
    ]  # [token that is said from here, token put in]
    places = np.arange(5)
    assert (gradient[:5, :5][places[:, None] >= places] > 0).all()
    assert (
        (gradient[:5][places[:, None] < np.arange(6)] > 0).all()
        if later
        else not gradient[:5][places[:, None] < np.arange(6)].any()
    )
    assert not gradient[5].any()  # nothing comes after eos


def test_no_array_of_all_logits_is_made(make_encoder, lay_out, monkeypatch):
    encoder = make_encoder("gemma3", {"vocab_size": 5000}, **HEAD)
    monkeypatch.setattr(language, "LOGITS", 2 * 4 * 5000)
    batch = lay_out([[text] for text in TEXTS[:2]], 2, 64)
    table = encoder.backbone.embedding[...]

    def loss(hidden, table):
        return language_model.negative_log_likelihood(hidden, table, *batch[:2], 1).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((2, 64, 32)), table))
    assert "f32[2,4,5000]" in text and "2,64,5000]" not in text and "f32[16,2,4,5000]" not in text


def test_the_switch_is_refused(make_encoder, lay_out):
    with pytest.raises(
        InputError,
        match="head 'text' is a language model's.*needs attention='causal', got 'bidirectional'",
    ):
        make_encoder("gemma3", **HEAD)(*lay_out([TEXTS], 1, 19), 3, attention="bidirectional")
