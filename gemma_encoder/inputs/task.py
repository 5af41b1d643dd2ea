"""What a task is: its name, kind, template, classes and metrics. Where its records come from is `data`'s business."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.template import Template

KINDS = ("classification", "regression", "ranking")


class Example(NamedTuple):
    """One text to score: the smallest unit that a model sees and that evaluation counts.

    `label` is a class index, a regression target in the task's own units, or a relevance grade. Ranking examples carry the
    ids of their query and document; elsewhere both are empty.
    """

    fields: dict[str, str]
    label: float
    query_id: str = ""
    document_id: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, complete enough that a checkpoint which stores it can be used without the data it was trained on.

    Attributes:
        name: unique, e.g. "glue_sst2".
        kind: "classification", "regression" or "ranking".
        template: how an example's fields become one text.
        metrics: names known to `gemma_encoder.evaluation.metrics`, the main one first.
        classes: the class names in label order (classification only).
        label_range: lowest and highest regression target. Training sees the target scaled to [0, 1]; metrics and
            predictions are in the task's own units.
        head: the head that scores it; tasks that name the same head share it. By default the task's own name.
        chance: the main metric of a model that has learnt nothing, printed beside results; None where it is not a constant.
    """

    name: str
    kind: str
    template: Template
    metrics: tuple[str, ...]
    classes: tuple[str, ...] = ()
    label_range: tuple[float, float] = (0.0, 1.0)
    head: str = ""
    chance: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("task kind", self.kind, KINDS)
        if len(self.classes) < 2 if self.kind == "classification" else self.classes:
            raise InputError(f"task {self.name!r}: a classification task names at least two classes, any other kind none; got {self.classes}")
        if not self.label_range[0] < self.label_range[1]:
            raise InputError(f"task {self.name!r}: label_range must be (lowest, highest), got {self.label_range}")
        if not self.head:
            object.__setattr__(self, "head", self.name)

    @property
    def num_outputs(self) -> int:
        """Width of the head: the number of classes, or 1 for a regression target or a relevance score."""
        return len(self.classes) if self.kind == "classification" else 1

    def check_label(self, label: float, where: str) -> float:
        """Returns `label` as training sees it (regression scaled to [0, 1]); raises InputError when it is out of range.

        Args:
            label: class index, target in the task's own units, or relevance grade.
            where: names the record in the message, e.g. "train record 17".
        """
        if self.kind == "classification":
            if not 0 <= label < len(self.classes) or label != int(label):
                raise InputError(
                    f"task {self.name!r}, {where}: label {label:g} is out of range; "
                    f"expected a class index from 0 to {len(self.classes) - 1} ({', '.join(self.classes)})"
                )
            return float(label)
        if self.kind == "regression":
            low, high = self.label_range
            if not low <= label <= high:
                raise InputError(f"task {self.name!r}, {where}: target {label:g} is out of range; expected {low:g} to {high:g}")
            return (label - low) / (high - low)
        if not 0 <= label < math.inf:
            raise InputError(f"task {self.name!r}, {where}: relevance grade {label:g} is negative or not a finite number")
        return float(label)

    def unscale(self, score):
        """A regression score in the task's own units, from the model's [0, 1] scale. Works on floats and arrays."""
        low, high = self.label_range
        return score * (high - low) + low

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """The task that `to_dict` described."""
        values = dict(values)
        template = Template(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.pop("template").items()})
        return cls(template=template, **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
