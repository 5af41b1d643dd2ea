"""Int8 products: weights are quantized by output channel, activations dynamically by token.

The arithmetic is that of qwix's post-training quantization with "absmax" calibration:

    scale = max |x| / 127.5,   q = round(x / scale) in [-128, 127],   x ≈ q · scale

Products are sums of int8 · int8 in int32, which are exact, times both scales, in float32. In
training, the forward pass is the same to the bit, and gradients are those of the product of the
dequantized factors (straight-through estimator).

T tokens, I, O widths; "*B" stands for any leading axes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.int8_dot import int8_dot
from gemma_encoder.model.lora import INPUT_AXES
from gemma_encoder.model.products import product

BOUND = 127.5  # half a step beyond the largest int8, which values up to the bound round to
# Suffixes of parameter names: the int8 matrix "query" has "query_scale" and "query_sum".
SCALE = "_scale"
SUM = "_sum"


class Quantized(NamedTuple):
    """An int8 array and its scales, float32, with axes of size 1 where values share a scale."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(x: Float[Array, "..."], axes: Sequence[int]) -> Quantized:
    """Quantizes an array; values along `axes` share a scale."""
    x = _rounded(x.astype(jnp.float32), x.dtype)
    # Two reductions; for that of |x|, XLA on a CPU first writes |x|.
    largest, smallest = (
        reduce(x, axis=tuple(axes), keepdims=True) for reduce in (jnp.max, jnp.min)
    )
    scale = jnp.maximum(largest, -smallest) / BOUND
    # Zeros, and values whose quotients would overflow, become zeros.
    scale = jnp.where(scale < jnp.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, scale)
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)  # the cast saturates


def dequantize(array: Quantized) -> Float[Array, "..."]:
    """Returns the float32 values of a quantized array."""
    return array.values.astype(jnp.float32) * array.scale


class Int8Matrix(NamedTuple):
    """An int8 parameter of a layer, [*I, *O], with the scales and sums of its columns, [*O]."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    sums: Int[Array, "..."]

    @classmethod
    def of(cls, weight: Float[Array, "..."], axes: Sequence[int]) -> "Int8Matrix":
        """Quantizes a float32 parameter, whose `axes` products contract."""
        values, scale = quantize(weight, axes)
        sums = jnp.sum(values, axis=tuple(axes), dtype=jnp.int32)
        return cls(values, scale.squeeze(tuple(axes)), sums)

    def flat(self, in_dim: int) -> "Int8Matrix":
        """Flattens the axes that products contract, and the others: [in_dim, O]."""
        return Int8Matrix(
            self.values.reshape(in_dim, -1), self.scale.reshape(-1), self.sums.reshape(-1)
        )

    def part(self, in_axes: int, index: tuple[int, ...]) -> "Int8Matrix":
        """Returns a part of the outputs; the first `in_axes` axes are the inputs."""
        values = self.values[(slice(None),) * in_axes + index]
        return Int8Matrix(values, self.scale[index], self.sums[index])


def int8_product(
    x: Float[Array, "T I"], weight: Int8Matrix | Float[Array, "I O"], platform: str
) -> Float[Array, "T O"]:
    """Computes x W in int8; the result has the dtype of `x`.

    Args:
        x: activations.
        weight: an int8 parameter; or a float32 one, which is quantized on the way and trained.
        platform: as returned by `products.platform_of`; used for gradients.
    """
    if isinstance(weight, Int8Matrix):
        return _multiply(quantize(x, (-1,)), weight, x.dtype)
    return _trained_product(x, weight, platform)


def _multiply(x: Quantized, weight: Int8Matrix, dtype: jnp.dtype) -> Float[Array, "T O"]:
    scale, sums = _computed_apart(weight.scale, weight.sums)
    products = int8_dot(x.values, weight.values, sums)
    return _rounded(products.astype(jnp.float32) * x.scale * scale[None], dtype).astype(dtype)


def _computed_apart(*vectors: Array) -> tuple[Array, ...]:
    """Returns vectors, the first of them positive, as arrays that later loops read.

    XLA on a CPU otherwise slices the vectors of all layers anew for each element of a product,
    with which a feed-forward layer took 1.4 times as long. It ignores `optimization_barrier`, but
    computes the results of a condition, here one that is always true, before their use.
    """
    zeros = tuple(map(jnp.zeros_like, vectors))
    return jax.lax.cond(vectors[0][0] > 0, lambda: vectors, lambda: zeros)


def _rounded(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Rounds float32 values to those of a dtype; XLA may leave out a mere cast and its inverse."""
    if dtype == jnp.float32:
        return x
    precision = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _trained_product(x: Array, weight: Array, platform: str) -> Array:
    return _forward(x, weight, platform)[0]


def _forward(x: Array, weight: Array, platform: str) -> tuple[Array, tuple]:
    del platform
    factors = quantize(x, (-1,)), Int8Matrix.of(weight, (0,))
    # Empty arrays tell the backward pass the dtypes; the quantized factors take a quarter.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, weight.dtype)
    return _multiply(*factors, x.dtype), (factors, dtypes)


def _backward(platform: str, residuals: tuple, gradient: Array) -> tuple[Array, Array]:
    (x, weight), dtypes = residuals
    factors = x, Quantized(weight.values, weight.scale[None])
    x, weight = (
        dequantize(factor).astype(empty.dtype)
        for factor, empty in zip(factors, dtypes, strict=True)
    )
    _, pull_back = jax.vjp(functools.partial(product, platform=platform), x, weight)
    return pull_back(gradient)


_trained_product.defvjp(_forward, _backward)


@jax.custom_vjp
def rounded_rows(x: Float[Array, "*B I"]) -> Float[Array, "*B I"]:
    """Rounds each row to the values that int8 can represent; its gradient is passed through."""
    return dequantize(quantize(x, (-1,)))


rounded_rows.defvjp(lambda x: (rounded_rows(x), None), lambda _, gradient: (gradient,))


def store(module: nnx.Module, matrices: dict[str, Sequence[int]], weights: str) -> None:
    """Converts parameters of a module to the dtype in which weights are stored.

    Args:
        module: a layer or a transformer.
        matrices: the axes that share a scale, by name of the parameter.
        weights: "float32", "bfloat16" or "int8", which adds parameters with scales and sums.
    """
    for name, axes in matrices.items():
        for suffix, leaf in converted(getattr(module, name)[...], axes, weights).items():
            setattr(module, f"{name}{suffix}", nnx.Param(leaf))


def converted(leaf: Array, axes: Sequence[int], weights: str) -> dict[str, Array]:
    """Returns a float32 parameter as it is stored, by suffix of its name; see `store`."""
    if weights != "int8":
        return {"": leaf.astype(weights)}
    values, scale, sums = Int8Matrix.of(leaf, axes)
    if axes[-1] == leaf.ndim - 1:  # the embedding table, whose rows are only read
        return {"": values, SCALE: scale}
    return {"": values, SCALE: scale, SUM: sums}


def shared_axes(path: str) -> tuple[int, ...]:
    """Returns the axes of a parameter that share a scale; empty if it stays in float32.

    Norms, poolers and heads stay in float32. The rows of the embedding table have scales.
    """
    group, _, name = path.removeprefix("backbone/").rpartition("/")
    if path == "backbone/embedding":
        return (1,)
    if not path.startswith("backbone/") or group.count("/") != 1 or name not in INPUT_AXES:
        return ()
    return matrix_axes(name, stacked=group.startswith("blocks/"))


def matrix_axes(name: str, stacked: bool) -> tuple[int, ...]:
    """Returns the axes of a matrix of a layer, or of stacked layers, that products contract."""
    return tuple(range(stacked, stacked + INPUT_AXES[name]))


def check_platform(platform: str) -> None:
    """Raises InputError if int8 is not supported on a platform."""
    if platform not in ("cpu", "cpus"):
        raise InputError(
            f"quantization='int8' is for CPUs, the model runs on a {platform.upper()}; use "
            "weights='bfloat16' there"
        )
