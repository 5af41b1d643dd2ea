"""Metrics over all predictions of a split, under their established names.

A metric takes (labels [N], predictions [N], the table of N examples). Metrics over questions or
pairs group examples by the table.
"""

import collections
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import calibration, ranking, resampled_metrics
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind, Label
from gemma_encoder.inputs.task import ExampleTable, Task

Metric = Callable[[np.ndarray, np.ndarray, ExampleTable], float]


def _sklearn(name: str, **options) -> Metric:
    def metric(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, predictions, **options))

    return metric


def _equally_weighted(*names: str) -> dict[str, Metric]:
    """Metrics of a single resample, that of all examples.

    Importing scikit-learn and scipy.stats for these would take a second of each start.
    """

    def metric(name: str) -> Metric:
        weighted = resampled_metrics.METRICS[name]
        return lambda labels, predictions, table: float(
            weighted(np.ones((1, len(labels))), labels, predictions)[0]
        )

    return {name: metric(name) for name in names}


def exact_match(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
    """Returns the share of questions with all answers classified correctly (MultiRC's EM)."""
    correct = [
        np.array_equal(labels[group], predictions[group]) for group in table.groups().values()
    ]
    return float(np.mean(correct))


def gender_parity(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
    """Returns the share of pairs with equal predictions (Winogender, AX-g).

    The sentences of a pair differ only in the pronoun's gender. The benchmark reports percent.
    """
    groups = table.groups()
    for pair, group in groups.items():
        if len(group) != 2:
            raise InputError(
                f"gender parity compares pairs of examples; pair {pair!r} has {len(group)}"
            )
    equal = [predictions[first] == predictions[second] for first, second in groups.values()]
    return float(np.mean(equal))


def choose(table: ExampleTable, scores: np.ndarray) -> dict[str, int]:
    """Returns the example id of each question's best-scored option; of ties, the first option."""
    return {
        question: group[int(np.argmax(scores[group]))] for question, group in table.groups().items()
    }


OptionValue = Callable[[np.ndarray, ExampleTable, int], float]  # of the option with that id


def _is_correct(labels: np.ndarray, table: ExampleTable, option: int) -> float:
    return float(labels[option] > 0)


def _best_match(compare: Callable[[str, str], float]) -> OptionValue:
    """Compares an option with each correct answer to its question; the maximum counts."""

    def value(labels: np.ndarray, table: ExampleTable, option: int) -> float:
        info = table.infos[option]
        return max(compare(info["option"], answer) for answer in info["answers"])

    return value


def _of_best(value: OptionValue) -> Metric:
    """Metric of each question's best-scored option, averaged over questions."""

    def metric(labels: np.ndarray, scores: np.ndarray, table: ExampleTable) -> float:
        selected = choose(table, scores).values()
        return float(np.mean([value(labels, table, option) for option in selected]))

    return metric


def _of_random(value: OptionValue, labels: np.ndarray, table: ExampleTable) -> float:
    """Returns the expected value of the metric if each question's option is drawn at random."""
    questions = table.groups().values()
    means = [np.mean([value(labels, table, option) for option in group]) for group in questions]
    return float(np.mean(means))


def nll(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """Returns the mean negative log-likelihood per predicted token, in nats, over all texts.

    Outputs [N, 2] are each text's summed negative log-likelihood and token count.
    """
    del labels, table
    total, count = outputs.astype(np.float64).sum(axis=0)
    return float(total / count)


def perplexity(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """Returns exp(nll); a uniform model's perplexity is the vocabulary size."""
    return float(np.exp(nll(labels, outputs, table)))


def normalize_answer(text: str) -> str:
    """Normalizes as SQuAD and ReCoRD do: lower case, no punctuation or articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answers_equal(prediction: str, answer: str) -> float:
    """Returns 1 if the normalized texts are equal, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Returns the F1 score between the bags of words of the normalized texts."""
    words = collections.Counter(normalize_answer(prediction).split())
    expected = collections.Counter(normalize_answer(answer).split())
    common = (words & expected).total()
    return 2 * common / (words.total() + expected.total()) if common else 0.0


def _decided(metric: Metric) -> Metric:
    """Multi-label metric of decisions, p >= 0.5, in place of probabilities."""
    return lambda labels, outputs, table: metric(labels, outputs >= 0.5, table)


def average_precision(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """Returns the average precision, averaged over the classes that an example has.

    It is not defined for a class without an example.
    """
    import sklearn.metrics

    present = labels.any(axis=0)
    if not present.any():
        return 0.0
    return float(sklearn.metrics.average_precision_score(labels[:, present], outputs[:, present]))


# Of all other metrics, higher values are better.
LOWEST_IS_BEST = ["perplexity", "nll", "mean_absolute_error", "mae", "rmse"]


def plain_name(name: str) -> str:
    """Returns a logged metric's name without the part of the split: "rmse_matched" is "rmse"."""
    names = {metric for metrics in METRICS.values() for metric in metrics}
    matching = [metric for metric in names if name == metric or name.startswith(f"{metric}_")]
    return max(matching, key=len, default=name)


def lowest_is_best(name: str) -> bool:
    """Returns True if lower values of the metric, maybe with a part's suffix, are better."""
    return plain_name(name) in LOWEST_IS_BEST


OPTION_VALUES: dict[str, OptionValue] = {
    "accuracy": _is_correct,
    "exact_match": _best_match(answers_equal),
    "token_f1": _best_match(token_f1),
}

# Metrics compare labels (`Kind.metric_labels`) with predictions (`Kind.decide`): class indices,
# targets in the task's own units, scores of options, probabilities of several classes (multi-label)
# or, for language models, each text's summed negative log-likelihood and token count. Ranking
# metrics are in `evaluation.ranking`.
METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        # f1 is that of class 1, f1a MultiRC's name for it: over all answers.
        **_equally_weighted("accuracy", "f1", "f1a", "macro_f1", "matthews_correlation"),
        "exact_match": exact_match,
        "gender_parity": gender_parity,
    },
    # Errors are in the task's units.
    "regression": _equally_weighted("pearson", "spearman", "mae", "rmse", "r2"),
    "multi_label": {
        "micro_f1": _decided(_sklearn("f1_score", average="micro", zero_division=0.0)),
        # A class that no example has and that is never predicted is left out.
        "macro_f1": _decided(_sklearn("f1_score", average="macro", zero_division=np.nan)),
        "average_precision": average_precision,
        "subset_accuracy": _decided(_sklearn("accuracy_score")),
    },
    # Errors are in classes.
    "ordinal": _equally_weighted(
        "quadratic_weighted_kappa", "mean_absolute_error", "mae", "accuracy"
    ),
    "choice": {name: _of_best(value) for name, value in OPTION_VALUES.items()},
    "language_model": {"perplexity": perplexity, "nll": nll},
}


class ProbabilityMetric:
    """Metric of the probabilities of classes, in place of the decisions; the lowest is best.

    Args:
        measure: function of (task, outputs, labels).
    """

    def __init__(self, measure: Callable[[Task, np.ndarray, Sequence[Label]], float]):
        self.measure = measure

    def __call__(self, labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
        """Refuses decisions: a metric is only called with these."""
        raise TypeError("use compute_metric, which passes the probabilities")


for _kind in ("classification", "ordinal", "multi_label"):
    METRICS[_kind] |= {
        "brier_score": ProbabilityMetric(calibration.brier_score),
        "calibration_error": ProbabilityMetric(calibration.task_calibration_error),
        "log_loss": ProbabilityMetric(calibration.log_loss),
    }
LOWEST_IS_BEST += ["brier_score", "calibration_error", "log_loss"]


def compute_metric(
    task: Task, name: str, outputs: np.ndarray, labels: Sequence[Label], table: ExampleTable
) -> float:
    """Computes one metric of `METRICS`.

    Args:
        task: the task.
        name: name of the metric.
        outputs: [N, …], from `Kind.postprocess`.
        labels: the N labels.
        table: groups of the examples.
    """
    metric = METRICS[task.kind.name][name]
    if isinstance(metric, ProbabilityMetric):
        return metric.measure(task, outputs, labels)
    return metric(task.kind.metric_labels(task, labels), task.kind.decide(task, outputs), table)


def register_metric(kind: str, name: str, metric: Metric, *, lowest: bool = False) -> None:
    """Registers a metric for a kind of task.

    Args:
        kind: name of the kind.
        name: name of the metric in tasks and logs.
        metric: function of all predictions of a split.
        lowest: lower values are better, for tasks of every kind.

    Raises:
        InputError: the kind is unknown, ranks documents, or already has a metric of that name.
    """
    if kinds.get(kind).ranks:
        raise InputError(
            f"metric {name!r}: none can be added to kind {kind}, whose metrics ir_measures "
            f"computes: {', '.join(ranking.METRICS)}"
        )
    metrics = METRICS.setdefault(kinds.get(kind).name, {})
    if name in metrics:
        raise InputError(f"metric {name!r} of kind {kind} is already registered")
    metrics[name] = metric
    if lowest:
        LOWEST_IS_BEST.append(name)


def check_metrics(kind: Kind, names: Iterable[str]) -> None:
    """Raises InputError if a kind of task lacks one of the metrics."""
    if kind.ranks:
        ranking.check_ranking_metrics(tuple(names))
        return
    metrics = METRICS.get(kind.name, {})
    for name in names:
        if name not in metrics:
            raise unknown(f"{kind} metric", name, metrics)


def has_labels(task: Task, table: ExampleTable) -> bool:
    """Returns False if no example has a label; raises InputError if only some have one."""
    unlabeled = sum(task.is_unlabeled(label) for label in table.labels)
    if 0 < unlabeled < len(table.labels):
        raise InputError(
            f"task {task.name!r}: {unlabeled} of {len(table.labels)} examples have no label (-1); "
            "metrics need all of them or none"
        )
    return not unlabeled


def compute_metrics(task: Task, outputs: np.ndarray, table: ExampleTable) -> dict[str, float]:
    """Computes the task's metrics; returns an empty dict if no example has a label.

    Args:
        task: a task of any kind but ranking, whose metrics compare runs with qrels.
        outputs: [N, …], from `Kind.postprocess`.
        table: the N examples.
    """
    check_metrics(task.kind, task.metrics)
    if not has_labels(task, table):
        return {}
    return {name: compute_metric(task, name, outputs, table.labels, table) for name in task.metrics}


def baseline(task: Task, table: ExampleTable, constant: Any = None) -> dict[str, float]:
    """Returns the metrics of the best constant prediction; empty if there is none.

    Args:
        task: a task of any kind but ranking.
        table: the examples to predict.
        constant: the constant output; by default the one that fits the table's labels best.
    """
    if not is_labeled(task, table):
        return {}
    if constant is None:
        constant = task.kind.baseline(task, table.labels)
    if constant is None:
        return {}
    row = np.asarray(constant, np.float32 if np.ndim(constant) else np.float64)
    outputs = np.broadcast_to(row, (len(table.labels), *row.shape))
    return compute_metrics(task, outputs, table)


def chance_metrics(task: Task, table: ExampleTable, constant: Any = None) -> dict[str, float]:
    """Returns the metrics of a prediction that ignores the texts; empty if none is defined.

    For multiple choice that is a random option, for other kinds the best constant prediction, see
    `baseline`. Ranking metrics compare runs with qrels and have no value here.
    """
    if task.kind.is_list and is_labeled(task, table):
        labels = task.kind.metric_labels(task, table.labels)
        names = [name for name in task.metrics if name in OPTION_VALUES]
        values = {name: _of_random(OPTION_VALUES[name], labels, table) for name in names}
    else:
        values = baseline(task, table, constant)
    if task.chance is not None and is_labeled(task, table):
        values.setdefault(task.metrics[0], task.chance)
    return values


def is_labeled(task: Task, table: ExampleTable) -> bool:
    """Returns True if there are examples and all have labels."""
    return bool(table.labels) and not any(task.is_unlabeled(label) for label in table.labels)
