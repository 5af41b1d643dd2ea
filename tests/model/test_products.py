"""Products: the values of float32 sums, the gradients of both factors, the fast forms on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.model.products import platform_of, product

SHAPES = [((6, 5), (5, 4)), ((2, 3, 6, 5), (2, 3, 5, 4))]
HALF_STEP = 2**-8  # of bfloat16, relative: one rounding


def factors(shapes, dtype, weight_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    x = x.astype(dtype)
    return x, weight.astype(dtype).astype(weight_dtype)  # numbers that both dtypes have


def gradients(multiply, x, weight, cotangent):
    _, pull_back = jax.vjp(multiply, x, weight)
    return pull_back(cotangent)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sums_are_in_float32_and_rounded_once(shapes, platform):
    x, weight = factors(shapes, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    result = product(x, weight, platform)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=HALF_STEP, atol=1e-6)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_of_both_factors(shapes):
    """The gradient of a float32 parameter is not rounded to bfloat16."""
    x, weight = factors(shapes, jnp.bfloat16)
    cotangent = x[..., :4]
    x_gradient, weight_gradient = gradients(
        lambda x, weight: product(x, weight, "cpu"), x, weight, cotangent
    )
    assert (x_gradient.dtype, weight_gradient.dtype) == (jnp.bfloat16, jnp.float32)
    x64, weight64, cotangent64 = (np.asarray(a, np.float64) for a in (x, weight, cotangent))
    expected = cotangent64 @ np.swapaxes(weight64, -1, -2)
    np.testing.assert_allclose(
        np.asarray(x_gradient, np.float64), expected, rtol=HALF_STEP, atol=1e-6
    )
    expected = np.swapaxes(x64, -1, -2) @ cotangent64
    np.testing.assert_allclose(weight_gradient, expected, rtol=1e-6, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_float32_is_left_to_jax(shapes, platform):
    x, weight = factors(shapes, jnp.float32)
    cotangent = x[..., :4]

    def multiply(x, weight):
        return product(x, weight, platform)

    np.testing.assert_array_equal(multiply(x, weight), x @ weight)
    jax.tree.map(
        np.testing.assert_array_equal,
        gradients(multiply, x, weight, cotangent),
        gradients(jnp.matmul, x, weight, cotangent),
    )


@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_cpu_multiplies_bfloat16_without_conversion(batch):
    """Forward and backward: XLA converts the factors of forms for which it has no fast routine."""
    x = jax.ShapeDtypeStruct((*batch, 256, 128), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((*batch, 128, 384), jnp.bfloat16 if batch else jnp.float32)

    def step(multiply):
        def loss(x, weight):
            return jnp.sum(multiply(x, weight).astype(jnp.float32) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, weight).compile().as_text()

    def converted(program):
        """Returns the products whose factors are float32."""
        dots = re.findall(r"= \w+\[[\d,]*\]\S* dot\((%[\w.\-]+), (%[\w.\-]+)\)", program)
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", program))
        return [dot for dot in dots if "f32" in (types[dot[0]], types[dot[1]])]

    assert converted(step(lambda x, weight: x @ weight.astype(x.dtype)))  # else nothing is tested
    program = step(lambda x, weight: product(x, weight, "cpu"))
    assert program.count(" dot(") == 3 and not converted(program)


def test_other_devices_get_one_plain_product():
    x, weight = factors(SHAPES[0], jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda x, weight: product(x, weight, "tpu"))(x, weight))
    assert program.count("dot_general") == 1 and "custom_vjp" not in program


def test_the_platform_is_that_of_the_mesh():
    assert platform_of(None) == platform_of(jax.make_mesh((1,), ("data",))) == "cpu"
