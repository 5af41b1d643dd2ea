"""Uncertain predictions: abstentions below a probability, conformal sets and intervals."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.uncertainty import check_level


@dataclasses.dataclass(frozen=True)
class Certainty:
    """Options for uncertain predictions.

    Attributes:
        conformal: level of the conformal columns, see `Task.conformal`; None for no such columns.
        abstain_below: predictions with a lower confidence (`Kind.confidence`) are None, with their
            probabilities; None for all predictions.

    Raises:
        InputError: a value is out of range.
    """

    conformal: float | None = None
    abstain_below: float | None = None

    def __post_init__(self):
        if self.conformal is not None:
            check_level(self.conformal)
        if self.abstain_below is not None and not 0 < self.abstain_below <= 1:
            raise InputError(
                f"abstain_below={self.abstain_below:g}: expected a probability above 0 and at most "
                "1, e.g. 0.8"
            )

    def check(self, task: Task, has_columns: bool = True) -> None:
        """Raises InputError if a task has no confidence, or no conformal predictions.

        Args:
            task: the task to predict.
            has_columns: False if the predictions are an array, which has no further columns.
        """
        if self.conformal is not None:
            task.check_conformal(self.conformal)
            if not has_columns:
                raise InputError(
                    "conformal adds columns: set as_frame=True, or pass the array to Task.conformal"
                )
        if self.abstain_below is None:
            return
        outputs = task.kind.postprocess(task, np.zeros((1, task.num_outputs), np.float32))
        if task.kind.confidence(task, outputs) is None:
            raise InputError(
                f"abstain_below: task {task.name!r} of kind {task.kind} has no probabilities of "
                "classes; leave it out"
            )

    def columns(self, task: Task, outputs: np.ndarray) -> dict[str, Any]:
        """Returns the columns of `Kind.columns` and the conformal ones."""
        columns = task.kind.columns(task, outputs)
        if self.abstain_below is not None:
            confident = task.kind.confidence(task, outputs) >= self.abstain_below
            columns["prediction"] = [
                prediction if answered else None
                for prediction, answered in zip(columns["prediction"], confident, strict=True)
            ]
        if self.conformal is not None:
            columns |= task.conformal(outputs, self.conformal)
        return columns


PLAIN = Certainty()


def is_abstention(record: Mapping[str, Any]) -> bool:
    """Returns True for records without a prediction that have probabilities; blank texts do not."""
    probabilities = record.get("probabilities") or {}
    return record["prediction"] is None and None not in probabilities.values()
