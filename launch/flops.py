"""Counts the FLOPs of a program from its jaxpr: matrix products, multiplied by loop trip counts."""

import math
from typing import Any

from jax.extend import core


def count(jaxpr: Any, chips: int) -> float:
    """Returns the FLOPs of all matrix products, over all chips, recomputation included.

    Shapes inside `shard_map` are those of one chip, so FLOPs there are multiplied by the number of
    chips. A Pallas kernel counts every block of its grid, including blocks that a mask skips.
    A conditional counts its most expensive branch.

    Args:
        jaxpr: the jaxpr of the whole program.
        chips: the number of chips in the mesh.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        if primitive == "dot_general":
            total += _dot_general_flops(equation)
        elif primitive == "cond":
            branches = equation.params["branches"]
            total += max(count(branch.jaxpr, chips) for branch in branches)
        else:
            inner_jaxprs = core.jaxprs_in_params(equation.params)
            inner_flops = sum(
                count(getattr(inner, "jaxpr", inner), chips) for inner in inner_jaxprs
            )
            total += _repetitions(equation, chips) * inner_flops
    return total


def _dot_general_flops(equation: Any) -> float:
    """Returns two FLOPs (multiply and add) for each output element and contracted element."""
    ((contracted, _), _) = equation.params["dimension_numbers"]
    left_shape = equation.invars[0].aval.shape
    output_size = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * output_size * math.prod(left_shape[axis] for axis in contracted)


def _repetitions(equation: Any, chips: int) -> int:
    """Returns how often the jaxprs inside an equation run."""
    primitive = equation.primitive.name
    if primitive == "scan":
        return equation.params["length"]
    if primitive == "shard_map":
        return chips
    if primitive == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1
