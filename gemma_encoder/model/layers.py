"""Building blocks that the transformer, the poolers and the heads share.

B batch, L length, T = B · L tokens, D, I, O widths; "*B" stands for any leading axes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


def normal_param(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> nnx.Param:
    """Draws a float32 parameter from N(0, 1 / fan_in)."""
    values = jax.random.normal(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(values * fan_in**-0.5)


def spread_rows(x: Float[Array, "B ..."], mesh: Mesh | None) -> Float[Array, "B ..."]:
    """Constrains the rows of `x` to be sharded over the data and fsdp axes of the mesh.

    Without the constraint, XLA may choose to gather activations instead of parameters.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(("data", "fsdp"))))


def flat_tokens(x: Float[Array, "B L *rest"]) -> Float[Array, " T *rest"]:
    """Flattens rows and columns into one axis of tokens, T = B · L.

    The gradient of a weight is a sum over tokens. Over one axis it is a plain matrix product; over
    two, XLA on a CPU first transposes both operands, which took longer than the product.
    """
    return x.reshape(-1, *x.shape[2:])


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate` and divides the others by 1 − rate.

    Returns `x` unchanged if `key` is None or `rate` is 0.
    """
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def cap_logits(logits: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    """Applies Gemma 2's soft cap, cap · tanh(logits / cap); None leaves logits unchanged."""
    if soft_cap is None:
        return logits
    return jnp.tanh(logits / soft_cap) * soft_cap


GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


@jax.custom_vjp
def gated_gelu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes gelu(gate) · up with GELU's tanh form (arXiv 1606.08415), in float32; rounds once.

    In bfloat16, each of some thirty operations of the function and its gradient would be rounded,
    constants included. The gradient is written out so that it needs nothing but the two operands.
    """
    gate32, _, half = _gelu_parts(gate)
    return (gate32 * half * up.astype(jnp.float32)).astype(gate.dtype)


def _gelu_parts(gate: Array) -> tuple[Array, Array, Array]:
    """Returns x, x² and (1 + tanh) / 2, so that gelu(x) = x (1 + tanh) / 2."""
    x = gate.astype(jnp.float32)
    square = x * x
    tanh = jnp.tanh(GELU_SCALE * (x + GELU_CUBIC * square * x))
    return x, square, 0.5 * (1 + tanh)


def _gated_gelu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated_gelu(gate, up), (gate, up)


def _gated_gelu_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    gate, up = operands
    x, square, half = _gelu_parts(gate)
    gradient = gradient.astype(jnp.float32)
    # tanh' = 1 - tanh², which is 4 h (1 - h) for h = (1 + tanh) / 2.
    inner_slope = 2 * GELU_SCALE * (1 + 3 * GELU_CUBIC * square)
    slope = half + x * half * (1 - half) * inner_slope
    gate_gradient = gradient * up.astype(jnp.float32) * slope
    return gate_gradient.astype(gate.dtype), (gradient * (x * half)).astype(up.dtype)


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


class RMSNorm(nnx.Module):
    """RMSNorm in Gemma's form: x / rms(x) · (1 + scale) over the last axis, in float32.

    The scale starts at zero; epsilon is 1e-6.

    Args:
        width: width of the last axis.
        stack: leading axes of the parameter when layers are stacked.
    """

    def __init__(self, width: int, stack: tuple[int, ...] = ()):
        self.scale = nnx.Param(jnp.zeros((*stack, width), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes `x`; shape and dtype stay."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
        scale = self.scale[...].astype(jnp.float32)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        return (normed * (1 + scale)).astype(x.dtype)


class Linear(nnx.Module):
    """x W + b over the last axis, in float32."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.kernel = normal_param(rngs, (in_dim, out_dim), in_dim)
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Maps [..., in_dim] to [..., out_dim]."""
        return x @ self.kernel[...] + jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
