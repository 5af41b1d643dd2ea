"""Heads: the registry, refusals, and a registered head beside the library's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import heads
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.model.encoder import GemmaEncoder, abstract_encoder, parameter_paths
from gemma_encoder.model.layers import normal_param


@pytest.fixture
def transformer(tiny_config):
    return tiny_config("gemma3", num_layers=2)


def make(transformer, **fields):
    return EncoderConfig(transformer, compute_dtype="float32", **fields)


@pytest.mark.parametrize(
    ("head", "attention", "message"),
    [
        (HeadConfig(2, "mpl"), "causal", "unknown head kind 'mpl'; did you mean 'mlp'"),
        (
            HeadConfig(2, "language_model"),
            "bidirectional",
            "language-model head 't' .* needs attention='causal', got 'bidirectional'",
        ),
        (
            HeadConfig(3, "language_model"),
            "causal",
            "language-model head 't' must have 2 outputs, got 3",
        ),
    ],
)
def test_refusals(transformer, head, attention, message):
    config = make(transformer, heads={"t": head}, attention=attention)
    with pytest.raises(InputError, match=message):
        heads.check_heads(config)
    with pytest.raises(InputError, match=message):
        abstract_encoder(config)


def test_a_head_has_outputs_and_widths():
    for outputs, widths in ((0, ()), (2, (0,))):
        with pytest.raises(InputError, match="at least 1 output"):
            HeadConfig(outputs, hidden_dims=widths)


def test_a_plain_number_is_a_linear_head(transformer):
    config = make(transformer, heads={"t": 3})
    assert config.heads == {"t": HeadConfig(3)}
    assert list(parameter_paths(abstract_encoder(config).shapes["heads"])) == [
        "t/out/bias",
        "t/out/kernel",
    ]


def test_heads_without_parameters_do_not_shift_the_rng(transformer):
    """Initial values are drawn head by head, in the order of names."""
    text = {"a_text": HeadConfig(2, "language_model")}
    alone, beside = (
        GemmaEncoder(
            make(transformer, heads={"t": 2, **extra}, attention="causal"), rngs=nnx.Rngs(0)
        )
        for extra in ({}, text)
    )
    np.testing.assert_array_equal(
        alone.heads["t"].out.kernel[...], beside.heads["t"].out.kernel[...]
    )


class Bilinear(heads.Head):
    """A registered head: a quadratic form of the pooled state."""

    def __init__(self, config, encoder, *, rngs):
        self.form = normal_param(
            rngs, (encoder.pooled_dim, config.outputs, encoder.pooled_dim), encoder.pooled_dim
        )

    def __call__(self, inputs):
        """Returns scores [B, S, C]."""
        return jnp.einsum("BSD,DCE,BSE->BSC", inputs.pooled, self.form[...], inputs.pooled)


def test_a_registered_head_works_like_the_library_s(transformer, monkeypatch):
    monkeypatch.setattr(heads, "HEADS", dict(heads.HEADS))
    heads.register_head("bilinear", Bilinear)
    config = make(transformer, heads={"t": HeadConfig(2, "bilinear"), "u": 1})
    encoder = GemmaEncoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[2, 5, 9, 1]])
    output = encoder(tokens, jnp.ones_like(tokens), jnp.arange(4)[None], 1)
    pooled = np.asarray(output.pooled[0, 0])
    form = np.asarray(encoder.heads["t"].form[...])
    expected = np.einsum("d,dce,e->c", pooled, form, pooled)
    np.testing.assert_allclose(output.scores["t"][0, 0], expected, rtol=1e-4)
    assert output.scores["u"].shape == (1, 1, 1)
    with pytest.raises(InputError, match="head kind 'bilinear' is already registered"):
        heads.register_head("bilinear", Bilinear)
    assert jax.tree.leaves(nnx.state(encoder.heads["t"]))[0].shape == form.shape
