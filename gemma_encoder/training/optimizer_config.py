"""Options of the optimizer; `optimizer.py` builds it, which needs JAX."""

import dataclasses
import math
import re

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import check_at_least, option

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adafactor")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning-rate schedule, and rules by parameter path.

    Rules see a path per layer, for example `freeze=r"backbone/(embedding|layers/[0-8]/.*)"`.
    Adafactor has factored second moments and no first moments, and clips updates by the root mean
    square of their layer; its learning rate is absolute, not relative to the parameters' scale.
    AdamW's second moment is always float32: with b2 near 1, bfloat16 would round most of its
    updates away.
    """

    learning_rate: float = option(1e-4, "peak learning rate, reached after warmup")
    schedule: str = option(
        "linear", 'decay of the learning rate to zero: "linear", "cosine", or "constant" (no decay)'
    )
    name: str = option("adamw", '"adamw", or "adafactor" (arXiv 1804.04235)')
    b1: float = option(0.9, "decay rate of AdamW's first moment")
    b2: float = option(0.999, "decay rate of AdamW's second moment")
    epsilon: float = option(1e-8, "epsilon of AdamW")
    moment_dtype: str = option(
        "float32", "dtype of AdamW's first moment; the second is always float32"
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay of parameters that `no_decay` does not match"
    )
    no_decay: str = option(
        r"(scale|bias|probes|embedding)$",
        "regular expression; no weight decay where it matches a part of a parameter's path",
    )
    clip_norm: float = option(1.0, "maximum global norm of the gradients; 0: no clipping")
    freeze: str = option(
        "", "regular expression; parameters are frozen where it matches the whole path"
    )
    multipliers: tuple[tuple[str, float], ...] = option(
        (),
        "(regular expression, factor) pairs; the first that matches the whole path of a parameter "
        "scales its learning rate",
    )
    layer_decay: float = option(1.0, "learning rate of a layer relative to the layer above it")

    def __post_init__(self):
        for field, valid in (
            ("name", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("moment_dtype", MOMENT_DTYPES),
        ):
            if getattr(self, field) not in valid:
                raise unknown(f"optimizer.{field}", getattr(self, field), valid)
        check_at_least("optimizer", self, ("learning_rate", "weight_decay", "clip_norm"), 0)
        check_at_least("optimizer", self, ("b1", "b2"), 0, below=1)
        if not 0 < self.epsilon < math.inf:
            raise InputError(f"optimizer.epsilon must be positive, got {self.epsilon}")
        for pattern, factor in self.multipliers:
            if not 0 <= factor < math.inf:
                raise InputError(
                    f"optimizer.multipliers: the factor of {pattern!r} must be at least 0, "
                    f"got {factor}"
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
                    f"optimizer.{name}: {pattern!r} is not a regular expression: {error}"
                ) from None
