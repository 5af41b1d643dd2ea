"""Options of losses: `config.loss_options`, a group of fields for each loss that has some.

An option lives with its loss: `--config.loss_options.softmax_cross_entropy.label_smoothing=0.1`.
"""

import dataclasses
import math

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import option
from gemma_encoder.inputs.task import Task


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropyOptions:
    """Options of the cross entropy of classification."""

    class_weights: tuple[float, ...] = option(
        (), "factors on the loss of texts of each class, in label order; by default 1"
    )
    label_smoothing: float = option(
        0.0, "share of the target spread evenly over all classes (arXiv 1512.00567, section 7)"
    )
    focal_gamma: float = option(
        0.0, "exponent γ of the focal weight (1 - p)^γ (arXiv 1708.02002); 0 for none"
    )

    def __post_init__(self):
        path = "loss_options.softmax_cross_entropy"
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"{path}.label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )
        if not 0 <= self.focal_gamma < math.inf:
            raise InputError(f"{path}.focal_gamma must be at least 0, got {self.focal_gamma}")
        weights = self.class_weights
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
            raise InputError(
                f"{path}.class_weights must be at least 0, and one of them more, got {weights}"
            )

    def check_task(self, task: Task) -> None:
        """Raises InputError unless there is one weight for each class of a task."""
        if self.class_weights and len(self.class_weights) != len(task.classes):
            raise InputError(
                f"loss_options.softmax_cross_entropy.class_weights has {len(self.class_weights)} "
                f"weights; task {task.name!r} has {len(task.classes)} classes "
                f"({', '.join(task.classes)})"
            )


@dataclasses.dataclass(frozen=True)
class Poly1Options:
    """Options of Poly-1."""

    epsilon: float = option(1.0, "ε, the weight of 1 - p beside the listwise softmax")

    def __post_init__(self):
        if not math.isfinite(self.epsilon):
            raise InputError(f"loss_options.poly1.epsilon must be finite, got {self.epsilon}")

    def check_task(self, task: Task) -> None:
        """Any list will do."""


@dataclasses.dataclass(frozen=True)
class LossOptionsConfig:
    """The options of every loss that has some, by its name."""

    softmax_cross_entropy: SoftmaxCrossEntropyOptions = option(
        SoftmaxCrossEntropyOptions(), "cross entropy of classification"
    )
    poly1: Poly1Options = option(Poly1Options(), "Poly-1, of ranking and choice")
