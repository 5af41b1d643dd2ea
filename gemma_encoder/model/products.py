"""Matrix products of the model, with sums in float32, forward and backward, on every device.

TPUs and GPUs add products of bfloat16 in float32 and round once. XLA on a CPU does so too, but it
uses the processor's bfloat16 instructions only for products that are asked for in float32 and that
contract the last axis of their first operand. Others are computed in float32 after both operands
were converted, at a tenth to a half of the speed (experiments/benchmarks/README.md). Hence the
forms below. Products of float32 are left to JAX.

T tokens, I, O widths; "*B" stands for any leading axes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Float


def platform_of(mesh: Mesh | None) -> str:
    """Returns "cpu", "gpu" or "tpu": where arrays on the mesh, or without one, are computed."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def product(
    x: Float[Array, "*B T I"], weight: Float[Array, "*B I O"], platform: str
) -> Float[Array, "*B T O"]:
    """Computes x W in the dtype of `x`, to which the weight is cast.

    The gradient of the weight has the weight's own dtype: that of a float32 parameter is not
    rounded to bfloat16 in between.

    Args:
        x: activations.
        weight: a parameter, or other activations.
        platform: as returned by `platform_of`.
    """
    if x.dtype == jnp.float32 or platform != "cpu":
        return x @ weight.astype(x.dtype)
    return _product(x, weight)


@jax.custom_vjp
def _product(x: Array, weight: Array) -> Array:
    return _dot(x, weight.astype(x.dtype), -2).astype(x.dtype)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight), (x, weight)


def _backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = operands
    x_gradient = _dot(gradient, weight.astype(x.dtype), -1).astype(x.dtype)
    # The transposed array is written out: as a mere view, it would be a form that is not fast.
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    transposed = with_layout_constraint(jnp.swapaxes(x, -1, -2), layout)
    return x_gradient, _dot(transposed, gradient, -2).astype(weight.dtype)


_product.defvjp(_forward, _backward)


def _dot(first: Array, second: Array, axis: int) -> Array:
    """Contracts the last axis of `first` with an axis of `second`, in float32."""
    batch = tuple(range(first.ndim - 2))
    contracted = (first.ndim - 1,), (second.ndim + axis,)
    return jax.lax.dot_general(
        first, second, (contracted, (batch, batch)), preferred_element_type=jnp.float32
    )
