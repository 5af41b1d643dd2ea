"""Attention implementations: parity with plain XLA in values and gradients, and refusals."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import fused_attention
from gemma_encoder.model.attention import attention_mask, choose_implementation, xla_attention
from gemma_encoder.model.config import AttentionSpec, EncoderConfig
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.model.sizes import GEMMA_CONFIGS

SPECS = {
    "global": AttentionSpec(False, None, None),
    "global, causal, soft cap": AttentionSpec(True, None, 5.0),
    "local, soft cap": AttentionSpec(False, (6, 3), 5.0),
    "local, causal": AttentionSpec(True, (6, 0), None),
}
# The same float32 sums in another order: outputs of size 1, gradients of size 10.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def arrays():
    """`arrays(length, heads, kv_heads, width, padding, dtype)`: inputs of three packed rows.

    Returns [query, key, value], segment ids and positions.
    """

    def make(length, heads=4, kv_heads=2, width=16, padding="right", dtype=jnp.float32):
        rng = np.random.default_rng(0)
        qkv = [
            jnp.asarray(rng.standard_normal((3, length, n, width)), dtype)
            for n in (heads, kv_heads, kv_heads)
        ]
        segment_ids = np.zeros((3, length), np.int32)
        positions = np.zeros((3, length), np.int32)
        rows = ([length], [length // 2, length // 4], [length // 3, 5, length // 3])
        for row, sizes in enumerate(rows):
            start = 0 if padding == "right" else length - sum(sizes)
            for segment, size in enumerate(sizes, 1):
                segment_ids[row, start : start + size] = segment
                positions[row, start : start + size] = np.arange(size)
                start += size
        return qkv, jnp.asarray(segment_ids), jnp.asarray(positions)

    return make


def values_and_gradients(attention, qkv, segment_ids):
    """Outputs of real tokens, and gradients of their weighted sum, each with its own weight."""
    real = (segment_ids > 0)[:, :, None, None]
    weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)

    @jax.jit
    def both(*qkv):
        def total(*qkv):
            encoded = jnp.where(real, attention(*qkv).astype(jnp.float32), 0.0)
            return jnp.sum(encoded * weights), encoded

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)

    (_, encoded), gradients = both(*qkv)
    return [np.asarray(x, np.float32) for x in (encoded, *gradients)]


def assert_equal_attention(attention, arrays, spec, **tolerance):
    qkv, segment_ids, positions = arrays
    exact = [x.astype(jnp.float32) for x in qkv]
    expected = values_and_gradients(
        lambda *qkv: xla_attention(*qkv, segment_ids=segment_ids, positions=positions, spec=spec),
        exact,
        segment_ids,
    )
    actual = values_and_gradients(
        lambda *qkv: attention(*qkv, segment_ids=segment_ids, positions=positions, spec=spec),
        qkv,
        segment_ids,
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("chunk", "padding"), [(16, "right"), (8, "left")])
def test_chunks_equal_the_whole(arrays, spec, chunk, padding):
    def chunked(*qkv, **options):
        return xla_attention(*qkv, **options, chunk=chunk)

    assert_equal_attention(chunked, arrays(53, padding=padding), spec, **TOLERANCE)


def largest_array(jaxpr) -> int:
    """Elements of the largest array in a program, inner programs included."""
    sizes = [
        var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "size")
    ]
    for eqn in jaxpr.eqns:
        sizes += [largest_array(inner) for inner in core.jaxprs_in_params(eqn.params)]
    return max(sizes, default=0)


@pytest.mark.parametrize(("reach", "per_token"), [((64, 64), 512 + 128), (None, 8192)])
def test_long_rows_need_no_quadratic_memory(reach, per_token):
    """Forward and backward at 8,192 tokens materialize the logits of one chunk at a time.

    A chunk's keys are those of its window on local layers, the whole row on global ones.
    """
    length = 8192
    heads = 2
    qkv = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)] * 3
    ids = jnp.ones((1, length), jnp.int32)
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def loss(*qkv):
        return xla_attention(
            *qkv, segment_ids=ids, positions=positions, spec=AttentionSpec(False, reach, 50.0)
        ).sum()

    largest = largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv).jaxpr)
    assert largest <= heads * 512 * per_token
    assert largest < heads * length * length / 10


def test_dropout_in_chunks_keeps_the_mean_and_varies(arrays):
    """The mean over keys is that without dropout, and each chunk draws its own mask."""
    qkv, segment_ids, positions = arrays(24)
    options = {
        "segment_ids": segment_ids,
        "positions": positions,
        "spec": SPECS["global"],
        "chunk": 8,
    }
    draw = jax.jit(
        jax.vmap(lambda key: xla_attention(*qkv, **options, dropout_rate=0.3, dropout_key=key))
    )
    many = draw(jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 1500))
    # A token with one key keeps or drops all of it: values up to 3 times sqrt(0.3 / 0.7), divided
    # by the root of 1,500 draws; 5 standard errors.
    np.testing.assert_allclose(
        many.mean(axis=0),
        xla_attention(*qkv, **options),
        rtol=0,
        atol=5 * 3 * (0.3 / 0.7) ** 0.5 / 1500**0.5,
    )
    ones = [jnp.ones_like(x) for x in qkv]
    dropped = xla_attention(*ones, **options, dropout_rate=0.3, dropout_key=jax.random.key(1))
    first_head = dropped[0, :, 0, 0]
    assert not np.array_equal(first_head[:8], first_head[8:16])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(128, 4, 2), (200, 2, 1)])
def test_splash_equals_xla(arrays, spec, length, heads, kv_heads):
    """In interpret mode; 200 is not a multiple of the block size."""

    def splash(*qkv, positions, **options):
        return fused_attention.splash_attention(*qkv, **options, interpret=True)

    assert_equal_attention(splash, arrays(length, heads, kv_heads), spec, **TOLERANCE)


def test_splash_in_bfloat16(arrays):
    def splash(*qkv, positions, **options):
        return fused_attention.splash_attention(*qkv, **options, interpret=True)

    # bfloat16 rounds outputs of size up to 3 and gradients of size up to 10 with a relative error
    # of 2^-9, a few times over.
    assert_equal_attention(
        splash, arrays(128, dtype=jnp.bfloat16), SPECS["local, soft cap"], rtol=0.05, atol=0.1
    )


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_splash_on_a_mesh_equals_one_device(arrays, kv_heads):
    """Rows over data and fsdp, heads over tensor; a single key-value head is replicated."""
    qkv, segment_ids, _ = arrays(128, 2, kv_heads)
    qkv = [jnp.tile(x, (2, 1, 1, 1))[:4] for x in qkv]
    segment_ids = jnp.tile(segment_ids, (2, 1))[:4]
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def splash(*qkv, mesh):
        return fused_attention.splash_attention(
            *qkv, segment_ids=segment_ids, spec=SPECS["local, soft cap"], mesh=mesh, interpret=True
        )

    alone = values_and_gradients(lambda *qkv: splash(*qkv, mesh=None), qkv, segment_ids)
    spread = values_and_gradients(lambda *qkv: splash(*qkv, mesh=mesh), qkv, segment_ids)
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


def test_the_cudnn_call_equals_xla(arrays, monkeypatch):
    """cuDNN's arguments, run by the XLA implementation of `jax.nn`: tests have no GPU."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **options: real(*args, **options, implementation="xla"),
    )

    def cudnn(*qkv, segment_ids, positions, spec):
        return fused_attention.cudnn_attention(
            *qkv, attention_mask(segment_ids, positions, causal=spec.causal, reach=spec.reach), spec
        )

    for name in ("global", "local, causal"):
        assert_equal_attention(cudnn, arrays(24), SPECS[name], **TOLERANCE)


def test_the_tokamax_call_equals_xla(arrays, monkeypatch):
    """tokamax's arguments, run by a stand-in with its documented semantics."""
    seen = []

    def stand_in(query, key, value, *, mask, scale, logits_soft_cap, implementation):
        seen.append(implementation)
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        logits = jnp.einsum("BTNH,BSNH->BNTS", query * scale, key)
        logits = (
            logits
            if logits_soft_cap is None
            else logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        )
        return jnp.einsum(
            "BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), value
        )

    monkeypatch.setitem(
        sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=stand_in)
    )

    def tokamax(*qkv, segment_ids, positions, spec):
        return fused_attention.tokamax_attention(
            *qkv, attention_mask(segment_ids, positions, causal=spec.causal, reach=spec.reach), spec
        )

    for spec in SPECS.values():
        assert_equal_attention(tokamax, arrays(24), spec, **TOLERANCE)
    assert set(seen) == {"triton"}


ARGUMENTS = {
    "platform": "tpu",
    "dtype": jnp.bfloat16,
    "head_dim": 256,
    "soft_cap": 50.0,
    "dropout_rate": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "splash"),
        ({"dtype": jnp.float32}, "splash"),
        ({"head_dim": 32}, "xla"),
        ({"dropout_rate": 0.1}, "xla"),
        ({"platform": "cpu"}, "xla"),
        ({"platform": "gpu", "soft_cap": None}, "cudnn"),
        ({"platform": "gpu", "soft_cap": None, "dtype": jnp.float32}, "xla"),
        ({"platform": "gpu"}, "tokamax"),
        ({"platform": "gpu", "dropout_rate": 0.1}, "xla"),
    ],
)
def test_auto_resolves_to_the_fastest_supported(changes, expected, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert choose_implementation("auto", **(ARGUMENTS | changes)) == expected


def test_auto_falls_back_if_tokamax_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_implementation("auto", **(ARGUMENTS | {"platform": "gpu"})) == "xla"


def test_auto_logs_its_choice_and_the_reasons_once(caplog):
    with caplog.at_level("INFO"):
        choose_implementation("auto", **(ARGUMENTS | {"head_dim": 34}))
        choose_implementation("auto", **(ARGUMENTS | {"head_dim": 34}))
    assert [record.message for record in caplog.records] == [
        "attention runs on xla (not splash: it needs a head dim that is a multiple of 128, not 34; "
        "not cudnn: it needs a GPU, this is a TPU; not tokamax: it needs a GPU, this is a TPU)"
    ]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "splash",
            {"platform": "cpu"},
            "'splash' cannot be used: it needs a TPU, this is a CPU; choose 'xla' or 'auto'",
        ),
        (
            "splash",
            {"dropout_rate": 0.1},
            "it does not support dropout on attention probabilities",
        ),
        ("splash", {"head_dim": 64}, "a multiple of 128, not 64"),
        (
            "cudnn",
            {"platform": "gpu"},
            "'cudnn' cannot be used: it does not support a soft cap",
        ),
        (
            "cudnn",
            {"platform": "gpu", "soft_cap": None, "dtype": jnp.float32},
            "it needs bfloat16, not float32",
        ),
        (
            "cudnn",
            {"platform": "gpu", "soft_cap": None, "head_dim": 512},
            "at most 256 that is a multiple of 8, not 512",
        ),
        ("tokamax", {"platform": "gpu", "dtype": jnp.float32}, "it needs bfloat16"),
        ("flash", {}, "unknown attention implementation 'flash'; did you mean 'splash'"),
    ],
)
def test_unsupported_arguments_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        choose_implementation(name, **(ARGUMENTS | changes))


def test_the_config_s_implementation_reaches_attention(make_encoder):
    encoder = make_encoder("gemma2", attention_implementation="splash")
    tokens = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(InputError, match="'splash' cannot be used: it needs a TPU, this is a CPU"):
        encoder(tokens, tokens, tokens, 1)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_training_step_compiles_for_tpu_with_splash(family):
    """For a v5e topology, without a TPU: the program has the kernels and no L x L array."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(
        np.array(devices).reshape(2, 1, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    changes = {
        "num_layers": len(GEMMA_CONFIGS[f"{family}_tiny"].pattern),
        "head_dim": 256,
        "sliding_window": 512,
        "num_heads": 2,
        "num_kv_heads": 1 if family == "gemma3" else 2,
    }
    config = EncoderConfig(
        dataclasses.replace(GEMMA_CONFIGS[f"{family}_tiny"], **changes), heads={"head": 1}
    )
    encoder = abstract_encoder(config)
    length = 2048
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows)
    parameters = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
        encoder.shapes,
    )

    def loss(parameters, tokens, segment_ids, positions):
        output = encoder.merge(parameters)(tokens, segment_ids, positions, 4, mesh=mesh)
        return output.scores["head"].sum()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lowered = (
            jax.jit(jax.grad(loss))
            .trace(parameters, ids, ids, ids)
            .lower(lowering_platforms=("tpu",))
        )
    text = lowered.compile().as_text()
    assert "splash_mha_fwd" in text
    assert "splash_mha_dkv" in text
    assert f"{length},{length}" not in text
