"""Poolers: parity with plain numpy text by text, gradients, dtypes and registration."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import config as model_config
from gemma_encoder.model import pooling
from gemma_encoder.model.config import POOLERS, EncoderConfig, PoolingConfig
from gemma_encoder.model.pooling import make_pooler

WIDTH = 8
LENGTH = 14
SLOTS = 4
ROWS = [[5, 1, 3], [2], [14], [4, 4, 4, 2], []]  # lengths of the texts of each row


@pytest.fixture(scope="module")
def states(lay_out):
    """(hidden, segment_ids, positions, {(row, slot): states of that text}).

    Each row comes twice, padded on the right and on the left.
    """
    rng = np.random.default_rng(0)
    texts = [[np.ones(length, int) for length in row] for row in ROWS]
    sides = [lay_out(texts, len(ROWS), LENGTH, padding)[1:] for padding in ("right", "left")]
    segment_ids, positions = (np.concatenate(side) for side in zip(*sides, strict=True))
    # Padding has states, too, which must not be pooled.
    hidden = rng.standard_normal((len(segment_ids), LENGTH, WIDTH)).astype(np.float32)
    by_text = {
        (row, slot): hidden[row][segment_ids[row] == slot + 1]
        for row, lengths in enumerate(2 * ROWS)
        for slot in range(len(lengths))
    }
    return jnp.asarray(hidden), jnp.asarray(segment_ids), jnp.asarray(positions), by_text


def draw_pooler(config: PoolingConfig):
    """(a function of states, its parameters by name); parameters are drawn by numpy."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_pooler(config, WIDTH, rngs=nnx.Rngs(0))))
    state = jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), state
    )
    function = jax.jit(
        lambda hidden, segment_ids, positions: nnx.merge(graph, state)(
            hidden, segment_ids, positions, SLOTS
        )
    )
    return function, jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def pool(config: PoolingConfig, states):
    """(pooled, the pooler's parameters by name)."""
    function, parameters = draw_pooler(config)
    return function(*states[:3]), parameters


def compare(pooled, states, reference, atol):
    assert pooled.shape == (2 * len(ROWS), SLOTS, WIDTH)
    assert pooled.dtype == jnp.float32
    for (row, slot), text in states[-1].items():
        np.testing.assert_allclose(
            pooled[row, slot], reference(text.astype(np.float64)), rtol=0, atol=atol
        )
    assert np.isfinite(pooled).all()  # also in empty slots: NaN times a weight of zero is NaN


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "selected"),
    [
        ("mean", lambda text, k: text),
        ("first_k", lambda text, k: text[:k]),
        ("last_k", lambda text, k: text[-k:]),
    ],
)
def test_averages(states, name, selected, k):
    pooled, _ = pool(PoolingConfig(name, k=k), states)
    # float32 sums of up to 14 numbers near 1.
    compare(pooled, states, lambda text: selected(text, k).mean(axis=0), 1e-6)
    empty = [
        (row, slot)
        for row in range(2 * len(ROWS))
        for slot in range(SLOTS)
        if (row, slot) not in states[-1]
    ]
    assert empty and all((np.asarray(pooled[row, slot]) == 0).all() for row, slot in empty)


@pytest.mark.parametrize("name", ["first_k", "last_k"])
def test_texts_shorter_than_k_are_averaged_whole(states, name):
    whole, _ = pool(PoolingConfig("mean"), states)
    pooled, _ = pool(PoolingConfig(name, k=100), states)
    np.testing.assert_array_equal(pooled, whole)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


@pytest.mark.parametrize(("probes", "heads"), [(1, 1), (3, 2), (2, 8)])
def test_attention_query(states, probes, heads):
    """Set Transformer's PMA without its norms, probe by probe and head by head."""
    pooled, p = pool(PoolingConfig("attention_query", probes=probes, heads=heads), states)
    size = WIDTH // heads
    assert p["probes"].shape == (probes, heads, size)

    def reference(text):
        vectors = []
        for probe in p["probes"]:
            parts = []
            for head in range(heads):
                keys = text @ p["key"][:, head]
                values = text @ p["value"][:, head]
                parts.append(probe[head] + softmax(keys @ probe[head] / math.sqrt(size)) @ values)
            x = np.concatenate(parts)
            vectors.append(x + np.maximum(x @ p["mlp"]["kernel"] + p["mlp"]["bias"], 0))
        return np.mean(vectors, axis=0)

    # float32 through two projections and a softmax, values up to 10.
    compare(pooled, states, reference, 1e-5)


def gelu(x):
    """The tanh form, as everywhere in Gemma."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("probes", "heads"), [(1, 1), (3, 2), (6, 4)])
def test_attention_kv(states, probes, heads):
    """NV-Embed's latent attention, token by token and head by head."""
    pooled, p = pool(PoolingConfig("attention_kv", probes=probes, heads=heads), states)
    size = WIDTH // heads

    def reference(text):
        vectors = []
        for state in text:
            x = state.copy()
            for head in range(heads):
                query = state @ p["query"][:, head]
                weights = softmax(p["key"][:, head] @ query / math.sqrt(size))
                x += (weights @ p["value"][:, head]) @ p["out"][head]
            up = gelu(x @ p["up"]["kernel"] + p["up"]["bias"])
            vectors.append(x + up @ p["down"]["kernel"] + p["down"]["bias"])
        return np.mean(vectors, axis=0)

    compare(pooled, states, reference, 2e-5)  # float32 through four projections, values up to 20


@pytest.mark.parametrize("name", POOLERS)
def test_pooling_runs_in_float32(states, name):
    hidden, segment_ids, positions, _ = states
    function, _ = draw_pooler(PoolingConfig(name, k=3, probes=2, heads=2))
    short = hidden.astype(jnp.bfloat16)
    pooled = function(short, segment_ids, positions)
    assert pooled.dtype == jnp.float32
    # The same arithmetic on the same numbers; two programs may differ in the last bits.
    np.testing.assert_allclose(
        pooled, function(short.astype(jnp.float32), segment_ids, positions), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", POOLERS)
def test_gradients_stay_inside_the_text(states, name):
    """A pooled vector depends on every pooled state of its text, and on no other state."""
    hidden, segment_ids, positions, _ = states
    function, _ = draw_pooler(PoolingConfig(name, k=2, probes=2, heads=2))
    row = 0
    slot = 2

    def weighted_sum(hidden):
        pooled = function(hidden, segment_ids, positions)
        return (pooled[row, slot] * jnp.arange(1.0, WIDTH + 1)).sum()

    gradient = jax.jit(jax.grad(weighted_sum))(hidden)
    touched = np.abs(gradient).sum(-1) > 0
    expected = np.zeros_like(touched)
    inside = np.flatnonzero(np.asarray(segment_ids)[row] == slot + 1)
    expected[row, {"first_k": inside[:2], "last_k": inside[-2:]}.get(name, inside)] = True
    np.testing.assert_array_equal(touched, expected)


class Middle(pooling.Pooler):
    """A registered pooler: the state in the middle of the row, times a parameter."""

    def __init__(self, config, embed_dim, *, rngs):
        self.scale = pooling.normal_param(rngs, (config.k, embed_dim), 1)

    def __call__(self, hidden, segment_ids, positions, num_segments):
        """Returns [B, S, D]."""
        return jnp.repeat(
            hidden[:, None, 7] * self.scale[...].sum(axis=0)[None, None], num_segments, axis=1
        )


def test_a_registered_pooler_works_like_the_library_s(states, tiny_config, monkeypatch):
    assert list(pooling.POOLERS) == POOLERS
    monkeypatch.setattr(pooling, "POOLERS", dict(pooling.POOLERS))
    monkeypatch.setattr(model_config, "POOLERS", list(POOLERS))
    monkeypatch.setattr(pooling, "POOLER_NAMES", model_config.POOLERS)
    with pytest.raises(InputError, match="unknown pooler 'attention_middle'"):
        PoolingConfig("attention_middle")
    pooling.register_pooler("attention_middle", Middle)
    with pytest.raises(InputError, match="pooler 'attention_middle' is already registered"):
        pooling.register_pooler("attention_middle", Middle)
    with pytest.raises(InputError, match="'atention_middle'; did you mean 'attention_middle'"):
        PoolingConfig("atention_middle")
    pooled, parameters = pool(PoolingConfig("attention_middle", k=2), states)
    expected = np.asarray(states[0])[:, 7] * parameters["scale"].sum(axis=0)
    np.testing.assert_allclose(pooled[:, 1], expected, rtol=1e-5)
    projected, _ = pool(PoolingConfig("attention_middle", projection=(3,)), states)
    assert projected.shape == (2 * len(ROWS), SLOTS, 3)
    # Only poolers that split the width into heads need a width that is divisible by them.
    EncoderConfig(tiny_config("gemma2"), pooling=PoolingConfig("attention_middle", heads=5))
