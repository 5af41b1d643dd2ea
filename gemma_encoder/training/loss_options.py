"""Options of losses, by the name of the loss: what `config.loss_options` holds.

An option lives with its loss: `--config.loss_options.softmax_cross_entropy.label_smoothing=0.1`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_encoder.inputs.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a loss without options."""

    def check_task(self, task: Any) -> None:
        """Raises InputError where an option does not fit a task that the loss trains."""


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropyOptions(NoOptions):
    """Options of the cross entropy of classification.

    Attributes:
        class_weights: factors on the loss of texts of each class, in label order; none for 1.
        label_smoothing: the share of the target that is spread evenly over all classes
            (arXiv 1512.00567, section 7).
        focal_gamma: exponent γ of the focal weight (1 - p)^γ, p the probability of the label
            (arXiv 1708.02002); 0 for none.
    """

    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "class_weights", tuple(self.class_weights))
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )
        if not self.focal_gamma >= 0:
            raise InputError(f"focal_gamma must be at least 0, got {self.focal_gamma}")
        if not all(weight >= 0 for weight in self.class_weights):
            raise InputError(f"class_weights must be at least 0, got {self.class_weights}")

    def check_task(self, task: Any) -> None:
        """One weight for each class."""
        if self.class_weights and len(self.class_weights) != len(task.classes):
            raise InputError(
                f"class_weights has {len(self.class_weights)} weights; task {task.name!r} has "
                f"{len(task.classes)} classes ({', '.join(task.classes)})"
            )


@dataclasses.dataclass(frozen=True)
class Poly1Options(NoOptions):
    """Options of Poly-1.

    Attributes:
        epsilon: ε, the weight of 1 - p beside the listwise softmax.
    """

    epsilon: float = 1.0


OPTIONS: dict[str, type[NoOptions]] = {
    "softmax_cross_entropy": SoftmaxCrossEntropyOptions,
    "poly1": Poly1Options,
}


def default_options() -> dict[str, dict[str, Any]]:
    """The options of every loss that has some, with their defaults, by the loss's name."""
    return {loss: dataclasses.asdict(options()) for loss, options in OPTIONS.items()}


def make_options(values: Mapping[str, Mapping[str, Any]]) -> dict[str, NoOptions]:
    """Typed options by the name of the loss; raises InputError for an unknown loss or option."""
    result = {}
    for loss, options in values.items():
        if loss not in OPTIONS:
            raise unknown("loss with options", loss, OPTIONS)
        fields = [field.name for field in dataclasses.fields(OPTIONS[loss])]
        for name in options:
            if name not in fields:
                raise unknown(f"option of {loss}", name, fields)
        try:
            result[loss] = OPTIONS[loss](**options)
        except InputError as error:
            raise InputError(f"loss_options.{loss}: {error}") from None
    return result
