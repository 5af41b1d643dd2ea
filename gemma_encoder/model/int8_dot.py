"""The product of int8 matrices with sums in int32, in the form that the processor is fastest at.

Processors with AVX512_VNNI, but without AMX, multiply unsigned by signed bytes. XLA has routines
for that form, which took 0.36 of the time of int8 by int8 (experiments/benchmarks/README.md), but
`jax.lax.dot_general` converts factors of different dtypes to int32 on a CPU. Hence a primitive
that is lowered to the mixed product. Sums in int32 are exact, so both forms give the same numbers:

    sum (x + 128) w = sum x w + 128 sum w

T tokens, I, O widths.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jaxtyping import Array, Int, Int8, UInt8

from gemma_encoder.model import processor

OFFSET = 128  # from int8 to uint8


def int8_dot(
    x: Int8[Array, "T I"], weight: Int8[Array, "I O"], weight_sums: Int[Array, " O"]
) -> Int[Array, "T O"]:
    """Computes x W in int32, exactly.

    Args:
        x: activations.
        weight: a matrix.
        weight_sums: the sums of its columns, int32.
    """
    if not prefers_unsigned():
        dimensions = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.int32)
    return _mixed_dot(shifted(x), weight) - OFFSET * weight_sums[None]


def shifted(x: Int8[Array, "T I"]) -> UInt8[Array, "T I"]:
    """Returns x + 128."""
    return jax.lax.bitcast_convert_type(x ^ jnp.int8(-OFFSET), jnp.uint8)


def prefers_unsigned() -> bool:
    """Returns True on processors that are faster at unsigned by signed bytes."""
    return "avx512_vnni" in processor.features()


@functools.partial(jax.jit, inline=True)  # a primitive without an evaluation of its own
def _mixed_dot(x: UInt8[Array, "T I"], weight: Int8[Array, "I O"]) -> Int[Array, "T O"]:
    return _primitive.bind(x, weight)


def _lower(context: mlir.LoweringRuleContext, x: ir.Value, weight: ir.Value) -> list[ir.Value]:
    dimensions = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[1],
        rhs_contracting_dimensions=[0],
    )
    shape = context.avals_out[0].shape
    result = ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(result, x, weight, dimensions)]


_primitive = Primitive("uint8_int8_dot")
_primitive.def_abstract_eval(
    lambda x, weight: jax.core.ShapedArray((x.shape[0], weight.shape[1]), jnp.int32)
)
mlir.register_lowering(_primitive, _lower)
