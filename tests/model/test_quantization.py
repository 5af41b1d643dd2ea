"""Int8 products: qwix's numbers, the fast forms, training equal to inference to the bit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import int8_dot, processor
from gemma_encoder.model.block import Block
from gemma_encoder.model.config import EncoderConfig, HeadConfig, LoraConfig
from gemma_encoder.model.encoder import abstract_encoder, initial_parameters, parameter_paths
from gemma_encoder.model.lora import INPUT_AXES
from gemma_encoder.model.products import product
from gemma_encoder.model.quantization import (
    Int8Matrix,
    check_platform,
    converted,
    dequantize,
    int8_product,
    quantize,
    rounded_rows,
    shared_axes,
)
from gemma_encoder.model.sizes import GEMMA_CONFIGS


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def as_stored(parameters, config):
    """Converts float32 parameters to those of a config."""
    leaves = {}
    for path, leaf in parameter_paths(parameters).items():
        axes = shared_axes(path)
        parts = converted(leaf, axes, config.weights) if axes else {"": leaf}
        leaves |= {f"{path}{suffix}": part for suffix, part in parts.items()}
    shapes = abstract_encoder(config).shapes
    assert leaves.keys() == parameter_paths(shapes).keys()
    ordered = [leaves[path] for path in parameter_paths(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


@pytest.mark.parametrize("matrix", INPUT_AXES)
def test_a_layer_has_the_numbers_of_qwix(matrix, tiny_config):
    """Each product of a layer, as qwix computes it from its own quantized factors."""
    import qwix
    from flax import nnx

    weight = getattr(Block(tiny_config("gemma3"), "global", rngs=nnx.Rngs(0)), matrix)[...]
    in_dim = int(np.prod(weight.shape[: INPUT_AXES[matrix]]))
    weight = weight.reshape(in_dim, -1)
    x = normal(40, in_dim) * 3
    with jax.numpy_dtype_promotion("standard"):  # as qwix is written for
        expected = qwix.dot_general(
            qwix.quantize(x, jnp.int8, channelwise_axes=[0]),
            qwix.quantize(weight, jnp.int8, channelwise_axes=[1]),
            (((1,), (0,)), ((), ())),
        )
    np.testing.assert_array_equal(int8_product(x, weight, "cpu"), expected)
    np.testing.assert_array_equal(int8_product(x, Int8Matrix.of(weight, (0,)), "cpu"), expected)


def test_zeros_and_extremes_are_exact():
    x = jnp.asarray([[0.0, 0.0], [127.5, -127.5], [1e-30, 0.0]])
    quantized = quantize(x, (-1,))
    np.testing.assert_array_equal(quantized.values, [[0, 0], [127, -128], [0, 0]])
    np.testing.assert_array_equal(quantized.scale, [[1], [1], [1]])
    assert not dequantize(quantized)[0].any()


@pytest.mark.parametrize("unsigned", [True, False])
def test_both_forms_of_the_product_are_exact(unsigned, monkeypatch):
    monkeypatch.setattr(int8_dot, "prefers_unsigned", lambda: unsigned)
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-128, 128, shape, np.int8) for shape in ((33, 2048), (2048, 16)))
    x[0], weight[:, 0] = -128, -128  # the largest sum
    sums = weight.sum(0, dtype=np.int32)
    expected = x.astype(np.int64) @ weight.astype(np.int64)
    result = jax.jit(lambda *factors: int8_dot.int8_dot(*factors))(x, weight, sums)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("flags", "unsigned"), [("avx2 avx512_vnni", True), ("avx2", False)])
def test_the_form_is_that_of_the_processor(flags, unsigned, monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset(flags.split()))
    assert int8_dot.prefers_unsigned() is unsigned


@pytest.mark.parametrize("unsigned", [True, False])
def test_products_stay_in_int8(unsigned, monkeypatch, tiny_config):
    """XLA converts the factors of forms for which it has no fast routine."""
    monkeypatch.setattr(int8_dot, "prefers_unsigned", lambda: unsigned)
    transformer = tiny_config("gemma3", num_layers=2, pattern=("local", "global"))
    config = EncoderConfig(transformer, quantization="int8", weights="int8")
    encoder = abstract_encoder(config)
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    program = jax.jit(lambda p, x: encoder.merge(p)(x, x, x, 1).pooled)
    text = program.lower(encoder.shapes, tokens).compile().as_text()
    dots = re.findall(r"= s32\[[\d,]*\]\S* dot\((%[\w.\-]+), (%[\w.\-]+)\)", text)
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
    # Query, key and value, attention's output, gate, up, feed-forward output: of two layers.
    assert [(types[x], types[w]) for x, w in dots] == [("u8" if unsigned else "s8", "s8")] * 12


def test_gradients_are_those_of_the_rounded_factors():
    x, weight, cotangent = normal(6, 5), normal(5, 4, seed=1), normal(6, 4, seed=2)
    _, pull_back = jax.vjp(lambda x, weight: int8_product(x, weight, "cpu"), x, weight)
    rounded = dequantize(quantize(x, (-1,))), dequantize(quantize(weight, (0,)))
    _, expected = jax.vjp(lambda x, weight: product(x, weight, "cpu"), *rounded)
    jax.tree.map(np.testing.assert_array_equal, pull_back(cotangent), expected(cotangent))
    _, pull_back = jax.vjp(rounded_rows, x)
    np.testing.assert_array_equal(pull_back(rounded[0])[0], rounded[0])


@pytest.fixture(scope="module")
def encoded(tiny_config):
    """`encoded(**changes)`: outputs of an encoder of one set of weights, as a config stores them.

    Its head is a language model, which reads the embedding table.
    """
    transformer = tiny_config("gemma3", num_layers=3, pattern=("local", "global"))
    head = HeadConfig(2, "language_model")
    base = EncoderConfig(transformer, {"text": head}, attention="causal", compute_dtype="float32")
    parameters = initial_parameters(base, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)

    def run(**changes):
        config = dataclasses.replace(base, **changes)
        stored = as_stored(parameters, config)
        encoder = abstract_encoder(config)
        forward = jax.jit(lambda p: encoder.merge(p)(tokens, jnp.ones_like(tokens), tokens * 0, 1))
        return forward(stored)

    return run


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_computes_what_inference_does(compute_dtype, encoded):
    """To the bit: weights quantized on the way, and weights stored in int8."""
    trained, stored = (
        encoded(quantization="int8", weights=weights, compute_dtype=compute_dtype)
        for weights in ("float32", "int8")
    )
    jax.tree.map(np.testing.assert_array_equal, trained, stored)


@pytest.mark.parametrize(
    ("quantization", "weights", "error"), [("int8", "int8", 0.05), ("none", "bfloat16", 0.01)]
)
def test_rounded_weights_change_outputs_little(quantization, weights, error, encoded):
    exact = encoded().pooled
    rounded = encoded(quantization=quantization, weights=weights).pooled
    assert 0 < jnp.abs(rounded - exact).max() < error * jnp.abs(exact).max()


def test_int8_takes_a_quarter_of_the_memory():
    """All parameters of a published size, scales included."""
    float32 = EncoderConfig(GEMMA_CONFIGS["gemma3_270m"], {"a": 2})

    def size(**changes):
        shapes = abstract_encoder(dataclasses.replace(float32, **changes)).shapes
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    assert size(quantization="int8", weights="int8") < 0.26 * size()
    assert size(weights="bfloat16") < 0.51 * size()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int4"}, "int4"),
        ({"weights": "float16"}, "float16"),
        ({"weights": "int8"}, "int8 weights are for quantization='int8'"),
        ({"quantization": "int8", "weights": "bfloat16"}, "contradict each other"),
        ({"quantization": "int8", "lora": LoraConfig(2)}, "merge them first"),
        ({"weights": "bfloat16", "lora": LoraConfig(2)}, "merge them first"),
    ],
)
def test_what_is_not_covered_is_refused(changes, message, tiny_config):
    with pytest.raises(InputError, match=re.escape(message)):
        EncoderConfig(tiny_config("gemma3"), **changes)


def test_only_cpus_are_covered():
    check_platform("cpu")
    for platform in ("gpu", "tpu"):
        with pytest.raises(InputError, match=f"on a {platform.upper()}; use weights='bfloat16'"):
            check_platform(platform)
