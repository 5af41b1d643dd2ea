"""The small parts that the transformer, the poolers and the heads share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


def normal_param(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, 1 / fan_in)."""
    return nnx.Param(jax.random.normal(rngs.params(), tuple(shape), jnp.float32) * fan_in**-0.5)


def spread_rows(x: Float[Array, "B ..."], mesh: Mesh | None) -> Float[Array, "B ..."]:
    """`x` with its rows over the data and fsdp axes of the mesh; without it, XLA may rather gather activations than parameters."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(("data", "fsdp"))))


def flat_tokens(x: Float[Array, "B L *rest"]) -> Float[Array, "T *rest"]:
    """The tokens of all rows behind each other: T = B · L.

    The gradient of a weight is a sum over tokens. Over one axis it is a plain matrix product; over two, XLA on a CPU transposes both
    of its sides first, which took more time than the product.
    """
    return x.reshape(-1, *x.shape[2:])


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and divides the rest by 1 − rate; the identity without a key or a rate."""
    if key is None or not rate:
        return x
    return jnp.where(
        jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros_like(x)
    )


class RMSNorm(nnx.Module):
    """x / rms(x) · (1 + scale) over the last axis, in float32, epsilon 1e-6 (Gemma's form, the scale starting at zero).

    Args:
        width: of the last axis.
        stack: leading axes of the parameter when layers are stacked.
    """

    def __init__(self, width: int, stack: tuple[int, ...] = ()):
        self.scale = nnx.Param(jnp.zeros((*stack, width), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Same shape and dtype as `x`."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * (1 + jnp.expand_dims(scale, tuple(range(x.ndim - 1))))).astype(x.dtype)


class Linear(nnx.Module):
    """x W + b over the last axis, in float32."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.kernel = normal_param(rngs, (in_dim, out_dim), in_dim)
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """[..., in_dim] to [..., out_dim]."""
        return x @ self.kernel[...] + jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
