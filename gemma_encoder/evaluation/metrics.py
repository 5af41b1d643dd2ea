"""Metrics over all predictions of a split at once, by the names that the field uses.

Each takes (labels [N], predictions [N], the table of examples). Those over questions or pairs group by the table, on the host.
"""

import collections
import re
import string
import warnings
from collections.abc import Callable, Iterable

import numpy as np

from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.task import ExampleTable, Task

Metric = Callable[[np.ndarray, np.ndarray, ExampleTable], float]


def _sklearn(name: str, **options) -> Metric:
    def metric(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, predictions, **options))

    return metric


def _correlation(name: str) -> Metric:
    def metric(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
        import scipy.stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
            value = float(getattr(scipy.stats, name)(labels, predictions).statistic)
        return 0.0 if np.isnan(value) else value  # a constant prediction orders nothing

    return metric


def exact_match(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
    """The share of questions all of whose answers are classified right: MultiRC's EM."""
    return float(
        np.mean(
            [np.array_equal(labels[group], predictions[group]) for group in table.groups().values()]
        )
    )


def gender_parity(labels: np.ndarray, predictions: np.ndarray, table: ExampleTable) -> float:
    """The share of pairs, alike but for the pronoun's gender, whose halves are classified alike (Winogender, AX-g); in per cent there."""
    groups = table.groups()
    for pair, group in groups.items():
        if len(group) != 2:
            raise InputError(
                f"gender parity compares pairs of examples; pair {pair!r} has {len(group)}"
            )
    return float(
        np.mean([predictions[first] == predictions[second] for first, second in groups.values()])
    )


def choose(table: ExampleTable, scores: np.ndarray) -> dict[str, int]:
    """The example id of each question's option with the highest score; of equal scores the first option's."""
    return {
        question: group[int(np.argmax(scores[group]))] for question, group in table.groups().items()
    }


def _choice_accuracy(labels: np.ndarray, scores: np.ndarray, table: ExampleTable) -> float:
    return float(np.mean([labels[chosen] > 0 for chosen in choose(table, scores).values()]))


def _over_answers(compare: Callable[[str, str], float]) -> Metric:
    """The mean over questions of the best value that the chosen option reaches among the right answers."""

    def metric(labels: np.ndarray, scores: np.ndarray, table: ExampleTable) -> float:
        chosen = [table.infos[example] for example in choose(table, scores).values()]
        return float(
            np.mean(
                [
                    max(compare(info["option"], answer) for answer in info["answers"])
                    for info in chosen
                ]
            )
        )

    return metric


def nll(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """The mean negative log-likelihood of a token, in nats, over all predicted tokens of all texts; outputs [N, 2] are a text's sum and count."""
    del labels, table
    total, count = outputs.astype(np.float64).sum(axis=0)
    return float(total / count)


def perplexity(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """exp(nll): of a model that has learnt nothing, the size of the vocabulary."""
    return float(np.exp(nll(labels, outputs, table)))


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation, which ReCoRD uses: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answers_equal(prediction: str, answer: str) -> float:
    """1 if both are the same when normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 between the words of both, normalised, each word as often as it stands there."""
    words, expected = (
        collections.Counter(normalize_answer(text).split()) for text in (prediction, answer)
    )
    common = (words & expected).total()
    return 2 * common / (words.total() + expected.total()) if common else 0.0


def quadratic_weighted_kappa(
    labels: np.ndarray, predictions: np.ndarray, table: ExampleTable
) -> float:
    """Cohen's kappa with squared distances between classes as weights.

    Every class up to the highest takes part, also one that no label and no prediction names: left
    out, as scikit-learn does by itself, its neighbors would be one step apart.
    """
    import sklearn.metrics

    classes = np.arange(int(max(labels.max(), predictions.max())) + 1)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # of a division by zero: both sides constant
        value = sklearn.metrics.cohen_kappa_score(
            labels.astype(int), predictions.astype(int), labels=classes, weights="quadratic"
        )
    return 0.0 if np.isnan(value) else float(value)  # a constant prediction agrees by chance


def _decided(metric: Metric) -> Metric:
    """A metric of several classes at once that compares decisions, p >= 0.5."""
    return lambda labels, outputs, table: metric(labels, outputs >= 0.5, table)


def average_precision(labels: np.ndarray, outputs: np.ndarray, table: ExampleTable) -> float:
    """The mean over classes of average precision; 0 for a class that no label names."""
    import sklearn.metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of such a class
        return float(sklearn.metrics.average_precision_score(labels, outputs))


LOWEST_IS_BEST = ["perplexity", "nll", "mean_absolute_error"]  # of others the highest is


def lowest_is_best(name: str) -> bool:
    """Tells metrics whose lowest value is best; `name` may end in a part of the split."""
    return name.startswith(tuple(LOWEST_IS_BEST))


# Metrics compare labels (`Kind.metric_labels`) with predictions (`Kind.decide`): class indices,
# targets in the task's own units, scores of options, probabilities of several classes at once, or
# of a language model each text's summed negative log-likelihood and number of predicted tokens.
# Those of ranking are in `evaluation.ranking`.
METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        "accuracy": _sklearn("accuracy_score"),
        "f1": _sklearn("f1_score", zero_division=0.0),  # of class 1
        "f1a": _sklearn("f1_score", zero_division=0.0),  # MultiRC's name: over all answers
        "macro_f1": _sklearn("f1_score", average="macro", zero_division=0.0),
        "matthews_correlation": _sklearn("matthews_corrcoef"),
        "exact_match": exact_match,
        "gender_parity": gender_parity,
    },
    "regression": {"pearson": _correlation("pearsonr"), "spearman": _correlation("spearmanr")},
    "multi_label": {
        "micro_f1": _decided(_sklearn("f1_score", average="micro", zero_division=0.0)),
        "macro_f1": _decided(_sklearn("f1_score", average="macro", zero_division=0.0)),
        "average_precision": average_precision,
        "subset_accuracy": _decided(_sklearn("accuracy_score")),
    },
    "ordinal": {
        "quadratic_weighted_kappa": quadratic_weighted_kappa,
        "mean_absolute_error": _sklearn("mean_absolute_error"),
        "accuracy": _sklearn("accuracy_score"),
    },
    "choice": {
        "accuracy": _choice_accuracy,
        "exact_match": _over_answers(answers_equal),
        "token_f1": _over_answers(token_f1),
    },
    "language_model": {"perplexity": perplexity, "nll": nll},
}


def register_metric(kind: str, name: str, metric: Metric, *, lowest: bool = False) -> None:
    """Adds a metric for a registered kind of task; a name is registered once.

    Args:
        kind: of task.
        name: as tasks and the log have it.
        metric: of all predictions of a split.
        lowest: the lowest value is the best one, in tasks of every kind.

    Raises:
        InputError: no kind has that name, the kind has such a metric, or it is a ranking's.
    """
    if kinds.get(kind).ranks:
        raise InputError(
            f"metric {name!r}: none can be added to those of kind {kind}, which ir_measures "
            f"computes: {', '.join(ranking.METRICS)}"
        )
    metrics = METRICS.setdefault(kinds.get(kind).name, {})
    if name in metrics:
        raise InputError(f"metric {name!r} of kind {kind} is already registered")
    metrics[name] = metric
    if lowest:
        LOWEST_IS_BEST.append(name)


def check_metrics(kind: Kind, names: Iterable[str]) -> None:
    """Raises InputError for a metric that a kind of task does not have."""
    if kind.ranks:
        ranking.check_ranking_metrics(tuple(names))
        return
    metrics = METRICS.get(kind.name, {})
    for name in names:
        if name not in metrics:
            raise unknown(f"{kind} metric", name, metrics)


def compute_metrics(task: Task, outputs: np.ndarray, table: ExampleTable) -> dict[str, float]:
    """The task's metrics; none where no label is known.

    Args:
        task: of any kind but ranking, whose metrics are of runs.
        outputs: [N, …] as `Kind.postprocess` gives them.
        table: of the N examples.
    """
    check_metrics(task.kind, task.metrics)
    unlabeled = sum(task.is_unlabeled(label) for label in table.labels)
    if unlabeled == len(table.labels):
        return {}
    if unlabeled:
        raise InputError(
            f"task {task.name!r}: {unlabeled} of {len(table.labels)} examples have no label (-1); "
            "metrics need all of them or none"
        )
    labels = task.kind.metric_labels(task, table.labels)
    predictions = task.kind.decide(task, outputs)
    metrics = METRICS[task.kind.name]
    return {name: metrics[name](labels, predictions, table) for name in task.metrics}


def baseline(task: Task, table: ExampleTable) -> dict[str, float]:
    """The metrics of the best constant prediction for these labels; none where there is none."""
    if not table.labels or any(task.is_unlabeled(label) for label in table.labels):
        return {}
    output = task.kind.baseline(task, table.labels)
    if output is None:
        return {}
    return compute_metrics(task, np.stack([output] * len(table.labels)), table)
