"""Tasks: name, kind, templates, classes and metrics. Where records come from: `data`."""

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.descriptions import check_mapping, from_fields
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind, Label
from gemma_encoder.inputs.template import EncodedText, Template

ROLES = ("", "query", "document")  # of a segment; `Batch.role` holds the index


class Example(NamedTuple):
    """One text to score: the smallest unit that a model sees and that evaluation counts.

    Attributes:
        fields: the template's fields.
        label: in the task's own units: a class index, a target, a relevance grade, 1 for an option
            that is right, or the tuple of all class indices (several classes at once); 0 of a
            language model's text, whose tokens are its targets.
        query_id: what evaluation groups it by: the query of a list, the question of an option or an
            answer, the pair that it is one half of. Empty where each example stands alone.
        document_id: its document or option within that group.
        info: what else metrics and submissions need of it, ready for JSON: `idx` (the benchmark's
            own index of it), `option` (the text of an option), `answers` (all right texts).
        encoded: the tokens of its text where they were made ahead; None where they are yet to be
            made from the fields.
        role: one of `ROLES`; the task's template for that role makes the text.
    """

    fields: dict[str, str]
    label: Label
    query_id: str = ""
    document_id: str = ""
    info: Mapping[str, Any] = types.MappingProxyType({})
    encoded: EncodedText | None = None
    role: str = ""


@dataclasses.dataclass
class ExampleTable:
    """The examples of a split by `example_id`, on the host; filled while the split is read.

    Attributes:
        labels, query_ids, document_ids, infos: of each example.
        fields: of the first `MAX_TEXTS` examples, to show a person.
        counts: texts and truncated texts, by task.
    """

    labels: list[Label] = dataclasses.field(default_factory=list)
    query_ids: list[str] = dataclasses.field(default_factory=list)
    document_ids: list[str] = dataclasses.field(default_factory=list)
    infos: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    fields: list[dict[str, str]] = dataclasses.field(default_factory=list)
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    MAX_TEXTS = 50_000  # some 10 MB of sentences, some 30 MB of passages

    def add(self, example: Example) -> None:
        """Appends an example; its id is its index."""
        self.labels.append(example.label)
        self.query_ids.append(example.query_id)
        self.document_ids.append(example.document_id)
        self.infos.append(example.info)
        if len(self.fields) < self.MAX_TEXTS:
            self.fields.append(example.fields)

    def groups(self) -> dict[str, list[int]]:
        """The example ids of each query, question or pair, both in the order of the table."""
        members: dict[str, list[int]] = {}
        for index, query in enumerate(self.query_ids):
            members.setdefault(query, []).append(index)
        return members


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, complete enough that a checkpoint which stores it can be used without its data.

    Attributes:
        name: unique, e.g. "glue_sst2".
        kind: a `Kind`, or the name of one in `gemma_encoder.inputs.kinds`.
        template: how an example's fields become one text.
        metrics: names in `gemma_encoder.evaluation.metrics`, the main one first; by default those
            of the kind.
        classes: the class names in label order, for kinds that have classes.
        label_range: lowest and highest regression target. Training sees the target scaled to
            [0, 1]; metrics and predictions are in the task's own units.
        head: the head that scores it; tasks that name the same head share it. By default the
            task's own name.
        chance: the main metric of a model that has learned nothing, printed beside results; None
            where it is not a constant.
        role_templates: (role, template) pairs for roles whose texts have a form of their own.
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

    def __post_init__(self):
        object.__setattr__(self, "kind", kinds.get(self.kind))
        if not self.name:
            raise InputError("a task needs a name")
        if not re.fullmatch(r"[^/\\\0]+", self.name) or self.name.startswith("."):
            raise InputError(
                f"task {self.name!r}: files are named after a task, so its name starts with no dot "
                "and holds no slash"
            )
        if not isinstance(self.template, Template):
            raise InputError(
                f"task {self.name!r}: template must be a Template, such as Template('{{text}}'), "
                f"got {self.template!r}"
            )
        self.kind.check_task(self)
        if not self.label_range[0] < self.label_range[1]:
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
        """Tells tasks whose examples come in lists that are scored together."""
        return self.kind.is_list

    @property
    def num_outputs(self) -> int:
        """Width of the head."""
        return self.kind.num_outputs(self)

    @property
    def target_width(self) -> int:
        """Width of the vector that training sees beside the label."""
        return self.kind.target_width(self)

    def template_for(self, role: str) -> Template:
        """The template that makes texts of a role."""
        return dict(self.role_templates).get(role, self.template)

    def is_unlabeled(self, label: Label) -> bool:
        """Tells an unknown label from a real one."""
        return self.kind.is_unlabeled(self, label)

    def check_label(self, label: Label, where: str) -> float:
        """Returns the label as training sees it; raises InputError when it is out of range."""
        return self.kind.check_label(self, label, where)

    def target(self, label: Label, where: str) -> tuple[float, np.ndarray]:
        """The label and the vector [target_width] that training sees, checked."""
        return self.kind.target(self, label, where)

    def unscale(self, score):
        """A regression score in the task's own units, from [0, 1]. Takes floats and arrays."""
        low, high = self.label_range
        return score * (high - low) + low

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"kind": self.kind.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """The task that `to_dict` described; raises InputError where a newer version wrote it."""
        check_mapping(values, "a task", "template")
        templates = {
            "template": _template(values["template"]),
            "role_templates": tuple(
                (role, _template(template)) for role, template in values.get("role_templates", ())
            ),
        }
        return from_fields(cls, {**values, **templates}, "a task")


def _template(values: Mapping[str, Any]) -> Template:
    return from_fields(Template, values, "a template")
