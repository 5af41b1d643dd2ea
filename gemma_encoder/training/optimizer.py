"""Optimisers and schedules by config: optax's own."""

import dataclasses
import re

import jax
import optax

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model.encoder import parameter_paths

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """What a config says about the optimiser.

    Attributes:
        learning_rate: the peak, reached after warm-up.
        schedule: how it falls to zero by the last step: "linear", "cosine", or "constant" (not at all).
        b1, b2, epsilon: of AdamW.
        weight_decay: decoupled, on every parameter whose path does not match `no_decay`.
        no_decay: a regular expression, searched in the path.
        clip_norm: the global gradient norm is clipped to it; 0 for no clipping.
    """

    learning_rate: float
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    no_decay: str = r"(scale|bias|probes|embedding)$"
    clip_norm: float = 1.0


def make_schedule(options: OptimizerOptions, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over `warmup` steps, then the fall."""
    if options.schedule not in SCHEDULES:
        raise unknown("schedule", options.schedule, SCHEDULES)
    if not 0 <= warmup <= steps:
        raise InputError(f"warmup of {warmup} steps does not fit in a training of {steps}")
    peak, rest = options.learning_rate, max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[options.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(options: OptimizerOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with clipping, a schedule, and weight decay by path."""

    def decayed(parameters):
        mask = {path: re.search(options.no_decay, path) is None for path in parameter_paths(parameters)}
        return jax.tree.unflatten(jax.tree.structure(parameters), list(mask.values()))

    adamw = optax.adamw(schedule, b1=options.b1, b2=options.b2, eps=options.epsilon, weight_decay=options.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw) if options.clip_norm else adamw
