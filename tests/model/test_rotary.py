"""Rotary positions: norms, relative positions, parity with complex numbers, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.model.rotary import rotate, rotation_at, rotations
from gemma_encoder.model.sizes import GEMMA_CONFIGS


def rotate_at(x, positions, base=1e4, scale=1.0):
    return rotate(x, rotation_at(positions, x.shape[-1], base=base, scale=scale))


@given(st.integers(0, 5000), st.sampled_from([1e4, 1e6]), st.sampled_from([1.0, 8.0]))
def test_rotation_keeps_norms(position, base, scale):
    x = jnp.asarray(np.random.default_rng(position).standard_normal((1, 1, 3, 16)), jnp.float32)
    turned = rotate_at(x, jnp.full((1, 1), position), base, scale)
    # float32 sines
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    if position == 0:
        np.testing.assert_array_equal(turned, x)


@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([(1e4, 1.0), (1e6, 8.0)]),
)
def test_rotated_products_depend_on_relative_positions_only(first, second, shift, base_and_scale):
    base, scale = base_and_scale
    query, key = (
        jnp.asarray(x, jnp.float32)
        for x in np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16))
    )

    def rotated(x, position):
        return rotate_at(x, jnp.full((1, 1), position), base, scale)

    def product(i, j):
        return jnp.sum(rotated(query, i) * rotated(key, j))

    # The angle itself, up to 600 radians, has a float32 error of 3e-5, and |q||k| is about 16.
    np.testing.assert_allclose(
        product(first, second), product(first + shift, second + shift), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize(("base", "scale"), [(1e4, 1.0), (1e6, 8.0)])
def test_rotation_equals_complex_multiplication(base, scale):
    x = np.random.default_rng(3).standard_normal((1, 7, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 50, 51, 7]])
    angle = positions[0][:, None, None] / scale * base ** (-np.arange(4) / 4)
    turned = (x[0, ..., :4] + 1j * x[0, ..., 4:]) * np.exp(1j * angle)
    actual = rotate_at(jnp.asarray(x), jnp.asarray(positions), base, scale)
    # Angles up to 51 in float32.
    np.testing.assert_allclose(
        actual[0], np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=2e-5
    )


def test_rotation_is_computed_in_float32_for_bfloat16():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 1, 1, 8)), jnp.bfloat16)
    position = jnp.full((1, 1), 4001)  # not a bfloat16 number
    actual = rotate_at(x, position)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        actual, rotate_at(x.astype(jnp.float32), position).astype(jnp.bfloat16)
    )


def test_the_kinds_of_layer_rotate_differently(make_encoder, monkeypatch):
    """Base and scale of the config reach the layers of their kind, as calls to `rotate` show."""
    seen = []
    monkeypatch.setattr(
        "gemma_encoder.model.rotary.rotation_at",
        lambda positions, head_dim, *, base, scale: (base, scale),
    )
    monkeypatch.setattr(
        "gemma_encoder.model.block.rotate", lambda x, rotation: seen.append(rotation) or x
    )
    rope = {"local_rope_base": 3.0, "global_rope_base": 5.0, "global_rope_scale": 8.0}
    for kind in ("local", "global"):
        changes = {"num_layers": 1, "pattern": (kind, "global")} | rope
        nnx.eval_shape(make_encoder("gemma3", changes).backbone, jnp.arange(9)[None])
    assert seen == [(3.0, 1.0)] * 2 + [(5.0, 8.0)] * 2  # queries and keys


def rotate_in_the_layer(x, positions, base, scale):
    """Rotates without tables: sines and cosines are computed where they are used."""
    half = x.shape[-1] // 2
    timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] / timescale[None, None, :] / scale
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tables_change_no_bit(dtype):
    config = GEMMA_CONFIGS["gemma3_4b"]
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((2, 33, 3, config.head_dim)), dtype)
    positions = jnp.asarray(rng.integers(0, 8192, (2, 33)), jnp.int32)
    tables = jax.jit(rotations, static_argnums=0)(config, positions)
    for kind, base, scale in [("local", 1e4, 1.0), ("global", 1e6, 8.0)]:
        expected = jax.jit(rotate_in_the_layer, static_argnums=(2, 3))(x, positions, base, scale)
        np.testing.assert_array_equal(jax.jit(rotate)(x, tables[kind]), expected)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_sines_are_computed_once(make_encoder, remat):
    """Both kinds of layer, forward and backward: two tables of sines, none in a layer."""
    graph, state = nnx.split(make_encoder("gemma3", {"global_rope_scale": 8.0}).backbone)

    def total(state):
        return jnp.sum(nnx.merge(graph, state)(jnp.arange(9)[None], remat=remat))

    program = str(jax.make_jaxpr(jax.grad(total))(state))
    assert "scan[" in program
    assert [program.count(f" = {name} ") for name in ("sin", "cos")] == [2, 2]


def test_kinds_that_rotate_alike_share_tables():
    tables = rotations(GEMMA_CONFIGS["gemma2_2b"], jnp.arange(9)[None])
    assert tables["local"] is tables["global"]
