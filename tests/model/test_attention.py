"""Attention: mask switch by gradients, soft cap, and parity with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.model.attention import attention_mask, dot_product_attention
from gemma_encoder.model.config import AttentionSpec
from gemma_encoder.model.transformer import Transformer

LENGTH = 9
ONE_TEXT = np.ones(LENGTH, int), np.arange(LENGTH)


def allowed(segment_ids, positions, causal, reach) -> np.ndarray:
    """The mask of one row by its definition, pair by pair."""
    length = len(segment_ids)
    table = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(length):
            distance = positions[j] - positions[i]
            inside = reach is None or -reach[0] <= distance <= reach[1]
            table[i, j] = (
                segment_ids[i] == segment_ids[j] and inside and not (causal and distance > 0)
            )
    return table


def influence_of(transformer: Transformer, attention: str):
    """A function from (segment_ids, positions) of one row to the influence matrix [i, j].

    Entry (i, j) is the gradient of the hidden state at i by the input embedding at j. The tokens of
    the row are all different, so the gradient by a row of the embedding table is the gradient by
    the input at one column.
    """
    direction = jnp.asarray(
        np.random.default_rng(0).standard_normal(transformer.config.embed_dim), jnp.float32
    )
    graph, state = nnx.split(transformer)

    def projections(table, segment_ids, positions):
        merged = nnx.merge(graph, state)
        merged.embedding = nnx.Param(table)
        hidden = merged(
            jnp.arange(LENGTH)[None], segment_ids[None], positions[None], attention=attention
        )
        return jnp.einsum("LD,D->L", hidden[0], direction)

    gradient = jax.jit(jax.jacrev(projections))

    def influence(segment_ids=ONE_TEXT[0], positions=ONE_TEXT[1]) -> np.ndarray:
        gradients = gradient(
            transformer.embedding[...],
            jnp.asarray(segment_ids, jnp.int32),
            jnp.asarray(positions, jnp.int32),
        )
        return np.abs(np.asarray(gradients))[:, :LENGTH].sum(-1)

    return influence


def assert_attends(influence: np.ndarray, mask: np.ndarray) -> None:
    """Influence is exactly zero where the mask is False, and clearly not zero elsewhere.

    Typical values are 1e-2 to 10.
    """
    np.testing.assert_array_equal(influence > 0, mask)
    assert influence[mask].min() > 1e-7


@pytest.fixture(scope="session")
def one_layer(make_encoder):
    """`one_layer(family, kind, **changes)`: a transformer of one layer, a remainder layer."""
    return lambda family, kind, **changes: (
        make_encoder(family, {"num_layers": 1, "pattern": (kind, "global")} | changes).backbone
    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_the_mask_switch(one_layer, family, kind):
    layer = one_layer(family, kind)
    i, j = np.indices((LENGTH, LENGTH))
    window = 3
    near = abs(i - j) < window if kind == "local" else np.ones_like(i, bool)
    assert_attends(influence_of(layer, "causal")(), near & (j <= i))
    assert_attends(influence_of(layer, "bidirectional")(), near)


@pytest.mark.parametrize(
    ("attention", "reach"),
    [("bidirectional", (4, 1)), ("bidirectional", (0, 2)), ("causal", (4, 1))],
)
def test_an_explicit_reach_is_exact_and_only_bidirectional(one_layer, attention, reach):
    seen = influence_of(one_layer("gemma3", "local", bidirectional_reach=reach), attention)()
    left, right = reach if attention == "bidirectional" else (2, 0)
    i, j = np.indices((LENGTH, LENGTH))
    assert_attends(seen, (j >= i - left) & (j <= i + right))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_stack_attends_as_its_masks_compose(make_encoder, family, attention):
    """Two scanned layers and a remainder layer, or three scanned layers.

    One text, two texts, padding on either side, and texts longer than the window.
    """
    transformer = make_encoder(
        family,
        {"num_layers": 3, "pattern": ("local", "global") if family == "gemma2" else ("local",)},
    ).backbone
    influence = influence_of(transformer, attention)
    for segment_ids, positions in (
        ONE_TEXT,
        ([1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3, 0, 0]),
        ([0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 1, 2, 3, 4, 0, 1]),
    ):
        reached = np.eye(LENGTH, dtype=int)
        for kind in transformer.config.layer_kinds:
            reached = (
                allowed(
                    segment_ids,
                    positions,
                    attention == "causal",
                    transformer.config.reach(kind, attention),
                )
                @ reached
            )
        seen = influence(segment_ids, positions)
        assert_attends(seen, reached > 0)
        assert not seen[~np.equal.outer(segment_ids, segment_ids)].any()
        if attention == "causal" and 0 not in segment_ids:
            assert not seen[np.triu_indices(LENGTH, 1)].any()


def test_layer_kinds_repeat_the_pattern(tiny_config):
    assert tiny_config("gemma2", num_layers=5).layer_kinds == (
        "local",
        "global",
        "local",
        "global",
        "local",
    )
    assert tiny_config("gemma3", num_layers=4).layer_kinds == ("local", "local", "global", "local")


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.booleans(),
    st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.randoms(use_true_random=False),
)
def test_attention_mask_equals_its_definition(segment_ids, causal, reach, random):
    positions = [random.randrange(8) for _ in segment_ids]
    mask = attention_mask(
        jnp.asarray(segment_ids)[None], jnp.asarray(positions)[None], causal=causal, reach=reach
    )
    np.testing.assert_array_equal(mask[0], allowed(segment_ids, positions, causal, reach))


def reference_attention(query, key, value, mask, soft_cap):
    """Attention head by head and query by query, in float64."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        logits = np.array(
            [query[b, t, n].astype(np.float64) @ key[b, s, n // group] for s in range(key.shape[1])]
        )
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.where(mask[b, t], np.exp(logits - logits.max()), 0)
        out[b, t, n] = (weights / weights.sum()) @ value[b, :, n // group]
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("soft_cap", "causal", "reach"),
    [(None, False, None), (2.0, True, None), (5.0, False, (1, 2)), (None, True, (2, 0))],
)
def test_attention_equals_plain_numpy(heads, soft_cap, causal, reach):
    rng = np.random.default_rng(1)
    query, key, value = (
        rng.standard_normal((2, 6, n, 8)).astype(np.float32) for n in (heads[0], heads[1], heads[1])
    )
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    arrays = map(jnp.asarray, (query, key, value))
    layout = {"segment_ids": jnp.asarray(segment_ids), "positions": jnp.asarray(positions)}
    actual = dot_product_attention(*arrays, **layout, spec=AttentionSpec(causal, reach, soft_cap))
    mask = np.stack(
        [allowed(*row, causal, reach) for row in zip(segment_ids, positions, strict=True)]
    )
    # float32 against float64: logits up to about 10, sums of 8 products.
    np.testing.assert_allclose(
        actual, reference_attention(query, key, value, mask, soft_cap), rtol=0, atol=1e-5
    )


def test_the_soft_cap_bounds_the_ratio_of_probabilities():
    query = jnp.full((1, 2, 1, 2), 100.0)
    key = jnp.asarray([1.0, -1.0])[None, :, None, None] * jnp.full((1, 2, 1, 2), 100.0)
    value = jnp.eye(2)[None, :, None, :]  # attention to each token is read off the output

    def attend(soft_cap):
        ids = jnp.ones((1, 2), jnp.int32)
        return np.asarray(
            dot_product_attention(
                query,
                key,
                value,
                segment_ids=ids,
                positions=ids,
                spec=AttentionSpec(False, None, soft_cap),
            )
        )[0, 0, 0]

    np.testing.assert_array_equal(attend(None), [1, 0])  # logits ±20,000
    capped = attend(2.0)
    # Logits ±2; float32 exp and tanh.
    np.testing.assert_allclose(capped[0] / capped[1], np.exp(4.0), rtol=1e-5)


def test_softmax_runs_in_float32_for_bfloat16_inputs():
    rng = np.random.default_rng(2)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 64, 2, 16)) * 2, jnp.bfloat16) for _ in range(3)
    )
    actual = dot_product_attention(
        query,
        key,
        value,
        segment_ids=jnp.ones((1, 64), jnp.int32),
        positions=jnp.arange(64)[None],
        spec=AttentionSpec(False, None, None),
    )
    assert actual.dtype == jnp.bfloat16
    exact = reference_attention(
        *(np.asarray(x, np.float64) for x in (query, key, value)), np.ones((1, 64, 64), bool), None
    )
    # Probabilities and output are rounded to bfloat16 (8 bits, 2^-9 relative). Logits are not: they
    # reach 60, where bfloat16 steps by 0.25.
    np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=0, atol=0.03)
