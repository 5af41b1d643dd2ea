"""Interface and registry of task kinds. The kinds themselves are in `kinds`.

Shapes: N examples, K outputs of a head, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_encoder.inputs.class_names import sorted_names
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.uncertainty import ClassUncertainty, Uncertainty

if TYPE_CHECKING:
    from gemma_encoder.inputs.task import Task

UNLABELED = -1.0  # label of test splits without published labels
NO_TARGETS = np.zeros(0, np.float32)

Label = float | tuple[int, ...]


class Kind(Uncertainty):
    """Behavior of one kind of task. To add a kind, subclass it and `register` an instance.

    Attributes:
        name: unique name of the kind.
        head: key of `gemma_encoder.model.heads.HEADS`.
        default_loss: key of `gemma_encoder.training.losses.LOSSES[name]`.
        default_metrics: names in `gemma_encoder.evaluation.metrics.METRICS[name]`.
        is_list: examples come in lists that are scored together.
        ranks: a list is evaluated as a ranking of documents, by runs and qrels.
        embeds: outputs are vectors of queries and documents; a ranking is the result of a search.
        couples: the loss compares the texts of the whole global batch, not of a micro-batch.
        counts_tokens: the loss is a sum over tokens, averaged over tokens.
        has_classes: tasks of this kind name their classes.
        has_range: tasks of this kind have a range of targets.
        one_class: an example has exactly one class, so a confusion matrix is defined.
        label_column: type of a table's label column: "class" (a name), "classes" (several names),
            "number", or "" if a table cannot hold the label.
        fractional_classes: True if numbers with a fraction may be classes, such as 0.5 stars.
        label_word: noun for a number in that column.
        least_label: the lowest valid number in a label column.
        whole_labels: True if the numbers of a label column must be whole.
        hub_tag: the task's tag on the Hugging Face Hub, "" for none.
        mistake_measure: heading of the severity of mistakes, "" if the kind has no mistakes.
        score_meaning: description of the scores of an export, from `output_scale`, for its card.
    """

    name: str
    head = "mlp"
    default_loss: str
    default_metrics: tuple[str, ...] = ()
    is_list = False
    ranks = False
    embeds = False
    couples = False
    counts_tokens = False
    has_classes = False
    one_class = False
    has_range = False
    label_column = ""
    fractional_classes = False
    label_word = "label"
    least_label = -math.inf
    whole_labels = False
    hub_tag = ""
    mistake_measure = ""
    score_meaning = "the outputs of the head"

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def __reduce__(self) -> tuple:
        return get, (self.name,)  # copies and unpickled objects are the registered instance

    def check_task(self, task: "Task") -> None:
        """Raises InputError if a declaration does not match the kind."""
        if self.has_classes and len(set(task.classes)) < max(len(task.classes), 2):
            raise InputError(
                f"task {task.name!r}: a task of kind {self} names at least two classes, all "
                f"different; got {task.classes}"
            )
        if task.classes and not self.has_classes:
            raise InputError(f"task {task.name!r}: kind {self} has no classes; got {task.classes}")

    def num_outputs(self, task: "Task") -> int:
        """Returns K, the width of the task's head; 0 for that of the encoder's vectors."""
        return 1

    def target_width(self, task: "Task") -> int:
        """Returns the width of the vector label, 0 for none."""
        return 0

    def is_unlabeled(self, task: "Task", label: Label) -> bool:
        """Returns True if the label is the placeholder -1 for an unknown one."""
        return label == UNLABELED

    def check_label(self, task: "Task", label: Label, where: str) -> float:
        """Returns the label for training; raises InputError if it is out of range.

        Args:
            task: the task of the label.
            label: label in the task's own units.
            where: names the record in the error message, e.g. "train record 17".
        """
        raise NotImplementedError

    def target(self, task: "Task", label: Label, where: str) -> tuple[float, np.ndarray]:
        """Returns the checked label and the vector label [target_width] for training."""
        return self.check_label(task, label, where), NO_TARGETS

    def metric_labels(self, task: "Task", labels: Sequence[Label]) -> np.ndarray:
        """Returns labels in the form that the kind's metrics take, [N] or [N, C]."""
        return np.array(labels)

    def postprocess(self, task: "Task", scores: np.ndarray) -> np.ndarray:
        """Converts scores [N, K] float32 to outputs: [N], or [N, C] probabilities."""
        return scores[:, 0]

    def output_scale(self, task: "Task") -> tuple[float, float]:
        """Returns (factor, offset) that an export folds into the head's last layer."""
        return 1.0, 0.0

    def decide(self, task: "Task", outputs: np.ndarray) -> np.ndarray:
        """Converts outputs to predictions that the kind's metrics compare with labels."""
        return outputs

    def baseline(self, task: "Task", labels: Sequence[Label]) -> np.ndarray | None:
        """Returns the best constant output for these labels; None if there is none."""
        return None

    def initial_score(self, task: "Task", constant: Any) -> float | None:
        """Returns the score of every text before training; None for random scores.

        Args:
            task: the task.
            constant: the output that `baseline` returns for the training labels.
        """
        return None

    def columns(self, task: "Task", outputs: np.ndarray) -> dict[str, Any]:
        """Returns predictions for users: "prediction" and further columns, each with N entries.

        A nested dict, such as "probabilities" by class, groups related columns.
        """
        return {"prediction": outputs}

    def line(self, task: "Task", output: np.ndarray, label: Label) -> dict[str, Any]:
        """Returns one example of a prediction file, JSON-ready, with label and prediction."""
        return {"label": float(label), "prediction": float(output)}

    def read_line(self, line: Mapping[str, Any]) -> Any:
        """Returns the prediction (of `decide`) from a line that `line` wrote."""
        return line["prediction"]

    def read_label(self, line: Mapping[str, Any]) -> Label:
        """Returns the label from a line that `line` wrote."""
        return line.get("label", 0.0)

    def show(self, task: "Task", output: np.ndarray) -> str:
        """Formats an output for display."""
        return f"{output:.2f}"

    def show_label(self, task: "Task", label: Label) -> str:
        """Formats a label for display; "" if there is nothing to show."""
        return f"{label:g}"

    def describe(self, task: "Task") -> str:
        """Describes the range of predictions: the classes or the target range, "" for neither."""
        return ", ".join(task.classes)

    def severity(
        self, task: "Task", outputs: np.ndarray, labels: Sequence[Label]
    ) -> np.ndarray | None:
        """Returns the severity of each mistake, [N]; -inf for a correct prediction.

        None if the kind has no mistakes.
        """
        return None

    def mistake(self, task: "Task", line: Mapping[str, Any]) -> tuple[str, str, str]:
        """Formats (label, prediction, severity) of a prediction file's line, for a table."""
        raise NotImplementedError

    def summarize_labels(self, task: "Task", labels: Sequence[Label]) -> tuple[str, str] | None:
        """Returns (heading, one-line distribution) of labels; None if the kind has no labels."""
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
        """Returns the quantity that an attribution explains.

        Args:
            task: the task.
            output: the text's output, from `postprocess`.
            target: a class, or None for the predicted one.

        Returns:
            (weights [K] on the scores, name of the quantity, its output).

        Raises:
            InputError: the target is not a class of the task.
        """
        if target is not None:
            raise InputError(f"task {task.name!r} has no classes; leave the target out")
        weights = np.zeros(self.num_outputs(task), np.float32)
        weights[0] = 1
        return weights, task.name, float(np.ravel(output)[0])

    def order_classes(self, names: Iterable[str], path: str) -> tuple[str, ...]:
        """Sorts class names that were read from a file; by value if all are numbers."""
        return sorted_names(names)


class ClassKind(ClassUncertainty, Kind):
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
        """Returns the frequency of each class, [C]."""
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
        """Returns the class's score minus the mean score of the remaining classes."""
        index = class_index(task, output, target)
        weights = np.full(len(task.classes), -1 / (len(task.classes) - 1), np.float32)
        weights[index] = 1
        return weights, task.classes[index], float(output[index])


def cumulative_logits(scores: Any, xp: Any = np) -> Any:
    """Returns the logits of P(class > k) for k = 0 … C - 2, strictly decreasing in k.

    The first score shifts all logits; the softplus of each further score is the gap to the previous
    logit. The middle logit equals the first score, so that scores near zero favor neither end.

    Args:
        scores: [..., C - 1], the outputs of a head.
        xp: array library, numpy or jax.numpy.
    """
    gaps = xp.logaddexp(xp.zeros_like(scores[..., 1:]), scores[..., 1:])
    below = xp.concatenate([xp.zeros_like(scores[..., :1]), xp.cumsum(gaps, axis=-1)], axis=-1)
    middle = (scores.shape[-1] - 1) // 2
    return scores[..., :1] - (below - below[..., middle : middle + 1])


def class_index(task: "Task", output: np.ndarray, target: str | None) -> int:
    """Returns the index of the class `target`; if None, that of the highest output."""
    if target is None:
        return int(np.argmax(output))
    if target not in task.classes:
        raise unknown(f"class of task {task.name!r}:", target, task.classes)
    return task.classes.index(target)


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Registers a kind; its name must be new."""
    if kind.name in _KINDS:
        raise InputError(f"kind {kind.name!r} is already registered")
    if hasattr(kind, "is_unlabelled"):  # the former name: it would be ignored
        raise InputError(f"kind {kind.name!r}: is_unlabelled is now is_unlabeled; rename it")
    _KINDS[kind.name] = kind
    return kind


def names() -> tuple[str, ...]:
    """Returns the names of all registered kinds."""
    return tuple(_KINDS)


def get(kind: "str | Kind") -> Kind:
    """Returns the kind of that name; raises InputError if it is not registered."""
    if isinstance(kind, Kind):
        return kind
    if kind not in _KINDS:
        raise unknown("task kind", kind, _KINDS)
    return _KINDS[kind]
