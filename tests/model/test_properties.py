"""Properties of the transformer over random small configs, and the error of bfloat16 at depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.model.sizes import GEMMA_CONFIGS

# A row has two texts of seven tokens, and padding.
LENGTH = 16
TEXT = 7


@st.composite
def transformers(draw) -> TransformerConfig:
    """Draws a small transformer: depth, pattern, head groups, window, soft cap, norms, RoPE."""
    kv_heads = draw(st.sampled_from([1, 2]))
    return TransformerConfig(
        num_layers=draw(st.integers(1, 3)),
        vocab_size=32,
        embed_dim=draw(st.sampled_from([8, 12])),
        hidden_dim=draw(st.sampled_from([8, 20])),
        num_heads=kv_heads * draw(st.sampled_from([1, 2])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 6])),
        pattern=tuple(draw(st.lists(st.sampled_from(["local", "global"]), min_size=1, max_size=3))),
        sliding_window=draw(st.integers(1, 5)),
        query_scale=draw(st.sampled_from([0.5, 1.0])),
        attention_soft_cap=draw(st.sampled_from([None, 3.0])),
        use_qk_norm=draw(st.booleans()),
        global_rope_base=draw(st.sampled_from([1e4, 1e6])),
        global_rope_scale=draw(st.sampled_from([1.0, 8.0])),
        bidirectional_reach=draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4))),
    )


def reached(config: TransformerConfig, attention: str) -> np.ndarray:
    """[TEXT, TEXT]: True where an input token can influence an output through all layers."""
    ahead = np.arange(TEXT)[None, :] - np.arange(TEXT)[:, None]
    total = np.eye(TEXT, dtype=int)
    for kind in config.layer_kinds:
        left, right = config.reach(kind, attention) or (TEXT, TEXT)
        right = 0 if attention == "causal" else right
        mask = (ahead >= -left) & (ahead <= right)
        total = mask.astype(int) @ total
    return total > 0


@given(
    transformers(),
    st.sampled_from(["bidirectional", "causal"]),
    st.integers(0, TEXT - 1),
    st.integers(0, 2**16),
)
# Each example compiles a program: shrinking would take minutes.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
def test_reach_segments_and_padding(random_parameters, lay_out, config, attention, changed, seed):
    """A token changes only outputs of its segment within its reach; others are equal to the bit.

    Swapping texts, removing one and padding on the left change outputs by rounding only.
    """
    encoder = abstract_encoder(EncoderConfig(config, compute_dtype="float32"))
    parameters = random_parameters(EncoderConfig(config, compute_dtype="float32"), seed)
    rng = np.random.default_rng(seed)
    first, second = rng.integers(1, 32, (2, TEXT))
    other = first.copy()
    other[changed] = 1 + other[changed] % 31
    rows = [[first, second], [other, second], [second, first], [first]]
    tokens, segment_ids, positions = lay_out(rows, len(rows) + 1, LENGTH)
    padded = lay_out([[first, second]], 1, LENGTH, "left")
    tokens, segment_ids, positions = (
        jnp.concatenate([a[:4], b])
        for a, b in zip((tokens, segment_ids, positions), padded, strict=True)
    )
    tokens = tokens.at[3, TEXT:].set(5)  # token ids in padding must not matter
    hidden = np.asarray(
        jax.jit(
            lambda p: encoder.merge(p).backbone(tokens, segment_ids, positions, attention=attention)
        )(parameters)
    )
    base, altered, swapped, alone, left = hidden
    here = slice(0, TEXT)
    there = slice(TEXT, 2 * TEXT)
    assume(np.isfinite(hidden).all())
    may = reached(config, attention)[:, changed]
    difference = np.abs(altered[here] - base[here]).max(axis=-1)
    np.testing.assert_array_equal(difference[~may], 0)
    assert (difference[may] > 0).any()
    np.testing.assert_array_equal(altered[there], base[there])
    # Other columns of a row mean another order of summation: float32 sums of at most 16 terms,
    # states of size 3.
    close = {"rtol": 0, "atol": 2e-5}
    np.testing.assert_allclose(swapped[there], base[here], **close)
    np.testing.assert_allclose(swapped[here], base[there], **close)
    np.testing.assert_allclose(alone[here], base[here], **close)
    np.testing.assert_allclose(left[2:], base[: 2 * TEXT], **close)


@pytest.mark.parametrize("family", ["gemma2_2b", "gemma3_1b"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_bfloat16_stays_near_float32_through_26_layers(random_parameters, family, attention):
    """The published pattern, depth, soft cap and norms, at a small width.

    bfloat16 has a relative rounding error of 2^-9 = 0.002. Over 26 layers of two branches, each
    rounded a few times, errors add up like a random walk to about 0.002 · √(26 · 2 · 4) = 0.03, the
    bound. Measured: 0.022 to 0.026, and 0.027 to 0.033 with norms computed in bfloat16.
    """
    small = {
        "embed_dim": 64,
        "hidden_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "query_scale": 0.25,
        "vocab_size": 64,
        "sliding_window": 8,
    }
    config = EncoderConfig(dataclasses.replace(GEMMA_CONFIGS[family], **small))
    assert config.transformer.num_layers == 26
    parameters = jax.tree.map(lambda x: x * 0.6, random_parameters(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 32)), jnp.int32)
    encoder = abstract_encoder(config)

    @jax.jit
    def run(parameters):
        backbone = encoder.merge(parameters).backbone
        return [
            backbone(tokens, attention=attention, compute_dtype=dtype).astype(jnp.float32)
            for dtype in (jnp.float32, jnp.bfloat16)
        ]

    exact, half = map(np.asarray, run(parameters))
    error = np.sqrt(np.mean((half - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.03
