"""Products: the values of float32 sums, the gradients of both factors, the fast forms on a CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.model.config import EncoderConfig, HeadConfig, LoraConfig
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.model.lora import INPUT_AXES
from gemma_encoder.model.products import platform_of, product
from gemma_encoder.model.sharding import make_mesh

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


@pytest.fixture(params=[False, True], ids=["plain", "transposed"])
def transposed(request):
    return request.param


def with_transposed(x, weight, transposed):
    return (x, jnp.swapaxes(weight, -1, -2)) if transposed else (x, weight)


def exact(array):
    return np.asarray(array, np.float64)


def assert_rounded_once(actual, expected):
    """Sums in float32 are off by 1e-6 before they are rounded to bfloat16."""
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(actual), expected, rtol=HALF_STEP, atol=1e-6)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("platform", ["cpu", "cpus", "tpu"])
def test_sums_are_in_float32_and_rounded_once(shapes, platform, transposed):
    x, weight = factors(shapes, jnp.bfloat16)
    expected = exact(x) @ exact(weight)
    operands = with_transposed(x, weight, transposed)
    result = product(*operands, platform, transposed=transposed)
    assert_rounded_once(result, expected)
    result = product(*operands, platform, transposed=transposed, dtype=jnp.float32)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_gradients_of_both_factors(shapes, dtype, transposed):
    """The gradient of a float32 parameter is not rounded to bfloat16."""
    x, weight = with_transposed(*factors(shapes, jnp.bfloat16), transposed)
    cotangent = x[..., :4].astype(dtype or x.dtype)

    def multiply(x, weight):
        return product(x, weight, "cpu", transposed=transposed, dtype=dtype)

    x_gradient, weight_gradient = gradients(multiply, x, weight, cotangent)
    _, pull_back = jax.vjp(
        lambda x, weight: x @ (jnp.swapaxes(weight, -1, -2) if transposed else weight),
        *(jnp.asarray(array, jnp.float32) for array in (x, weight)),
    )
    expected = pull_back(cotangent.astype(jnp.float32))
    assert_rounded_once(x_gradient, exact(expected[0]))
    assert weight_gradient.dtype == jnp.float32
    np.testing.assert_allclose(weight_gradient, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("platform", ["cpu", "cpus", "tpu"])
def test_float32_is_left_to_jax(shapes, platform, transposed):
    x, weight = with_transposed(*factors(shapes, jnp.float32), transposed)
    cotangent = x[..., :4]

    def multiply(x, weight):
        return product(x, weight, platform, transposed=transposed)

    def matmul(x, weight):
        return x @ (jnp.swapaxes(weight, -1, -2) if transposed else weight)

    np.testing.assert_array_equal(multiply(x, weight), matmul(x, weight))
    jax.tree.map(
        np.testing.assert_array_equal,
        gradients(multiply, x, weight, cotangent),
        gradients(matmul, x, weight, cotangent),
    )


def step(multiply):
    """A function of both factors: the gradients of the sum of squares of their product."""

    def loss(x, weight):
        return jnp.sum(multiply(x, weight).astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def converted(lowered):
    """Returns the count of products, and those of matrices that are float32."""
    program = lowered.compile().as_text()
    pattern = r"= \w+\[([\d,]*)\]\S* dot\((%[\w.\-]+), (%[\w.\-]+)\)"
    dots = re.findall(pattern, program)
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", program))
    return len(dots), [dot for dot in dots if "f32" in (types[dot[1]], types[dot[2]])]


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_a_cpu_multiplies_bfloat16_without_conversion(batch, dtype, transposed):
    """Forward and backward: XLA converts the factors of forms for which it has no fast routine."""
    x = jax.ShapeDtypeStruct((*batch, 256, 128), jnp.bfloat16)
    shape = (384, 128) if transposed else (128, 384)
    weight = jax.ShapeDtypeStruct((*batch, *shape), jnp.bfloat16 if batch else jnp.float32)

    def matmul(x, weight):
        weight = jnp.swapaxes(weight, -1, -2) if transposed else weight
        return x @ weight.astype(x.dtype)

    assert converted(step(matmul).lower(x, weight))[1]  # else nothing is tested
    multiply = functools.partial(product, platform="cpu", transposed=transposed, dtype=dtype)
    assert converted(step(multiply).lower(x, weight)) == (3, [])


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)])
def test_no_layer_multiplies_converted_bfloat16(tiny_config, lora):
    """Heads and poolers compute in float32, layers and the language head do not."""
    config = EncoderConfig(
        tiny_config("gemma3"),
        {"a": HeadConfig(2, "language_model")},
        attention="causal",
        lora=lora,
    )
    encoder = abstract_encoder(config)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def loss(parameters, tokens):
        output = encoder.merge(parameters)(tokens, jnp.ones_like(tokens), tokens, 1)
        return jnp.sum(output.scores["a"][..., 0])

    count, slow = converted(jax.jit(jax.grad(loss)).lower(encoder.shapes, tokens))
    assert count > 3 * 2 * len(INPUT_AXES) and not slow


@pytest.mark.parametrize("batch", [(), (2,)])
def test_transposed_neighbors_change_no_layout(batch):
    """XLA on a CPU converts products of bfloat16 in some layouts, and fails for others."""

    def turn(array):
        return jnp.swapaxes(array, -1, -2)

    x, weight = factors([(*batch, 16, 8), (*batch, 8, 24)], jnp.bfloat16)

    def multiply(x, weight):
        return turn(product(turn(x), turn(weight), "cpu"))

    assert not converted(step(multiply).lower(turn(x), turn(weight)))[1]
    (_, actual), (_, expected) = (
        step(function)(turn(x), turn(weight))
        for function in (multiply, lambda x, weight: turn(turn(x) @ turn(weight).astype(x.dtype)))
    )
    for ours, plain in zip(actual, expected, strict=True):
        scale = np.abs(exact(plain)).max()
        np.testing.assert_allclose(exact(ours), exact(plain), atol=3 * HALF_STEP * scale)


@pytest.mark.parametrize("platform", ["cpus", "gpu", "tpu"])
def test_other_devices_get_one_plain_product(platform):
    """Several CPU devices too: to give a sharded array a layout, XLA would gather it."""
    x, weight = factors(SHAPES[0], jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda x, weight: product(x, weight, platform))(x, weight))
    assert program.count("dot_general") == 1
    assert "custom_vjp" not in program and "layout_constraint" not in program


def test_the_platform_is_that_of_the_mesh():
    one, all_devices = (make_mesh((1, -1, 1), jax.devices()[:count]) for count in (1, 8))
    assert platform_of(None) == platform_of(one) == "cpu"
    assert platform_of(all_devices) == "cpus"
