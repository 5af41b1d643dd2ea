"""Tasks: name, kind, templates, classes and metrics. Their records come from `data`."""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import differing_names
from gemma_encoder.inputs.descriptions import check_mapping, from_fields
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind, Label
from gemma_encoder.inputs.template import EncodedText, Template
from gemma_encoder.inputs.uncertainty import NO_CALIBRATION, Calibration

ROLES = ("", "query", "document")  # of a segment; `Batch.role` holds the index


class Example(NamedTuple):
    """One text to score: the unit that the model encodes and that evaluation counts.

    Attributes:
        fields: values of the template's fields.
        label: label in the task's own units: a class index, a regression target, a relevance grade,
            1 or 0 for a right or wrong option, or a tuple of class indices (multi-label). 0 for
            language modeling, where the targets are the tokens themselves.
        query_id: evaluation groups examples by it: the query of a list, the question of an option
            or answer, the pair that a sentence belongs to. Empty for independent examples.
        document_id: document or option within that group.
        info: further JSON-ready values for metrics and submissions: `idx` (the benchmark's own
            index), `option` (the option's text), `answers` (all correct texts).
        encoded: tokens, if the text was tokenized ahead; None if they are to be made from `fields`.
        role: one of `ROLES`; selects the task's template.
        key: whole number that is equal for equal texts of a role, for losses that compare texts;
            -1 if unknown.
    """

    fields: dict[str, str]
    label: Label
    query_id: str = ""
    document_id: str = ""
    info: Mapping[str, Any] = types.MappingProxyType({})
    encoded: EncodedText | None = None
    role: str = ""
    key: int = -1


@dataclasses.dataclass
class ExampleTable:
    """Examples of a split by `example_id`, on the host; filled while the split is read.

    Attributes:
        labels, query_ids, document_ids, infos: one entry per example.
        fields: fields of the first `MAX_TEXTS` examples, for display.
        counts: number of texts and of truncated texts, by task.
    """

    labels: list[Label] = dataclasses.field(default_factory=list)
    query_ids: list[str] = dataclasses.field(default_factory=list)
    document_ids: list[str] = dataclasses.field(default_factory=list)
    infos: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    fields: list[dict[str, str]] = dataclasses.field(default_factory=list)
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    MAX_TEXTS = 50_000  # about 10 MB of sentences, or 30 MB of passages

    def add(self, example: Example) -> None:
        """Appends an example; its id is its index."""
        self.labels.append(example.label)
        self.query_ids.append(example.query_id)
        self.document_ids.append(example.document_id)
        self.infos.append(example.info)
        if len(self.fields) < self.MAX_TEXTS:
            self.fields.append(example.fields)

    def groups(self) -> dict[str, list[int]]:
        """Returns the example ids of each `query_id`, in table order."""
        members: dict[str, list[int]] = {}
        for index, query in enumerate(self.query_ids):
            members.setdefault(query, []).append(index)
        return members


@dataclasses.dataclass(frozen=True)
class Task:
    """Declaration of a task. Stored in checkpoints, it suffices for inference without the data.

    Attributes:
        name: unique, e.g. "glue_sst2".
        kind: a `Kind`, or the name of one in `gemma_encoder.inputs.kinds`.
        template: renders an example's fields as one text.
        metrics: names in `gemma_encoder.evaluation.metrics`, the main one first; by default those
            of the kind.
        classes: class names in label order, for kinds that have classes.
        label_range: lowest and highest regression target. Training uses targets scaled to [0, 1];
            metrics and predictions are in the task's own units.
        head: name of the head that scores the task, by default the task's name. Tasks with the same
            head name share the head.
        chance: main metric of an untrained model, shown beside results where
            `evaluation.details.chance_of` computes none; None if it is not a constant.
        role_templates: (role, template) pairs, for roles whose texts use another template.
        calibration: temperature and conformal thresholds, fitted by `gemma-encoder evaluate
            --calibrate`; by default none.
    """

    name: str
    kind: Kind
    template: Template
    metrics: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    label_range: tuple[float, float] = (0.0, 1.0)
    head: str = ""
    chance: float | None = None
    role_templates: tuple[tuple[str, Template], ...] = ()
    calibration: Calibration = NO_CALIBRATION

    def __post_init__(self):
        object.__setattr__(self, "kind", kinds.get(self.kind))
        if not self.name:
            raise InputError("a task needs a name")
        if not re.fullmatch(r"[^/\\\0]+", self.name) or self.name.startswith("."):
            raise InputError(
                f"task {self.name!r}: files are named after a task, so its name must not start "
                "with a dot or contain a slash"
            )
        if not isinstance(self.template, Template):
            raise InputError(
                f"task {self.name!r}: template must be a Template, such as Template('{{text}}'), "
                f"got {self.template!r}"
            )
        self.kind.check_task(self)
        if not -math.inf < self.label_range[0] < self.label_range[1] < math.inf:
            raise InputError(
                f"task {self.name!r}: label_range must be (lowest, highest), got {self.label_range}"
            )
        for role, _ in self.role_templates:
            if role not in ROLES[1:]:
                raise unknown(f"role of a template of task {self.name!r}:", role, ROLES[1:])
        if not self.head:
            object.__setattr__(self, "head", self.name)
        if not self.metrics:
            object.__setattr__(self, "metrics", self.kind.default_metrics)

    @property
    def is_list(self) -> bool:
        """True if examples come in lists that are scored together."""
        return self.kind.is_list

    @property
    def num_outputs(self) -> int:
        """Width of the head."""
        return self.kind.num_outputs(self)

    @property
    def target_width(self) -> int:
        """Width of the vector label, 0 for none."""
        return self.kind.target_width(self)

    def template_for(self, role: str) -> Template:
        """Returns the template for texts of a role."""
        return dict(self.role_templates).get(role, self.template)

    def is_unlabeled(self, label: Label) -> bool:
        """Returns True if the label is a placeholder for an unknown one."""
        return self.kind.is_unlabeled(self, label)

    def check_label(self, label: Label, where: str) -> float:
        """Returns the label for training; raises InputError if it is out of range."""
        return self.kind.check_label(self, label, where)

    def target(self, label: Label, where: str) -> tuple[float, np.ndarray]:
        """Returns the checked label and the vector label [target_width] for training."""
        return self.kind.target(self, label, where)

    def output_differences(self, other: "Task") -> list[str]:
        """Returns the fields in which the meaning of the head's outputs differs for two tasks.

        These are the kind, the classes (numbers are equal by value) and the label range.
        """
        differences = {
            "kind": self.kind != other.kind,
            "classes": differing_names(self.classes, other.classes),
            "label_range": self.label_range != other.label_range,
        }
        return [field for field, differs in differences.items() if differs]

    def scale(self, label):
        """Maps regression targets (floats or arrays) from the task's own units to [0, 1]."""
        low, high = self.label_range
        return (label - low) / (high - low)

    def unscale(self, score):
        """Maps regression scores (floats or arrays) from [0, 1] to the task's own units."""
        low, high = self.label_range
        return score * (high - low) + low

    @property
    def temperature(self) -> float:
        """Divisor of the scores before they become probabilities."""
        return self.calibration.temperature

    def conformal(self, outputs: np.ndarray, level: float) -> dict[str, Any]:
        """Returns conformal predictions for outputs of `Predictor.predict`.

        They hold the true label with probability `level`, over texts like those of the calibration.

        Args:
            outputs: [N, C] probabilities, or [N] targets of a regression.
            level: a whole percentage from 0.5 to 0.99.

        Returns:
            "prediction_set", a list of class names per text; for a regression "low" and "high".

        Raises:
            InputError: the task has no conformal calibration, or none for this level.
        """
        self.check_conformal(level)
        return self.kind.conformal(self, outputs, self.calibration.threshold(level))

    def check_conformal(self, level: float) -> None:
        """Raises InputError if there are no conformal predictions at this level."""
        if not self.kind.conformal_columns:
            self.kind.conformal(self, np.zeros(0), 0.0)
        try:
            self.calibration.threshold(level)
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from None

    def uncalibrated(self) -> "Task":
        """Returns the task without its calibration, which other parameters would not have."""
        return dataclasses.replace(self, calibration=NO_CALIBRATION)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready description; `from_dict` is its inverse."""
        values = dataclasses.asdict(self) | {"kind": self.kind.name}
        if self.calibration == NO_CALIBRATION:
            del values["calibration"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """Builds the task from `to_dict`; raises InputError if a newer version wrote it."""
        check_mapping(values, "a task", "template")
        templates = {
            "template": _template(values["template"]),
            "role_templates": tuple(
                (role, _template(template)) for role, template in values.get("role_templates", ())
            ),
        }
        calibration = from_fields(Calibration, values.get("calibration", {}), "a calibration")
        return from_fields(cls, {**values, **templates, "calibration": calibration}, "a task")


def _template(values: Mapping[str, Any]) -> Template:
    return from_fields(Template, values, "a template")
