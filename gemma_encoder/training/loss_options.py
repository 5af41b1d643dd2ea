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
class RetrievalLossOptions:
    """Options of the losses of retrieval."""

    temperature: float = option(
        0.05, "divisor of similarities; 0.01 to 0.05 for cosines, 1 for dot products"
    )
    both_directions: bool = option(
        False, "info_nce: also tell the query of each positive from the other queries"
    )
    widths: tuple[int, ...] = option(
        (), "Matryoshka: also train the first N dimensions of the vectors, for each N listed"
    )
    false_negative_margin: float = option(
        0.0,
        "info_nce: leave out negatives more similar than the best positive by this; 0: none",
    )
    teacher_temperature: float = option(1.0, "kl: divisor of the teacher's scores")
    query_flops: float = option(0.0, "sparse: weight of the FLOPS regularizer of queries")
    document_flops: float = option(0.0, "sparse: weight of the FLOPS regularizer of documents")
    flops_ramp: int = option(0, "sparse: steps in which these weights rise, quadratically, from 0")

    def __post_init__(self):
        path = "loss_options.retrieval"
        for name in ("temperature", "teacher_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{path}.{name} must be positive, got {getattr(self, name)}")
        check_at_least(
            path,
            self,
            ("false_negative_margin", "query_flops", "document_flops", "flops_ramp"),
            0,
        )
        if len(set(self.widths)) < len(self.widths) or any(width < 1 for width in self.widths):
            raise InputError(
                f"{path}.widths must be different widths of at least 1, got {self.widths}"
            )

    def check_task(self, task: Task) -> None:
        """Accepts any task; widths are checked against the model."""


@dataclasses.dataclass(frozen=True)
class LossOptionsConfig:
    """Options by name of the loss, or for all losses of retrieval."""

    softmax_cross_entropy: SoftmaxCrossEntropyOptions = option(
        SoftmaxCrossEntropyOptions(), "classification cross entropy"
    )
    poly1: Poly1Options = option(Poly1Options(), "Poly-1 loss of ranking and choice")
    retrieval: RetrievalLossOptions = option(RetrievalLossOptions(), "losses of retrieval")
