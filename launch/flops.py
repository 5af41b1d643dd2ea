"""How many operations a program does: its matrix products, counted in the program itself, loops taken as often as they run."""

import math
from typing import Any

from jax.extend import core


def count(jaxpr: Any, chips: int) -> float:
    """Floating-point operations of all matrix products, over all chips, recomputation included.

    Within `shard_map` shapes are those of one chip, so what is found there counts for each. A Pallas kernel counts every block of its
    grid: also those that a mask lets it skip. Of branches, the costliest counts.

    Args:
        jaxpr: of the whole program.
        chips: of the mesh.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            ((contracted, _), _) = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[axis] for axis in contracted)
            )
            continue
        if name == "cond":
            total += max(count(branch.jaxpr, chips) for branch in parameters["branches"])
            continue
        times = 1
        if name == "scan":
            times = parameters["length"]
        elif name == "shard_map":
            times = chips
        elif name == "pallas_call":
            times = math.prod(parameters["grid_mapping"].grid)
        total += times * sum(
            count(getattr(inner, "jaxpr", inner), chips)
            for inner in core.jaxprs_in_params(parameters)
        )
    return total
