"""Metrics over all predictions of a split at once, by the names that the field uses.

Each takes (labels [N], predictions [N], the table of examples). Those over questions or pairs group by the table, on the host.
"""

import collections
import re
import string
import warnings
from collections.abc import Callable, Iterable

import numpy as np

from gemma_encoder.inputs.errors import InputError, unknown
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


def text_perplexity(outputs: np.ndarray) -> np.ndarray:
    """[N]: the perplexity of each text by itself, from its summed negative log-likelihood and count [N, 2]."""
    return np.exp(outputs[:, 0] / outputs[:, 1])


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation, which ReCoRD uses: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answers_equal(prediction: str, answer: str) -> float:
    """1 if both are the same when normalised, else 0."""
    return float(normalise_answer(prediction) == normalise_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 between the words of both, normalised, each word as often as it stands there."""
    words, expected = (
        collections.Counter(normalise_answer(text).split()) for text in (prediction, answer)
    )
    common = (words & expected).total()
    return 2 * common / (words.total() + expected.total()) if common else 0.0


LOWEST_IS_BEST = ("perplexity", "nll")  # of all other metrics the highest is


def lowest_is_best(name: str) -> bool:
    """Whether the lowest value of a metric is the best one; `name` may end in a part of the split."""
    return name.startswith(LOWEST_IS_BEST)


# Classification metrics see class indices, regression metrics targets and predictions in the task's own units, choice metrics the
# options' scores, language-model metrics each text's summed negative log-likelihood and number of predicted tokens.
METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        "accuracy": _sklearn("accuracy_score"),
        "f1": _sklearn("f1_score", zero_division=0.0),  # of class 1
        "f1a": _sklearn(
            "f1_score", zero_division=0.0
        ),  # MultiRC's name for it: over all answers of all questions
        "macro_f1": _sklearn("f1_score", average="macro", zero_division=0.0),
        "matthews_correlation": _sklearn("matthews_corrcoef"),
        "exact_match": exact_match,
        "gender_parity": gender_parity,
    },
    "regression": {"pearson": _correlation("pearsonr"), "spearman": _correlation("spearmanr")},
    "choice": {
        "accuracy": _choice_accuracy,
        "exact_match": _over_answers(answers_equal),
        "token_f1": _over_answers(token_f1),
    },
    "language_model": {"perplexity": perplexity, "nll": nll},
}


def check_names(kind: str, names: Iterable[str]) -> None:
    """Raises InputError for a metric that a kind of task does not have."""
    for name in names:
        if name not in METRICS[kind]:
            raise unknown(f"{kind} metric", name, METRICS[kind])


def compute(task: Task, outputs: np.ndarray, table: ExampleTable) -> dict[str, float]:
    """The task's metrics; none where no label is known.

    Args:
        task: of any kind but ranking.
        outputs: [N, C] class probabilities, [N] predicted targets in the task's own units, [N] scores of options, or [N, 2] of a language model.
        table: of the N examples.
    """
    check_names(task.kind, task.metrics)
    unlabelled = sum(task.is_unlabelled(label) for label in table.labels)
    if unlabelled == len(table.labels):
        return {}
    if unlabelled:
        raise InputError(
            f"task {task.name!r}: {unlabelled} of {len(table.labels)} examples have no label (-1); metrics need all of them or none"
        )
    labels = np.array(table.labels)
    predictions = outputs.argmax(axis=-1) if task.kind == "classification" else outputs
    return {name: METRICS[task.kind][name](labels, predictions, table) for name in task.metrics}
