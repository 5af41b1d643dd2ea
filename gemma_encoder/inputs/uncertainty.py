"""Uncertainty of predictions: stored calibration, confidences, conformal sets and intervals.

`Kind` inherits the interface `Uncertainty`, whose defaults are those of kinds without
probabilities. What is fitted, and how, is in `evaluation.calibration`.

Shapes: N examples, C classes, M events, each with a probability and an outcome.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_encoder.inputs.errors import InputError

if TYPE_CHECKING:
    from gemma_encoder.inputs.kind import Label
    from gemma_encoder.inputs.task import Task

LEVELS = tuple(percent / 100 for percent in range(50, 100))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration of a task's outputs, fitted on a split that training did not use.

    Attributes:
        temperature: divides the scores (ordinal tasks: the cumulative logits) before they become
            probabilities; 1 leaves them unchanged.
        thresholds: the conformal threshold of each level in `LEVELS`, on `Kind.nonconformity`; None
            for levels that need more examples. Empty if nothing was fitted.
        split: the split that was fitted on.
        examples: number of labeled examples of that split.
        step: training step of the parameters.
    """

    temperature: float = 1.0
    thresholds: tuple[float | None, ...] = ()
    split: str = ""
    examples: int = 0
    step: int = 0

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"the temperature of a calibration must be positive, got {self.temperature}"
            )
        if len(self.thresholds) not in (0, len(LEVELS)):
            raise InputError(
                f"a calibration has {len(LEVELS)} thresholds or none, got {len(self.thresholds)}"
            )

    @property
    def is_fitted(self) -> bool:
        """True if it was fitted; False for the default, which changes nothing."""
        return self.examples > 0

    def threshold(self, level: float) -> float:
        """Returns the conformal threshold of a level.

        Raises:
            InputError: there is none for this level.
        """
        index = check_level(level)
        if not self.thresholds:
            raise InputError(
                "the checkpoint holds no conformal calibration; run gemma-encoder evaluate "
                "--calibrate on its workdir first"
            )
        threshold = self.thresholds[index]
        if threshold is None:
            needed = math.ceil(round(level / (1 - level), 6))
            raise InputError(
                f"conformal level {level:g} needs at least {needed} examples; the checkpoint was "
                f"calibrated on {self.examples} of {self.split}; lower the level, or calibrate on "
                "more"
            )
        return threshold

    def describe(self, kind: "Uncertainty") -> str:
        """Describes the calibration of a kind of task and its origin; "" if nothing was fitted."""
        if not self.is_fitted:
            return ""
        levels = [
            level
            for level, value in zip(LEVELS, self.thresholds, strict=False)
            if value is not None
        ]
        parts = [f"temperature {self.temperature:.3g}"] if kind.has_temperature else []
        if levels:
            span = " to ".join(f"{level:g}" for level in sorted({levels[0], levels[-1]}))
            parts.append(f"conformal level{'s' if len(levels) > 1 else ''} {span}")
        examples = f"{self.examples:,} example{'' if self.examples == 1 else 's'}"
        fitted = f"fitted on {examples} of {self.split} at step {self.step:,}"
        return f"{', '.join(parts)}; {fitted}"


NO_CALIBRATION = Calibration()


def check_level(level: float) -> int:
    """Returns the index of a level in `LEVELS`; raises InputError if it is not one of them."""
    percent = round(level * 100) if math.isfinite(level) else -1
    if not (50 <= percent <= 99 and math.isclose(percent, level * 100, abs_tol=1e-6)):
        raise InputError(
            f"conformal level {level:g}: expected a whole percentage from 0.5 to 0.99, e.g. 0.9"
        )
    return percent - 50


class Uncertainty:
    """Interface of kinds; by default there are neither probabilities nor conformal predictions.

    Attributes:
        has_temperature: `Kind.postprocess` divides scores by `Task.temperature`.
        conformal_columns: names of the columns of conformal predictions, () for none.
    """

    has_temperature = False
    conformal_columns: tuple[str, ...] = ()

    def confidence(self, task: "Task", outputs: np.ndarray) -> np.ndarray | None:
        """Returns the probability that each decision is right, [N]; None without probabilities."""
        return None

    def nonconformity(
        self, task: "Task", outputs: np.ndarray, labels: Sequence["Label"]
    ) -> np.ndarray | None:
        """Returns the disagreement of each output with its label, [N] float64; None if undefined.

        A conformal prediction consists of the labels with at most the threshold's disagreement.
        """
        return None

    def conformal(self, task: "Task", outputs: np.ndarray, threshold: float) -> dict[str, Any]:
        """Returns the conformal predictions, N values for each of `conformal_columns`."""
        raise InputError(
            f"task {task.name!r} of kind {self} has no conformal predictions: they need "
            "probabilities of classes, or a regression"
        )


class ClassUncertainty(Uncertainty):
    """Uncertainty of kinds with probabilities of classes.

    Conformal sets are those of least ambiguity (LAC, Sadinle, Lei and Wasserman, 2019, arXiv
    1609.00451): all classes with a probability of at least 1 - threshold. They are the smallest on
    average, need no randomness, and may be empty for a text that is unlike all classes. With
    several labels per text, a set holds all true classes with the stated probability.
    """

    one_class: bool
    conformal_columns = ("prediction_set",)

    def output_scale(self, task: "Task") -> tuple[float, float]:
        """Returns the temperature's factor of exported scores, if these are a logit per class."""
        is_linear = self.has_temperature and self.num_outputs(task) == len(task.classes)
        return (1 / task.temperature if is_linear else 1.0), 0.0

    def truth(self, task: "Task", labels: Sequence["Label"]) -> np.ndarray:
        """Returns the true classes, [N, C] of 0 and 1."""
        return np.eye(len(task.classes))[np.array(labels, int)]

    def is_right(self, task: "Task", outputs: np.ndarray, labels: Sequence["Label"]) -> np.ndarray:
        """Returns True for each right decision, [N]; with several labels, if all are right."""
        if self.one_class:
            return self.decide(task, outputs) == np.array(labels, int)
        return ((outputs >= 0.5) == self.truth(task, labels)).all(axis=-1)

    def confidence(self, task, outputs):
        """Returns the decided class's probability; of several labels, the least sure decision's."""
        if self.one_class:
            return outputs[np.arange(len(outputs)), self.decide(task, outputs)]
        return np.maximum(outputs, 1 - outputs).min(axis=-1)

    def events(
        self, task: "Task", outputs: np.ndarray, labels: Sequence["Label"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (probabilities, outcomes), [M] each, whose agreement is called calibration.

        With one class per text: the confidence, and True for a right decision. With several labels:
        every class's probability, and True if the text has the class; M = N C.
        """
        if self.one_class:
            return self.confidence(task, outputs), self.is_right(task, outputs, labels)
        return np.ravel(outputs), np.ravel(self.truth(task, labels)) == 1

    def log_likelihood(
        self, task: "Task", outputs: np.ndarray, labels: Sequence["Label"]
    ) -> np.ndarray:
        """Returns the natural logarithm of each label's probability, [N] float64.

        A probability of 0, which has underflowed, counts as the smallest number of its dtype.
        """
        truth = self.truth(task, labels)
        smallest = np.finfo(outputs.dtype).tiny
        probabilities = np.asarray(outputs, np.float64)
        logs = truth * np.log(np.maximum(probabilities, smallest))
        if not self.one_class:
            logs += (1 - truth) * np.log(np.maximum(1 - probabilities, smallest))
        return logs.sum(axis=-1)

    def nonconformity(self, task, outputs, labels):
        """Returns 1 minus the probability of the label, or of the least probable of several."""
        truth = self.truth(task, labels)
        return (truth * (1 - np.asarray(outputs, np.float64))).max(axis=-1)

    def conformal(self, task, outputs, threshold):
        """Returns the classes with a probability of at least 1 - threshold."""
        members = 1 - np.asarray(outputs, np.float64) <= threshold
        return {
            "prediction_set": [[task.classes[i] for i in np.flatnonzero(row)] for row in members]
        }


class ResidualUncertainty(Uncertainty):
    """Uncertainty of a number: conformal intervals of absolute residuals (Lei et al., 2018).

    All intervals of a level have the same width; arXiv 1604.04173, section 2.2.
    """

    conformal_columns = ("low", "high")

    def nonconformity(self, task, outputs, labels):
        """Returns the absolute error, in the task's units."""
        return np.abs(np.asarray(outputs, np.float64) - np.array(labels, np.float64))

    def conformal(self, task, outputs, threshold):
        """Returns the ends of intervals around the predictions; they may leave the task's range."""
        predictions = np.asarray(outputs, np.float64)
        return {"low": predictions - threshold, "high": predictions + threshold}
