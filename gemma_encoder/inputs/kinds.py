"""Kinds of task: the only module, with `list_kinds`, in which kinds differ.

A kind defines the outputs of its head, the checking and scaling of labels, whether examples come in
lists, the conversion of scores to predictions, the severity of mistakes, and the baseline of a
model that has learned nothing. Losses and metrics are tables keyed by the kind's name, see
`training.losses` and `evaluation.metrics`; all other code calls `task.kind`. Methods are documented
in `Kind`.

Shapes: N examples, K outputs of a head, C classes.
"""

import numpy as np

from gemma_encoder.inputs.class_names import are_numbers, sorted_names
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import (
    UNLABELED,
    ClassKind,
    Kind,
    class_index,
    cumulative_logits,
    get,
    names,
    register,
)
from gemma_encoder.inputs.list_kinds import Choice, Ranking, Retrieval, SparseRetrieval
from gemma_encoder.inputs.number_text import format_label, format_number
from gemma_encoder.inputs.uncertainty import ResidualUncertainty

__all__ = ["Kind", "cumulative_logits", "get", "names", "register"]


class Classification(ClassKind):
    """One of several classes: softmax over C scores."""

    name = "classification"
    has_temperature = True
    default_loss = "softmax_cross_entropy"
    default_metrics = ("accuracy", "macro_f1")
    label_column = "class"
    one_class = True
    score_meaning = "logits of the classes; their softmax is the probabilities"

    def postprocess(self, task, scores):
        scores = scores / task.temperature
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)

    def decide(self, task, outputs):
        return outputs.argmax(axis=-1)

    def severity(self, task, outputs, labels):
        """Returns the confidence in a wrong class."""
        wrong = self.decide(task, outputs) != np.array(labels)
        return np.where(wrong, outputs.max(axis=-1), -np.inf)


class Ordinal(ClassKind):
    """One of several ordered classes, by cumulative logits with increasing thresholds.

    The head has C - 1 outputs, see `cumulative_logits`; P(class > k) is the logistic function of
    the k-th cumulative logit, so class probabilities are never negative. This is the cumulative
    link model of McCullagh (1980), with gaps between thresholds that depend on the text.
    """

    name = "ordinal"
    has_temperature = True
    default_loss = "cumulative_link"
    default_metrics = ("quadratic_weighted_kappa", "mean_absolute_error")
    label_column = "class"
    fractional_classes = True
    one_class = True
    score_meaning = (
        "the first shifts the cumulative logits of all classes, the others are the gaps between "
        "them before softplus; only `Predictor.predict` returns probabilities"
    )

    def num_outputs(self, task):
        return len(task.classes) - 1

    def postprocess(self, task, scores):
        """Returns class probabilities [N, C]."""
        # P(class > k), decreasing in k.
        above = np.exp(-np.logaddexp(0, -cumulative_logits(scores) / task.temperature))
        ones = np.ones_like(above[:, :1])
        return -np.diff(np.concatenate([ones, above, 0 * ones], axis=-1), axis=-1)

    def decide(self, task, outputs):
        """Returns the median class, which has the lowest expected absolute error."""
        return (np.cumsum(outputs, axis=-1)[..., :-1] < 0.5).sum(axis=-1)

    def severity(self, task, outputs, labels):
        """Returns the expected distance in classes of a wrong decision."""
        labels = np.array(labels, float)
        distances = np.abs(np.arange(len(task.classes)) - labels[:, None])
        wrong = self.decide(task, outputs) != labels
        return np.where(wrong, (outputs * distances).sum(axis=-1), -np.inf)

    def order_classes(self, names, path):
        names = list(names)
        if not are_numbers(names):
            listed = ", ".join(sorted(names)[:6])
            raise InputError(
                f"{path}: the order of an ordinal task's classes does not follow from their names "
                f"({listed}); list them, lowest first, in own.classes"
            )
        return sorted_names(names)

    def direction(self, task, output, target):
        """Returns the score that shifts all cumulative logits towards higher classes."""
        if target is not None:
            raise InputError(
                f"task {task.name!r} has ordered classes: an attribution explains the score that "
                "moves all of them; leave the target out"
            )
        weights = np.zeros(self.num_outputs(task), np.float32)
        weights[0] = 1
        return weights, task.name, float(output @ np.arange(len(task.classes)))


class MultiLabel(ClassKind):
    """Any number of classes at once: a logistic function of each of C scores.

    A label is a tuple of class indices; the empty tuple is a valid label.
    """

    name = "multi_label"
    has_temperature = True
    default_loss = "sigmoid_cross_entropy"
    default_metrics = ("micro_f1", "macro_f1", "average_precision")
    label_column = "classes"
    mistake_measure = "classes wrong"
    score_meaning = "a logit for each class; its sigmoid is the probability"

    def target_width(self, task):
        return len(task.classes)

    def check_label(self, task, label, where):
        """Returns 0: training uses the vector label of `target`."""
        indices = np.array(label if isinstance(label, tuple) else (label,), float)
        valid = (indices >= 0) & (indices < len(task.classes)) & (indices == indices.round())
        if not valid.all():
            raise InputError(
                f"task {task.name!r}, {where}: label {indices[~valid][0]:g} is out of range; "
                f"expected class indices from 0 to {len(task.classes) - 1} "
                f"({', '.join(task.classes)})"
            )
        return 0.0

    def target(self, task, label, where):
        checked = self.check_label(task, label, where)
        return checked, self.metric_labels(task, [label])[0]

    def metric_labels(self, task, labels):
        """Returns multi-hot rows, [N, C] float32."""
        rows = np.zeros((len(labels), len(task.classes)), np.float32)
        for row, label in zip(rows, labels, strict=True):
            indices = label if isinstance(label, tuple) else (label,)
            row[[int(index) for index in indices]] = 1
        return rows

    def postprocess(self, task, scores):
        """Returns the probability of each class, [N, C]; rows need not sum to 1."""
        return np.exp(-np.logaddexp(0, -scores / task.temperature))

    def truth(self, task, labels):
        return self.metric_labels(task, labels)

    def baseline(self, task, labels):
        """Returns the frequency of each class, [C]."""
        return self.metric_labels(task, labels).mean(axis=0)

    def columns(self, task, outputs):
        probabilities = {name: outputs[:, index] for index, name in enumerate(task.classes)}
        predicted = [[task.classes[i] for i in np.flatnonzero(row >= 0.5)] for row in outputs]
        return {"prediction": predicted, "probabilities": probabilities}

    def line(self, task, output, label):
        indices = label if isinstance(label, tuple) else (label,)
        return {
            "label": [int(index) for index in indices],
            "prediction": np.flatnonzero(output >= 0.5).tolist(),
            "probabilities": [round(float(p), 6) for p in output],
        }

    def read_line(self, line):
        return line["probabilities"]

    def read_label(self, line):
        label = line.get("label", [UNLABELED])
        return UNLABELED if label == [UNLABELED] else tuple(label)

    def show(self, task, output):
        names = [f"{task.classes[i]} {output[i]:.2f}" for i in np.flatnonzero(output >= 0.5)]
        return ", ".join(names) or "no class"

    def show_label(self, task, label):
        if not isinstance(label, tuple):
            return f"label {label:g}"
        return ", ".join(task.classes[index] for index in label) or "no class"

    def severity(self, task, outputs, labels):
        """Returns the sum over classes of |probability - label| if any decision is wrong."""
        truth = self.metric_labels(task, labels)
        wrong = ((outputs >= 0.5) != truth).any(axis=-1)
        return np.where(wrong, np.abs(outputs - truth).sum(axis=-1), -np.inf)

    def mistake(self, task, line):
        label = ", ".join(task.classes[i] for i in line["label"])
        prediction = ", ".join(task.classes[i] for i in line["prediction"])
        wrong = set(line["label"]) ^ set(line["prediction"])
        return label or "no class", prediction or "no class", str(len(wrong))

    def summarize_labels(self, task, labels):
        rows = [label for label in labels if isinstance(label, tuple)]
        shares = self.metric_labels(task, rows).sum(axis=0) / max(len(labels), 1)
        parts = [f"{name} {share:.1%}" for name, share in zip(task.classes, shares, strict=True)]
        return "labels", ", ".join(parts)

    def direction(self, task, output, target):
        """Returns the class's own score."""
        index = class_index(task, output, target)
        weights = np.zeros(len(task.classes), np.float32)
        weights[index] = 1
        return weights, task.classes[index], float(output[index])


class Regression(ResidualUncertainty, Kind):
    """A number in a range, scaled to [0, 1] for training and in the task's own units for users."""

    name = "regression"
    default_loss = "mean_squared_error"
    default_metrics = ("spearman", "pearson", "mae", "rmse", "r2")
    has_range = True
    label_column = "number"
    mistake_measure = "error"
    score_meaning = "the prediction, in the units of the labels"

    def is_unlabeled(self, task, label):
        """Returns True for -1, unless the task's range contains it."""
        low, high = task.label_range
        return label == UNLABELED and not low <= label <= high

    def check_label(self, task, label, where):
        low, high = task.label_range
        if not low <= label <= high:
            raise InputError(
                f"task {task.name!r}, {where}: target {label:g} is out of range; expected {low:g} "
                f"to {high:g}"
            )
        return task.scale(label)

    def postprocess(self, task, scores):
        """Returns targets, [N] float64: at 1.7 billion, float32 has steps of 128."""
        return task.unscale(np.asarray(scores[:, 0], np.float64))

    def output_scale(self, task):
        """Returns the map from [0, 1] to the task's own units."""
        return task.label_range[1] - task.label_range[0], task.label_range[0]

    def baseline(self, task, labels):
        """Returns the mean label."""
        return np.mean(labels, dtype=np.float64)

    def initial_score(self, task, constant):
        """Returns the scaled constant, so that training starts at the mean target."""
        low, high = task.label_range
        # A rounded mean may lie just outside the range.
        return (min(max(float(constant), low), high) - low) / (high - low)

    def describe(self, task):
        return " to ".join(map(format_label, task.label_range))

    def show(self, task, output):
        return format_number(output)

    def show_label(self, task, label):
        return format_label(label)

    def severity(self, task, outputs, labels):
        """Returns the absolute error."""
        return np.abs(outputs - np.array(labels))

    def mistake(self, task, line):
        error = line["prediction"] - line["label"]
        prediction = format_number(line["prediction"])
        return format_label(line["label"]), prediction, format_number(error, "+")

    def summarize_labels(self, task, labels):
        values = np.array(labels)
        span = f"from {format_label(values.min())} to {format_label(values.max())}"
        mean = format_number(values.mean())
        return "targets", f"mean {mean}, standard deviation {format_number(values.std())}, {span}"


class LanguageModel(Kind):
    """Next-token prediction: the targets are the text's own tokens.

    The head returns each text's summed negative log-likelihood in nats and its number of predicted
    tokens.
    """

    name = "language_model"
    head = "language_model"
    default_loss = "negative_log_likelihood"
    default_metrics = ("perplexity", "nll")
    counts_tokens = True

    def num_outputs(self, task):
        return 2

    def is_unlabeled(self, task, label):
        return False

    def check_label(self, task, label, where):
        return 0.0

    def postprocess(self, task, scores):
        """Returns the scores unchanged: [N, 2], sum and count."""
        return scores

    def columns(self, task, outputs):
        """Returns each text's perplexity, its "nll" summed over tokens in nats, and "tokens"."""
        perplexity = np.exp(outputs[:, 0] / outputs[:, 1])
        return {
            "prediction": perplexity.astype(float),
            "nll": outputs[:, 0].astype(float),
            "tokens": outputs[:, 1].astype(int),
        }

    def line(self, task, output, label):
        return {name: column[0].item() for name, column in self.columns(task, output[None]).items()}

    def read_line(self, line):
        return [line["nll"], line["tokens"]]

    def show(self, task, output):
        return f"perplexity {np.exp(output[0] / output[1]):.1f}"

    def show_label(self, task, label):
        return ""

    def summarize_labels(self, task, labels):
        return None


for _kind in (
    Classification(),
    Regression(),
    Ranking(),
    Choice(),
    Retrieval(),
    SparseRetrieval(),
    LanguageModel(),
    MultiLabel(),
    Ordinal(),
):
    register(_kind)
