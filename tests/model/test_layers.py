"""Building blocks: RMSNorm, dropout, linear layers and the MLP head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.heads import HeadInputs, MLPHead
from gemma_encoder.model.layers import Linear, RMSNorm, dropout, gated_gelu, normal_param


def test_rms_norm_equals_plain_numpy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32) * 5
    scale = rng.standard_normal(8).astype(np.float32)
    norm = RMSNorm(8)
    assert (np.asarray(norm.scale[...]) == 0).all()  # Gemma's form: the factor is 1 + scale
    unscaled = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), unscaled, rtol=1e-5)  # float32 rsqrt
    norm.scale[...] = jnp.asarray(scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), unscaled * (1 + scale), rtol=1e-5, atol=1e-6)


def test_rms_norm_has_gemmas_epsilon():
    np.testing.assert_allclose(
        RMSNorm(4)(jnp.full((1, 4), 1e-3)), np.full((1, 4), 1e-3 / np.sqrt(2e-6)), rtol=1e-5
    )
    np.testing.assert_array_equal(RMSNorm(4)(jnp.zeros((1, 4))), np.zeros((1, 4)))


def test_rms_norm_computes_in_float32_and_keeps_the_dtype():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 64)) * 3, jnp.bfloat16)
    norm = RMSNorm(64)
    norm.scale[...] = jnp.full((64,), 0.001)  # 1.001 is no bfloat16 number
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_dropout_is_the_identity_without_a_key_or_a_rate():
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_zeroes_at_its_rate_and_preserves_the_mean(rate, dtype):
    x = jnp.full((200, 200), 3.0, dtype)
    dropped = dropout(x, rate, jax.random.key(1))
    assert dropped.dtype == dtype
    values = np.asarray(dropped, np.float64)
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs((values == 0).mean() - rate) < 5 * deviation
    assert len(np.unique(values[values != 0])) == 1
    # One rounding or two.
    rtol = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(values[values != 0][0], 3 / (1 - rate), rtol=rtol)
    rounding = 0 if dtype == jnp.float32 else 3 * 2**-7
    assert abs(values.mean() - 3) < 3 * 5 * deviation / (1 - rate) + rounding


def test_dropout_is_a_function_of_its_key():
    x = jnp.ones((20, 20))
    first, again, other = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_initial_values_have_variance_one_over_fan_in():
    values = np.asarray(normal_param(nnx.Rngs(0), (64, 64, 4), 16)[...])
    assert values.dtype == np.float32
    # 16,384 draws: standard error 0.6 %.
    np.testing.assert_allclose(values.std(), 16**-0.5, rtol=0.03)
    assert abs(values.mean()) < 5 * 16**-0.5 / 128


def test_linear_is_a_matrix_and_a_bias():
    linear = Linear(3, 2, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.asarray([1.0, -1.0])
    x = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
    expected = x @ np.asarray(linear.kernel[...]) + [1, -1]
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
def test_a_head_is_an_mlp(tiny_config, hidden):
    transformer = tiny_config("gemma3", embed_dim=4)
    config = EncoderConfig(transformer, pooling=PoolingConfig(heads=1))
    head = MLPHead(HeadConfig(3, hidden_dims=hidden), config, rngs=nnx.Rngs(0))
    assert [layer.kernel.shape for layer in (*head.hidden, head.out)] == list(
        zip((4, *hidden), (*hidden, 3), strict=True)
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = x.astype(np.float64)
    for layer in head.hidden:
        expected = expected @ np.asarray(layer.kernel[...])
        # PyTorch's GELU, which exports need.
        expected = 0.5 * expected * (1 + scipy.special.erf(expected / np.sqrt(2)))
    expected = expected @ np.asarray(head.out.kernel[...])
    scores = head(HeadInputs(None, jnp.asarray(x), None, None, None, None, None))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # float32, three products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_gelu_is_rounded_once(dtype):
    """Values and both gradients are those of JAX's function in float32."""
    gate, up, slope = np.random.default_rng(0).normal(0, 2, (3, 64, 16))
    gate, up, slope = (jnp.asarray(array, dtype) for array in (gate, up, slope))

    def expected_function(gate, up):
        return jax.nn.gelu(gate, approximate=True) * up

    value, gradients = jax.vjp(gated_gelu, gate, up)
    expected, expected_gradients = jax.vjp(
        expected_function, gate.astype(jnp.float32), up.astype(jnp.float32)
    )
    # One rounding to bfloat16 is 2^-9 of a value. In float32, 1 + tanh near 0 has an absolute error
    # of 6e-8, which the gradient multiplies by gate, up and slope: 4e-5 from float64, as JAX's.
    tolerance = 2**-8 if dtype == "bfloat16" else 2e-6
    actual = (value, *gradients(slope))
    for array, expected_array in zip(
        actual, (expected, *expected_gradients(slope.astype(jnp.float32))), strict=True
    ):
        assert array.dtype == dtype
        np.testing.assert_allclose(
            array.astype(jnp.float32), expected_array, rtol=tolerance, atol=4e-5
        )
