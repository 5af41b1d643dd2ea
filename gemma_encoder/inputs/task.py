"""What a task is: its name, kind, template, classes and metrics. Where its records come from is `data`'s business."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.template import Encoded, Template

KINDS = ("classification", "regression", "ranking", "choice", "language_model")
UNLABELLED = -1.0  # what test splits hold where a label is unknown


class Example(NamedTuple):
    """One text to score: the smallest unit that a model sees and that evaluation counts.

    Attributes:
        fields: the template's fields.
        label: a class index, a regression target in the task's own units, a relevance grade, or 1 for an option that is right; 0 of a
            language model's text, whose tokens are its targets.
        query_id: what evaluation groups it by: the query of a list, the question of an option or an answer, the pair that it is
            one half of. Empty where each example stands alone.
        document_id: its document or option within that group.
        info: what else metrics and submissions need of it, ready for JSON: `idx` (the benchmark's own number of it), `option` (the
            text of an option), `answers` (all texts that are right).
        encoded: the tokens of its text where they were made ahead; None where they are yet to be made from the fields.
    """

    fields: dict[str, str]
    label: float
    query_id: str = ""
    document_id: str = ""
    info: Mapping[str, Any] = types.MappingProxyType({})
    encoded: Encoded | None = None


@dataclasses.dataclass
class ExampleTable:
    """What evaluation knows of a split's examples, by `example_id`; filled while the split is read."""

    labels: list[float] = dataclasses.field(default_factory=list)
    query_ids: list[str] = dataclasses.field(default_factory=list)
    document_ids: list[str] = dataclasses.field(default_factory=list)
    infos: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    fields: list[dict[str, str]] = dataclasses.field(
        default_factory=list
    )  # of the first KEPT, to show a person
    counts: dict[str, dict[str, int]] = dataclasses.field(
        default_factory=dict
    )  # texts and what was cut

    KEPT = 50_000  # texts that are held: some 10 MB of sentences, some 30 MB of passages

    def add(self, example: Example) -> None:
        """Appends an example; its id is its place."""
        self.labels.append(example.label)
        self.query_ids.append(example.query_id)
        self.document_ids.append(example.document_id)
        self.infos.append(example.info)
        if len(self.fields) < self.KEPT:
            self.fields.append(example.fields)

    def groups(self) -> dict[str, list[int]]:
        """The example ids of each query, question or pair, both in the order of the table."""
        members: dict[str, list[int]] = {}
        for number, query in enumerate(self.query_ids):
            members.setdefault(query, []).append(number)
        return members


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, complete enough that a checkpoint which stores it can be used without the data it was trained on.

    Attributes:
        name: unique, e.g. "glue_sst2".
        kind: "classification", "regression", "ranking" (documents of a query, by relevance), "choice" (options of a question, one
            of which is chosen) or "language_model" (each token of a text from those before it).
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
            raise InputError(
                f"task {self.name!r}: a classification task names at least two classes, any other kind none; got {self.classes}"
            )
        if not self.label_range[0] < self.label_range[1]:
            raise InputError(
                f"task {self.name!r}: label_range must be (lowest, highest), got {self.label_range}"
            )
        if not self.head:
            object.__setattr__(self, "head", self.name)

    @property
    def is_list(self) -> bool:
        """Whether its examples come in lists that are scored together: documents of a query, options of a question."""
        return self.kind in ("ranking", "choice")

    def is_unlabelled(self, label: float) -> bool:
        """Whether `label` says that the label is unknown: -1, except where that is a target like any other, and where there is nothing to label."""
        return (
            label == UNLABELLED
            and self.kind != "language_model"
            and not (
                self.kind == "regression" and self.label_range[0] <= label <= self.label_range[1]
            )
        )

    @property
    def num_outputs(self) -> int:
        """Width of the head: the number of classes; 2 for a language model, which says a text's summed negative log-likelihood and how many
        tokens it predicted; 1 for a regression target or the score of a document or option."""
        return {"classification": len(self.classes), "language_model": 2}.get(self.kind, 1)

    def check_label(self, label: float, where: str) -> float:
        """Returns `label` as training sees it (regression scaled to [0, 1]); raises InputError when it is out of range.

        Args:
            label: class index, target in the task's own units, relevance grade, or 1 and 0 for right and wrong options.
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
                raise InputError(
                    f"task {self.name!r}, {where}: target {label:g} is out of range; expected {low:g} to {high:g}"
                )
            return (label - low) / (high - low)
        if self.kind == "language_model":
            return 0.0  # a text is its own label
        if self.kind == "choice" and label not in (0, 1):
            raise InputError(
                f"task {self.name!r}, {where}: label {label:g} of an option is out of range; expected 1 (right) or 0 (wrong)"
            )
        if not 0 <= label < math.inf:
            raise InputError(
                f"task {self.name!r}, {where}: relevance grade {label:g} is negative or not a finite number"
            )
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
        template = Template(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.pop("template").items()
            }
        )
        return cls(
            template=template,
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            },
        )
