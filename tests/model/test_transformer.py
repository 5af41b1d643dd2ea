"""The stack of layers: scan and remat change no value; dropout, embedding, dtypes, defaults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.attention import dot_product_attention
from gemma_encoder.model.block import ForwardContext
from gemma_encoder.model.config import AttentionSpec
from gemma_encoder.model.rotary import rotations
from gemma_encoder.model.transformer import Transformer, layer_index

ROWS = 2
LENGTH = 7
DROPOUT = {"attention_dropout": 0.2, "feed_forward_dropout": 0.3}
# Another order of summation and other fusions, in float32: residual streams of size 10 through at
# most seven layers.
REORDERED = {"rtol": 1e-4, "atol": 1e-5}


def some_tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH)), jnp.int32)


def run(transformer: Transformer, **options) -> np.ndarray:
    """Hidden states, compiled."""
    graph, state = nnx.split(transformer)
    return np.asarray(
        jax.jit(lambda state: nnx.merge(graph, state)(some_tokens(), **options))(state)
    )


def layers_in_order(transformer: Transformer) -> list:
    """Every layer as a single block, by the documented layout of `blocks` and `remainder`."""

    def unstacked(state, index):
        return jax.tree.map(lambda x: x[index], state)

    layers = {}
    for group in ("blocks", "remainder"):
        for position, block in enumerate(getattr(transformer, group)):
            graph, state = nnx.split(block)
            for index, layer in enumerate(layer_index(transformer.config, group, position)):
                single = unstacked(state, index) if group == "blocks" else state
                layers[layer] = nnx.merge(graph, single)
    assert sorted(layers) == list(range(transformer.config.num_layers))
    return [layers[layer] for layer in range(len(layers))]


@pytest.mark.parametrize(("family", "dropout"), [("gemma2", True), ("gemma3", False)])
def test_scanned_layers_equal_layers_one_by_one(make_encoder, family, dropout, quick_key):
    transformer = make_encoder(family).backbone
    rates = DROPOUT if dropout else dict.fromkeys(DROPOUT, 0.0)
    key = quick_key(3) if dropout else None
    layers = layers_in_order(transformer)
    assert tuple(layer.layer_kind for layer in layers) == transformer.config.layer_kinds
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
    context = ForwardContext(
        jnp.ones_like(some_tokens()),
        positions,
        rotations(transformer.config, positions),
        "causal",
        **rates,
    )
    apply = nnx.jit(lambda layer, x, key: layer(x, context, key))
    scale = jnp.sqrt(jnp.float32(transformer.config.embed_dim))
    x = transformer.embedding[...][some_tokens()] * scale
    for index, layer in enumerate(layers):
        x = apply(layer, x, None if key is None else jax.random.fold_in(key, index))
    scanned = run(transformer, attention="causal", dropout_key=key, **rates)
    np.testing.assert_allclose(scanned, transformer.final_norm(x), **REORDERED)


@pytest.mark.parametrize(
    ("num_layers", "stacked", "single"),
    [
        (1, [], [0]),
        (2, [], [0, 1]),
        (3, [[0], [1], [2]], []),
        (7, [[0, 3], [1, 4], [2, 5]], [6]),
        (8, [[0, 3], [1, 4], [2, 5]], [6, 7]),
    ],
)
def test_layer_index_gives_the_layout_of_layers(tiny_config, num_layers, stacked, single):
    config = tiny_config("gemma3", num_layers=num_layers)
    transformer = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert [
        list(layer_index(config, "blocks", position)) for position in range(len(transformer.blocks))
    ] == stacked
    assert [
        list(layer_index(config, "remainder", position))
        for position in range(len(transformer.remainder))
    ] == [[layer] for layer in single]
    for position, block in enumerate(transformer.blocks):
        assert block.query.shape[0] == len(stacked[position])


def test_depth_does_not_change_the_size_of_the_program(make_encoder):
    def program(num_layers):
        graph, state = nnx.split(make_encoder("gemma3", {"num_layers": num_layers}).backbone)
        return str(
            jax.make_jaxpr(lambda state: nnx.merge(graph, state)(some_tokens()))(state)
        ).count("dot_general")

    assert program(6) == program(12) == program(24)


@pytest.mark.parametrize(
    ("family", "pattern", "num_layers"),
    [("gemma2", ("global",), 2), ("gemma3", ("local", "global"), 1)],
)
def test_remat_changes_no_value_and_no_gradient(
    make_encoder, family, pattern, num_layers, quick_key
):
    """Scanned layers with dropout, and remainder layers without."""
    rates = DROPOUT if num_layers > 1 else {}
    graph, state = nnx.split(
        make_encoder(family, {"num_layers": num_layers, "pattern": pattern}).backbone
    )
    target = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, LENGTH, 32)), jnp.float32)

    def loss(state, remat):
        hidden = nnx.merge(graph, state)(
            some_tokens(), dropout_key=quick_key(5), remat=remat, **rates
        )
        return jnp.mean((hidden - target) ** 2)

    results = []
    products = []
    for remat in ("none", "dots", "full", "offload") if num_layers > 1 else ("none", "full"):
        traced = jax.jit(jax.value_and_grad(loss), static_argnums=1).trace(state, remat)
        products.append(str(traced.jaxpr).count("dot_general["))
        value, gradient = traced.lower().compile()(state)
        results.append((value, nnx.to_pure_dict(gradient)))
    expected_value, expected_gradient = results[0]
    for value, gradient in results[1:]:
        # Recomputation uses the same operations, dropout masks included; fusions differ.
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradient,
            expected_gradient,
        )
    # "none" computes each matrix product once, "dots" those without a batch axis once, "full" and
    # "offload" recompute all of them.
    assert products[:3] == sorted(set(products)), products
    assert products[3:] in ([], products[2:3])


def test_dots_saves_products_of_bfloat16(make_encoder):
    """The backward pass recomputes only the two products of attention that have a batch axis."""
    graph, state = nnx.split(make_encoder("gemma3", {"num_layers": 1}).backbone)

    def count(remat):
        def loss(state):
            hidden = nnx.merge(graph, state)(some_tokens(), compute_dtype=jnp.bfloat16, remat=remat)
            return jnp.sum(hidden.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss)).lower(state).compile().as_text().count(" dot(")

    assert count("none") <= count("dots") <= count("none") + 2 < count("full")


def test_offload_stores_the_residual_stream_on_the_host(make_encoder):
    graph, state = nnx.split(make_encoder("gemma2", {"num_layers": 2}).backbone)

    def program(remat):
        def loss(state):
            return jnp.sum(nnx.merge(graph, state)(some_tokens(), remat=remat))

        return str(jax.make_jaxpr(jax.grad(loss))(state))

    assert "host" in program("offload")
    assert "host" not in program("full")


@pytest.fixture(scope="module")
def one_layer(make_encoder) -> Transformer:
    return make_encoder("gemma3", {"num_layers": 1}).backbone


@pytest.fixture(scope="module")
def plain(one_layer):
    """Hidden states of `one_layer` without dropout, in float32."""
    return run(one_layer)


def test_dropout_keys(one_layer, plain, quick_key):
    graph, state = nnx.split(one_layer)
    apply = jax.jit(lambda key: nnx.merge(graph, state)(some_tokens(), dropout_key=key, **DROPOUT))
    first = apply(quick_key(0))
    np.testing.assert_array_equal(first, apply(quick_key(0)))
    assert np.abs(first - apply(quick_key(1))).max() > 0.1
    without_key = run(one_layer, **DROPOUT)
    np.testing.assert_array_equal(without_key, plain)
    without_rates = run(one_layer, dropout_key=quick_key(0))
    np.testing.assert_array_equal(without_rates, plain)


def test_each_dropout_alone_changes_results(one_layer, plain, quick_key):
    first, second = (run(one_layer, dropout_key=quick_key(0), **{name: 0.5}) for name in DROPOUT)
    for dropped in (first, second):
        assert np.isfinite(dropped).all()
        assert np.abs(dropped - plain).max() > 0.1
    assert np.abs(first - second).max() > 0.1


def test_every_layer_draws_its_own_dropout_masks(make_encoder, monkeypatch):
    drawn = []

    def recording(part):
        def record(data):
            drawn.append((part, tuple(np.asarray(data).ravel().tolist())))

        def dropout(x, rate, key):
            jax.debug.callback(record, jax.random.key_data(key))
            return x

        return dropout

    monkeypatch.setattr("gemma_encoder.model.block.dropout", recording("feed_forward"))
    monkeypatch.setattr("gemma_encoder.model.attention.dropout", recording("attention"))
    transformer = make_encoder("gemma3").backbone
    run(transformer, dropout_key=jax.random.key(0), **DROPOUT)
    jax.effects_barrier()
    layers = transformer.config.num_layers
    assert sorted(part for part, _ in drawn) == ["attention"] * layers + ["feed_forward"] * layers
    assert len({key for _, key in drawn}) == 2 * layers


def test_attention_dropout_keeps_the_mean():
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 4, 1, 4)), jnp.float32) for _ in range(3)
    )
    ids = jnp.ones((1, 4), jnp.int32)
    positions = jnp.arange(4)[None]

    def attend(rate, dropout_key):
        return dot_product_attention(
            query,
            key,
            value,
            segment_ids=ids,
            positions=positions,
            spec=AttentionSpec(False, None, None),
            dropout_rate=rate,
            dropout_key=dropout_key,
        )

    many = jax.jit(jax.vmap(lambda key: attend(0.5, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    # Standard error: at most the largest value (about 2) times one over the root of 4,000.
    np.testing.assert_allclose(many.mean(axis=0), attend(0.0, None), rtol=0, atol=5 * 2 / 4000**0.5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embeddings_are_scaled_in_the_parameters_dtype(make_encoder, family, dtype):
    """With a bfloat16 table, √D and the product are rounded to bfloat16, as in Gemma.

    Layers and the final norm are disabled, so that hidden states are the scaled embeddings.
    """
    transformer = make_encoder(family, {"num_layers": 1, "pattern": ("global",)}).backbone
    for block in (*transformer.blocks, *transformer.remainder):
        for norm in (block.post_attention_norm, block.post_mlp_norm):
            norm.scale[...] = jnp.full_like(norm.scale[...], -1)  # the factor is 1 + scale
    transformer.final_norm = lambda x: x
    table = transformer.embedding[...].astype(dtype)
    transformer.embedding = nnx.Param(table)
    hidden = transformer(some_tokens(), compute_dtype=jnp.float32)
    assert hidden.dtype == jnp.float32
    embedded = np.asarray(table)[np.asarray(some_tokens())]
    root = np.asarray(32**0.5, np.float32).astype(embedded.dtype)
    product = embedded.astype(np.float32) * root.astype(np.float32)
    expected = product.astype(embedded.dtype).astype(np.float32)
    np.testing.assert_array_equal(hidden, expected)
    # Rounding is large enough to be detected.
    exact = embedded.astype(np.float32) * np.float32(32**0.5)
    assert (np.abs(expected - exact).max() > 1e-3) == (dtype == jnp.bfloat16)


def test_activations_are_in_the_compute_dtype(one_layer, plain):
    half = run(one_layer, compute_dtype=jnp.bfloat16)
    assert (half.dtype, plain.dtype) == (jnp.bfloat16, np.float32)
    # bfloat16 has 8 bits: errors of 2^-9 and a few times that, of states of size 1.
    error = np.abs(half.astype(np.float32) - plain)
    assert 1e-4 < error.mean() < 0.03


def test_segments_and_positions_have_defaults(one_layer, plain):
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
    np.testing.assert_array_equal(run(one_layer, segment_ids=ones, positions=positions), plain)


def test_an_unknown_attention_is_refused(one_layer):
    """Never silently read as bidirectional."""
    with pytest.raises(InputError, match="unknown attention 'casual'; did you mean 'causal'"):
        nnx.eval_shape(lambda: one_layer(some_tokens(), attention="casual"))


def test_an_unknown_remat_policy_is_refused(one_layer):
    with pytest.raises(InputError, match="unknown remat policy 'ful'; did you mean 'full'"):
        nnx.eval_shape(lambda: one_layer(some_tokens(), remat="ful"))
