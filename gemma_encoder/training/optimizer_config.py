"""Options of the optimizer, apart from the optimizer itself, which needs JAX."""

import dataclasses
import math
import re

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import option

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adafactor")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and rules on parameters by their paths.

    Rules see one path for each layer, for example `freeze=r"backbone/(embedding|layers/[0-8]/.*)"`.
    Adafactor has factored second moments, no first ones, and clips updates by their layer's root
    mean square; its learning rate is the schedule's, not relative to the parameters. AdamW's second
    moment is float32: with b2 near one, what bfloat16 would add to it is mostly rounded away.
    """

    learning_rate: float = option(1e-4, "the peak, reached after warm-up")
    schedule: str = option("linear", 'the fall to zero: "linear", "cosine", or "constant" (none)')
    name: str = option("adamw", '"adamw", or "adafactor" (arXiv 1804.04235)')
    b1: float = option(0.9, "decay of AdamW's first moment")
    b2: float = option(0.999, "decay of AdamW's second moment")
    epsilon: float = option(1e-8, "of AdamW")
    moment_dtype: str = option("float32", "of AdamW's first moment; the second is always float32")
    weight_decay: float = option(0.0, "decoupled, on parameters that `no_decay` does not match")
    no_decay: str = option(
        r"(scale|bias|probes|embedding)$", "regular expression, searched in a parameter's path"
    )
    clip_norm: float = option(1.0, "most that the global gradient norm may be; 0 for no clipping")
    freeze: str = option("", "regular expression; parameters whose whole path it matches are kept")
    multipliers: tuple[tuple[str, float], ...] = option(
        (), "(expression, factor) pairs; the first that matches a path scales its learning rate"
    )
    layer_decay: float = option(1.0, "learning rate of a layer over that of the layer above it")

    def __post_init__(self):
        for field, valid in (
            ("name", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("moment_dtype", MOMENT_DTYPES),
        ):
            if getattr(self, field) not in valid:
                raise unknown(f"optimizer.{field}", getattr(self, field), valid)
        for field in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(
                    f"optimizer.{field} must be at least 0, got {getattr(self, field)}"
                )
        if not 0 < self.layer_decay <= 1:
            raise InputError(
                f"optimizer.layer_decay must be above 0 and at most 1, got {self.layer_decay}"
            )
        patterns = [("multipliers", pair[0]) for pair in self.multipliers]
        for name, pattern in [("no_decay", self.no_decay), ("freeze", self.freeze), *patterns]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"optimizer.{name}: {pattern!r} is no regular expression: {error}"
                ) from None
