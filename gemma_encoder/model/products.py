"""Matrix products of the model, with sums in float32, forward and backward, on every device.

TPUs and GPUs add products of bfloat16 in float32 and round once. XLA on a CPU does so too, but it
uses the processor's bfloat16 instructions only for products that are asked for in float32 and that
contract the last axis of their first operand. Others are computed in float32 after both operands
were converted, at a tenth to a half of the speed (experiments/benchmarks/README.md). Hence the
forms below. Products of float32 are left to JAX.

T tokens, I, O widths; "*B" stands for any leading axes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Float

PRODUCT = "product"  # name of the results that the rematerialization policy "dots" saves


def platform_of(mesh: Mesh | None) -> str:
    """Returns where arrays on the mesh, or without one, are computed.

    "gpu", "tpu", "cpu" for one CPU device, or "cpus" for several: XLA would gather an array that is
    sharded over them to give it a layout, so their products are plain.
    """
    if mesh is None:
        return jax.default_backend()
    platform = mesh.devices.flat[0].platform
    return "cpus" if platform == "cpu" and mesh.size > 1 else platform


def product(
    x: Float[Array, "*B T I"],
    weight: Float[Array, "*B I O"] | Float[Array, "*B O I"],
    platform: str,
    *,
    transposed: bool = False,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*B T O"]:
    """Computes x W, or x Wᵀ, in the dtype of `x`, to which the weight is cast.

    The gradient of the weight has the weight's own dtype: that of a float32 parameter is not
    rounded to bfloat16 in between.

    Args:
        x: activations.
        weight: a parameter, or other activations.
        platform: as returned by `platform_of`.
        transposed: the weight is [*B, O, I].
        dtype: of the result; by default that of `x`. The gradient of a float32 result is rounded to
            the dtype of `x` before it is multiplied, as on a TPU.
    """
    dtype = dtype or x.dtype
    if x.dtype == jnp.float32 or platform != "cpu":
        return _dot(x, weight.astype(x.dtype), -1 if transposed else -2, dtype)
    return _product(x, weight, transposed, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: Array, transposed: bool, dtype: jnp.dtype) -> Array:
    return _fast_dot(x, weight.astype(x.dtype), -1 if transposed else -2).astype(dtype)


def _forward(
    x: Array, weight: Array, transposed: bool, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight, transposed, dtype), (x, weight)


def _backward(
    transposed: bool, dtype: jnp.dtype, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    del dtype
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    x_gradient = _fast_dot(gradient, weight.astype(x.dtype), -2 if transposed else -1)
    # Of the two, the narrower is transposed: it is less to copy. If the wider one is the result of
    # a function, XLA would compute it while it copies, with strides.
    first, second = sorted((x, gradient), key=lambda operand: operand.shape[-1])
    weight_gradient = _fast_dot(jnp.swapaxes(first, -1, -2), second, -2)
    if (first is x) == transposed:
        weight_gradient = jnp.swapaxes(weight_gradient, -1, -2)
    return x_gradient.astype(x.dtype), weight_gradient.astype(weight.dtype)


_product.defvjp(_forward, _backward)


def _fast_dot(first: Array, second: Array, axis: int) -> Array:
    # Transposed operands are written out: as mere views, they would make a form that is not fast.
    # If a transposition follows, XLA may ask a product for its layout, and then has no routine.
    return _row_major(_dot(_row_major(first), _row_major(second), axis, jnp.float32))


def _dot(first: Array, second: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Contracts the last axis of `first` with an axis of `second`."""
    batch = tuple(range(first.ndim - 2))
    contracted = (first.ndim - 1,), (second.ndim + axis,)
    return jax.lax.dot_general(
        first, second, (contracted, (batch, batch)), preferred_element_type=dtype
    )


def _row_major(array: Array) -> Array:
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))
