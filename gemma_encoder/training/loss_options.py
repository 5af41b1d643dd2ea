"""Options of losses: `config.loss_options`, with a group of fields for each loss that has any.

For example `--config.loss_options.softmax_cross_entropy.label_smoothing=0.1`.
"""

import dataclasses
import math

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import check_at_least, option
from gemma_encoder.inputs.task import Task


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropyOptions:
    """Options of the classification cross entropy."""

    class_weights: tuple[float, ...] = option(
        (), "weight of the loss of each class, in label order; by default 1"
    )
    label_smoothing: float = option(
        0.0, "probability spread evenly over all classes (arXiv 1512.00567, section 7)"
    )
    focal_gamma: float = option(
        0.0, "exponent γ of the focal weight (1 - p)^γ (arXiv 1708.02002); 0: no focal weight"
    )

    def __post_init__(self):
        path = "loss_options.softmax_cross_entropy"
        check_at_least(path, self, ("label_smoothing",), 0, below=1)
        check_at_least(path, self, ("focal_gamma",), 0)
        weights = self.class_weights
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
            raise InputError(
                f"{path}.class_weights must be at least 0, and not all 0, got {weights}"
            )

    def check_task(self, task: Task) -> None:
        """Raises InputError unless there is one weight per class of the task."""
        if self.class_weights and len(self.class_weights) != len(task.classes):
            raise InputError(
                f"loss_options.softmax_cross_entropy.class_weights has {len(self.class_weights)} "
                f"weights; task {task.name!r} has {len(task.classes)} classes "
                f"({', '.join(task.classes)})"
            )


@dataclasses.dataclass(frozen=True)
class Poly1Options:
    """Options of Poly-1."""

    epsilon: float = option(
        1.0, "ε, the weight of the term 1 - p that is added to the cross entropy -log p"
    )

    def __post_init__(self):
        if not math.isfinite(self.epsilon):
            raise InputError(f"loss_options.poly1.epsilon must be finite, got {self.epsilon}")

    def check_task(self, task: Task) -> None:
        """Accepts any task."""


@dataclasses.dataclass(frozen=True)
class LossOptionsConfig:
    """Options by name of the loss."""

    softmax_cross_entropy: SoftmaxCrossEntropyOptions = option(
        SoftmaxCrossEntropyOptions(), "classification cross entropy"
    )
    poly1: Poly1Options = option(Poly1Options(), "Poly-1 loss of ranking and choice")
