"""The interface of a kind of task, and the registry of kinds. The kinds themselves: `kinds`.

N examples, K outputs of a head, C classes.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_encoder.inputs.errors import InputError, unknown

if TYPE_CHECKING:
    from gemma_encoder.inputs.task import Task

UNLABELLED = -1.0  # the label of test splits where none is published
NO_TARGETS = np.zeros(0, np.float32)

Label = float | tuple[int, ...]


class Kind:
    """Behavior of one kind of task. Subclass it and `register` an instance to add a kind.

    Attributes:
        name: of the kind, unique.
        head: key of `gemma_encoder.model.heads.HEADS`.
        default_loss: key of `gemma_encoder.training.losses.LOSSES[name]`.
        default_metrics: names in `gemma_encoder.evaluation.metrics.METRICS[name]`.
        is_list: examples come in lists that are scored together.
        ranks: a list is evaluated as a ranking of documents, by runs and judgments.
        counts_tokens: the loss is a sum over tokens, averaged over tokens.
        has_classes: a task of this kind names its classes.
        has_range: a task of this kind has a range of targets.
        one_class: an example has exactly one class, so that there is a confusion matrix.
        label_column: how the label column of a table is read: "class" (a name), "classes" (several
            names), "number", or "" where a table cannot hold the label.
        label_word: what a number in that column is called.
        least_label: the lowest number that a label column may hold.
        hub_tag: the task's tag on the Hugging Face hub, "" for none.
        mistake_measure: heading of how wrong a mistake is, "" where the kind has no mistakes.
    """

    name: str
    head = "mlp"
    default_loss: str
    default_metrics: tuple[str, ...] = ()
    is_list = False
    ranks = False
    counts_tokens = False
    has_classes = False
    one_class = False
    has_range = False
    label_column = ""
    label_word = "label"
    least_label = -math.inf
    hub_tag = ""
    mistake_measure = ""

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def __reduce__(self) -> tuple:
        return get, (self.name,)  # a copy, or what a pickle restores, is the registered object

    def check_task(self, task: "Task") -> None:
        """Raises InputError where a declaration lacks what the kind needs, or has too much."""
        if self.has_classes and len(set(task.classes)) < max(len(task.classes), 2):
            raise InputError(
                f"task {task.name!r}: a task of kind {self} names at least two classes, all "
                f"different; got {task.classes}"
            )
        if task.classes and not self.has_classes:
            raise InputError(f"task {task.name!r}: kind {self} has no classes; got {task.classes}")

    def num_outputs(self, task: "Task") -> int:
        """K, the width of the task's head."""
        return 1

    def target_width(self, task: "Task") -> int:
        """Width of the vector that training sees beside the label, 0 for none."""
        return 0

    def is_unlabeled(self, task: "Task", label: Label) -> bool:
        """Tells an unknown label (-1) from a real one."""
        return label == UNLABELLED

    def check_label(self, task: "Task", label: Label, where: str) -> float:
        """Returns the label as training sees it; raises InputError when it is out of range.

        Args:
            task: whose label it is.
            label: in the task's own units.
            where: names the record in the message, e.g. "train record 17".
        """
        raise NotImplementedError

    def target(self, task: "Task", label: Label, where: str) -> tuple[float, np.ndarray]:
        """The label and the vector [target_width] that training sees."""
        return self.check_label(task, label, where), NO_TARGETS

    def metric_labels(self, task: "Task", labels: Sequence[Label]) -> np.ndarray:
        """Labels as the kind's metrics take them, [N] or [N, C]."""
        return np.array(labels)

    def postprocess(self, task: "Task", scores: np.ndarray) -> np.ndarray:
        """Scores [N, K] float32 as outputs: [N], or [N, C] probabilities."""
        return scores[:, 0]

    def decide(self, task: "Task", outputs: np.ndarray) -> np.ndarray:
        """Outputs as the kind's metrics compare them with labels."""
        return outputs

    def baseline(self, task: "Task", labels: Sequence[Label]) -> np.ndarray | None:
        """The best constant output for these labels; None where a constant means nothing."""
        return None

    def columns(self, task: "Task", outputs: np.ndarray) -> dict[str, Any]:
        """Predictions for a user: "prediction" and what goes with it, each with N entries.

        A nested dict, such as "probabilities" by class, holds columns that belong together.
        """
        return {"prediction": outputs}

    def line(self, task: "Task", output: np.ndarray, label: Label) -> dict[str, Any]:
        """One example of a prediction file, JSON-ready: label, prediction, and what goes along."""
        return {"label": float(label), "prediction": float(output)}

    def read_line(self, line: Mapping[str, Any]) -> Any:
        """What `decide` gave for the example that `line` wrote."""
        return line["prediction"]

    def read_label(self, line: Mapping[str, Any]) -> Label:
        """The label of the example that `line` wrote."""
        return line.get("label", 0.0)

    def show(self, task: "Task", output: np.ndarray) -> str:
        """An output in a few words."""
        return f"{output:.2f}"

    def show_label(self, task: "Task", label: Label) -> str:
        """A label in a few words, "" where there is nothing to show."""
        return f"{label:g}"

    def describe(self, task: "Task") -> str:
        """What the task predicts: its classes or its range, "" where there is nothing to name."""
        return ", ".join(task.classes)

    def severity(
        self, task: "Task", outputs: np.ndarray, labels: Sequence[Label]
    ) -> np.ndarray | None:
        """How bad each prediction is, [N]; -inf where it is right. None without mistakes."""
        return None

    def mistake(self, task: "Task", line: Mapping[str, Any]) -> tuple[str, str, str]:
        """(label, prediction, how wrong) of a line of a prediction file, for a table."""
        raise NotImplementedError

    def summarize_labels(self, task: "Task", labels: Sequence[Label]) -> tuple[str, str] | None:
        """(heading, distribution) of labels in one line; None where there are none."""
        values, counts = np.unique(np.array(labels), return_counts=True)
        word = "" if self.has_classes else f"{self.label_word} "
        parts = [
            f"{word}{self.show_label(task, value)} {count / len(labels):.1%}"
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        ]
        return "labels", ", ".join(parts)

    def direction(
        self, task: "Task", output: np.ndarray, target: str | None
    ) -> tuple[np.ndarray, str, float]:
        """What an attribution explains: (weights [K] on the scores, its name, its output).

        Args:
            task: the task.
            output: of the text, as `postprocess` gives it.
            target: a class, or None for the predicted one.

        Raises:
            InputError: the target is no class of the task.
        """
        if target is not None:
            raise InputError(f"task {task.name!r} has no classes; leave the target out")
        weights = np.zeros(self.num_outputs(task), np.float32)
        weights[0] = 1
        return weights, task.name, float(np.ravel(output)[0])

    def order_classes(self, names: Iterable[str], path: str) -> tuple[str, ...]:
        """Class names that were read off a file, in label order: sorted, as numbers if all are."""
        names = list(names)
        if all_whole(names):
            return tuple(sorted(names, key=int))
        return tuple(sorted(names))


class ClassKind(Kind):
    """Base of the kinds whose outputs are probabilities of classes."""

    has_classes = True
    hub_tag = "text-classification"
    mistake_measure = "probability"

    def num_outputs(self, task):
        return len(task.classes)

    def columns(self, task, outputs):
        decided = self.decide(task, outputs)
        probabilities = {name: outputs[:, index] for index, name in enumerate(task.classes)}
        return {
            "prediction": [task.classes[index] for index in decided],
            "probabilities": probabilities,
        }

    def line(self, task, output, label):
        return {
            "label": int(label),
            "prediction": int(self.decide(task, output[None])[0]),
            "probabilities": [round(float(p), 6) for p in output],
        }

    def show(self, task, output):
        decided = int(self.decide(task, output[None])[0])
        return f"{task.classes[decided]} {output[decided]:.2f}"

    def show_label(self, task, label):
        in_range = 0 <= label < len(task.classes)
        return task.classes[int(label)] if in_range else f"label {label:g}"

    def check_label(self, task, label, where):
        if not 0 <= label < len(task.classes) or label != int(label):
            raise InputError(
                f"task {task.name!r}, {where}: label {label:g} is out of range; expected a class "
                f"index from 0 to {len(task.classes) - 1} ({', '.join(task.classes)})"
            )
        return float(label)

    def baseline(self, task, labels):
        """The frequency of each class, [C]."""
        counts = np.bincount(np.array(labels, int), minlength=len(task.classes))
        return (counts / max(counts.sum(), 1)).astype(np.float32)

    def mistake(self, task, line):
        classes = task.classes
        return (
            classes[line["label"]],
            classes[line["prediction"]],
            f"{max(line['probabilities']):.3f}",
        )

    def direction(self, task, output, target):
        """For a class, how far its score lies above the mean of the others'."""
        index = class_index(task, output, target)
        weights = np.full(len(task.classes), -1 / (len(task.classes) - 1), np.float32)
        weights[index] = 1
        return weights, task.classes[index], float(output[index])


def all_whole(names: Sequence[str]) -> bool:
    """Tells names that are all whole numbers."""
    return all(re.fullmatch(r"\d{1,9}", name) for name in names)


def cumulative_logits(scores: Any, xp: Any = np) -> Any:
    """The logits of P(class > k) for k = 0 … C - 2, strictly falling in k.

    The first score moves all of them; the softplus of each other one is the gap to the logit
    before it. The middle one is the first score itself, so that scores near zero favor no end.

    Args:
        scores: [..., C - 1], of a head.
        xp: the array library, numpy or jax.numpy.
    """
    gaps = xp.logaddexp(xp.zeros_like(scores[..., 1:]), scores[..., 1:])
    below = xp.concatenate([xp.zeros_like(scores[..., :1]), xp.cumsum(gaps, axis=-1)], axis=-1)
    middle = (scores.shape[-1] - 1) // 2
    return scores[..., :1] - (below - below[..., middle : middle + 1])


def class_index(task: "Task", output: np.ndarray, target: str | None) -> int:
    """The index of a class, by default that of the highest output."""
    if target is None:
        return int(np.argmax(output))
    if target not in task.classes:
        raise unknown(f"class of task {task.name!r}:", target, task.classes)
    return task.classes.index(target)


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Adds a kind; a name is registered once."""
    if kind.name in _KINDS:
        raise InputError(f"kind {kind.name!r} is already registered")
    _KINDS[kind.name] = kind
    return kind


def names() -> tuple[str, ...]:
    """All registered kinds."""
    return tuple(_KINDS)


def get(kind: "str | Kind") -> Kind:
    """The kind of that name; raises InputError naming the nearest one."""
    if isinstance(kind, Kind):
        return kind
    if kind not in _KINDS:
        raise unknown("task kind", kind, _KINDS)
    return _KINDS[kind]
