"""The encoder: vectors invariant to layout, parameters split from structure, mask switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import POOLERS, EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import (
    GemmaEncoder,
    abstract_encoder,
    initial_parameters,
    parameter_dict,
    parameter_paths,
)
from gemma_encoder.model.heads import HeadInputs

# Every layout below is [TEXTS, LENGTH], so that one compiled program runs them all.
TEXTS = 5
LENGTH = 50
SLOTS = 5
# Other columns of a row mean another order of summation: float32 sums over 50 columns, mostly
# zeros, through five layers.
MOVED = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def pooled_by_every_pooler(random_parameters, tiny_config):
    """By family, a compiled function from (tokens, segment_ids, positions) to {pooler: [B, S, D]}.

    All poolers share one transformer.
    """

    def make(family):
        encoders = {}
        for name in POOLERS:
            config = EncoderConfig(
                tiny_config(family, num_layers=3, pattern=("local", "global")),
                pooling=PoolingConfig(name, k=3, probes=2, heads=4),
                compute_dtype="float32",
                attention="bidirectional" if family == "gemma2" else "causal",
            )
            encoders[name] = abstract_encoder(config).merge(random_parameters(config))
        backbone = nnx.state(encoders["mean"].backbone)
        for encoder in encoders.values():
            nnx.update(encoder.backbone, backbone)

        @jax.jit  # XLA computes the shared transformer once for the five poolers
        def pooled(tokens, segment_ids, positions):
            return {
                name: encoder(tokens, segment_ids, positions, SLOTS).pooled
                for name, encoder in encoders.items()
            }

        return pooled

    return {family: make(family) for family in ("gemma2", "gemma3")}


def by_text(pooled, layout):
    """Selects {pooler: [texts, D]} from {pooler: [B, S, D]} by each text's (row, slot)."""
    rows, slots = zip(*layout, strict=True)
    return {name: np.asarray(values)[list(rows), list(slots)] for name, values in pooled.items()}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=TEXTS, max_size=TEXTS),
    order=st.permutations(range(TEXTS)),
    split=st.integers(1, TEXTS),
    data=st.data(),
)
def test_the_vector_of_a_text_is_invariant_to_layout(
    pooled_by_every_pooler, lay_out, family, lengths, order, split, data
):
    """Alone or packed, in any order, padded left or right, shorter or longer than k and window."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    texts = [rng.integers(5, 64, length) for length in lengths]
    pool = pooled_by_every_pooler[family]
    one_per_row = [[text] for text in texts]
    first_slots = [(row, 0) for row in range(TEXTS)]
    alone = by_text(pool(*lay_out(one_per_row, TEXTS, LENGTH)), first_slots)
    assert all(np.abs(values).max() > 0.01 for values in alone.values())
    orders = [order[:split], order[split:]]
    packed = [[texts[text] for text in row_order] for row_order in orders]
    slots = {
        text: (row, slot)
        for row, row_order in enumerate(orders)
        for slot, text in enumerate(row_order)
    }
    packed_slots = [slots[text] for text in range(TEXTS)]
    layouts = {
        "alone, padded left": (one_per_row, "left", first_slots),
        "packed": (packed, "right", packed_slots),
        "packed, padded left": (packed, "left", packed_slots),
    }
    for name, (rows, padding, row_slots) in layouts.items():
        actual = by_text(pool(*lay_out(rows, TEXTS, LENGTH, padding)), row_slots)
        for pooler in POOLERS:
            np.testing.assert_allclose(
                actual[pooler], alone[pooler], **MOVED, err_msg=f"{name}, {pooler}"
            )


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_permuting_texts_in_a_row_permutes_results(pooled_by_every_pooler, lay_out, family):
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 64, length) for length in (9, 1, 4, 12, 2)]
    order = [3, 0, 4, 2, 1]
    first = pooled_by_every_pooler[family](*lay_out([texts], TEXTS, LENGTH))
    permuted = [texts[index] for index in order]
    second = pooled_by_every_pooler[family](*lay_out([permuted], TEXTS, LENGTH))
    for pooler in POOLERS:
        vectors = np.asarray(first[pooler][0])
        np.testing.assert_allclose(second[pooler][0], vectors[order], **MOVED)
        distances = np.abs(vectors[:, None] - vectors[None]).max(-1)
        assert distances[~np.eye(TEXTS, dtype=bool)].min() > 0.01  # the texts are distinguishable


def test_the_order_of_rows_is_the_order_of_results(pooled_by_every_pooler, lay_out):
    rng = np.random.default_rng(1)
    texts = [rng.integers(5, 64, length) for length in (9, 1, 4, 12, 2)]
    forward = pooled_by_every_pooler["gemma2"](*lay_out([[text] for text in texts], TEXTS, LENGTH))
    backward = pooled_by_every_pooler["gemma2"](
        *lay_out([[text] for text in reversed(texts)], TEXTS, LENGTH)
    )
    for pooler in POOLERS:
        np.testing.assert_allclose(backward[pooler][::-1, 0], forward[pooler][:, 0], **MOVED)


@pytest.fixture(scope="module")
def small(tiny_config) -> EncoderConfig:
    return EncoderConfig(
        tiny_config("gemma3", num_layers=1),
        heads={"mnli": HeadConfig(3, hidden_dims=(6,)), "stsb": HeadConfig(1, hidden_dims=(6,))},
        pooling=PoolingConfig("attention_query", probes=2),
        compute_dtype="float32",
    )


@pytest.fixture(scope="module")
def some_batch(lay_out):
    rng = np.random.default_rng(0)
    return lay_out([[rng.integers(5, 64, n) for n in (4, 6)], [rng.integers(5, 64, 9)]], 2, 12)


def pooled_only(pooled):
    """Inputs of a head that reads only the pooled state."""
    return HeadInputs(None, pooled, None, None, None, None, None)


def encode(encoder, batch, **options):
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state: nnx.merge(graph, state)(*batch, 2, **options))(state)


def test_every_head_scores_every_text(small, random_parameters, some_batch):
    encoder = abstract_encoder(small).merge(random_parameters(small))
    output = encode(encoder, some_batch)
    assert output.hidden.shape == (2, 12, 32)
    assert output.pooled.shape == (2, 2, 32)
    assert {name: scores.shape for name, scores in output.scores.items()} == {
        "mnli": (2, 2, 3),
        "stsb": (2, 2, 1),
    }
    for name, scores in output.scores.items():
        assert scores.dtype == jnp.float32
        expected = encoder.heads[name](pooled_only(output.pooled))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # float32, compiled apart


def test_heads_and_pooling_are_float32_when_compute_is_not(small, random_parameters, some_batch):
    config = dataclasses.replace(small, compute_dtype="bfloat16")
    output = encode(abstract_encoder(config).merge(random_parameters(config)), some_batch)
    assert (output.hidden.dtype, output.pooled.dtype, output.scores["mnli"].dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.float32,
    )


def test_the_mask_switch_can_be_overridden_per_call(small, random_parameters, some_batch):
    parameters = random_parameters(small)
    outputs = {}
    for configured, called in [
        ("causal", None),
        ("bidirectional", None),
        ("causal", "bidirectional"),
        ("bidirectional", "causal"),
    ]:
        config = dataclasses.replace(small, attention=configured)
        encoder = abstract_encoder(config).merge(parameters)
        outputs[configured, called] = encode(encoder, some_batch, attention=called).hidden
    np.testing.assert_array_equal(
        outputs["causal", "bidirectional"], outputs["bidirectional", None]
    )
    np.testing.assert_array_equal(outputs["bidirectional", "causal"], outputs["causal", None])
    assert np.abs(outputs["causal", None] - outputs["bidirectional", None]).max() > 0.1


@pytest.mark.parametrize("name", ["casual", "bidirectonal", ""])
def test_an_unknown_attention_is_refused_per_call(small, random_parameters, some_batch, name):
    encoder = abstract_encoder(small).merge(random_parameters(small))
    with pytest.raises(InputError, match=f"unknown attention '{name}'.*bidirectional, causal"):
        nnx.eval_shape(lambda: encoder(*some_batch, 2, attention=name))


def test_the_configs_dropout_needs_a_key(small, random_parameters, some_batch, quick_key):
    config = dataclasses.replace(small, feed_forward_dropout=0.3, attention_dropout=0.2)
    parameters = random_parameters(small)
    encoder = abstract_encoder(config).merge(parameters)
    plain = jax.jit(lambda: abstract_encoder(small).merge(parameters)(*some_batch, 2).hidden)()
    unused = jax.jit(lambda: encoder(*some_batch, 2).hidden)()
    np.testing.assert_array_equal(unused, plain)
    dropped = jax.jit(lambda: encoder(*some_batch, 2, dropout_key=quick_key(0)).hidden)()
    assert np.abs(dropped - plain).max() > 0.1
    assert np.isfinite(dropped).all()


def test_abstract_shapes_are_those_of_the_parameters(small):
    small = dataclasses.replace(
        small,
        transformer=dataclasses.replace(
            small.transformer, num_layers=3, pattern=("local", "global")
        ),
    )
    shapes = parameter_paths(abstract_encoder(small).shapes)
    initial = parameter_paths(jax.eval_shape(lambda: initial_parameters(small, jax.random.key(0))))
    assert {path: (x.shape, x.dtype) for path, x in shapes.items()} == {
        path: (x.shape, x.dtype) for path, x in initial.items()
    }
    assert {x.dtype for x in shapes.values()} == {jnp.dtype("float32")}
    assert {
        "backbone/embedding": (64, 32),
        "backbone/final_norm/scale": (32,),
        "backbone/blocks/0/query": (1, 32, 4, 8),
        "backbone/blocks/1/key_value": (1, 32, 2, 2, 8),
        "backbone/remainder/0/gating": (32, 2, 48),
        "backbone/remainder/0/query_norm/scale": (8,),
        "heads/mnli/out/kernel": (6, 3),
        "heads/stsb/hidden/0/bias": (6,),
    }.items() <= {path: x.shape for path, x in shapes.items()}.items()


@pytest.fixture(scope="module")
def drawn(tiny_config):
    """(config, compiled `initial_parameters` of it)."""
    config = EncoderConfig(
        tiny_config("gemma2", num_layers=1, pattern=("global",)),
        heads={"a": 2},
        compute_dtype="float32",
    )
    return config, jax.jit(lambda key: initial_parameters(config, key))


def test_parameters_are_a_function_of_the_key(drawn, quick_key):
    first, again, other = (parameter_paths(drawn[1](quick_key(seed))) for seed in (0, 0, 1))
    for path, value in first.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, again[path])
        constant = path.endswith(("scale", "bias"))
        assert (np.asarray(value) == np.asarray(other[path])).all() == constant, path
        assert (np.asarray(value) == 0).all() == constant, path
    for path, fan_in in {
        "embedding": 32,
        "blocks/0/query": 32,
        "blocks/0/attention_out": 32,
        "blocks/0/gating": 32,
        "blocks/0/linear": 48,
    }.items():
        # At least 1,024 draws: standard error 2 %.
        np.testing.assert_allclose(np.std(first[f"backbone/{path}"]), fan_in**-0.5, rtol=0.1)


def test_merging_parameters_equals_the_constructor(drawn, some_batch, quick_key):
    config, draw = drawn
    built = nnx.jit(lambda: GemmaEncoder(config, rngs=nnx.Rngs(quick_key(4))))()
    parameters = draw(quick_key(4))
    merged = abstract_encoder(config).merge(parameters)
    jax.tree.map(
        np.testing.assert_array_equal, encode(merged, some_batch), encode(built, some_batch)
    )
    apart = parameter_dict(nnx.state(merged))
    assert list(parameter_paths(apart)) == list(parameter_paths(parameters))
    jax.tree.map(np.testing.assert_array_equal, apart, parameters)


@pytest.mark.parametrize("name", ["7", "a/b", ""])
def test_head_names_that_are_no_path_parts_are_refused(small, name):
    with pytest.raises(InputError, match="head"):
        dataclasses.replace(small, heads={name: 2, "b": 3})


def test_configs_and_graphs_hash(small):
    """Static arguments of jit must hash."""
    assert hash(small) == hash(dataclasses.replace(small))
    assert hash(abstract_encoder(small).graph) == hash(abstract_encoder(small).graph)
