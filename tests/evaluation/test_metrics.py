"""Metrics against values computed by hand."""

import functools
import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from tests.evaluation.conftest import one_hot, table, task


def test_classification_metrics_by_hand():
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    labels = np.array([1, 1, 1, 0, 0, 0])
    predicted = np.array([1, 1, 0, 1, 0, 0])
    values = metrics.compute_metrics(
        task("classification", ("accuracy", "f1", "macro_f1", "matthews_correlation")),
        one_hot(predicted),
        table(labels),
    )
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert values["macro_f1"] == pytest.approx(2 / 3)
    assert values["matthews_correlation"] == pytest.approx((2 * 2 - 1 * 1) / np.sqrt(3 * 3 * 3 * 3))


def test_a_constant_prediction_scores_zero_and_not_nan():
    labels = np.array([0, 1, 1])
    assert metrics.compute_metrics(
        task("classification", ("matthews_correlation", "f1")),
        one_hot(np.zeros(3, int)),
        table(labels),
    ) == {
        "matthews_correlation": 0,
        "f1": 0,
    }
    assert metrics.compute_metrics(
        task("regression", ("pearson", "spearman")), np.ones(3), table(labels)
    ) == {"pearson": 0, "spearman": 0}


def test_correlations_by_hand():
    values = metrics.compute_metrics(
        task("regression", ("pearson", "spearman")), np.array([1.0, 2, 3, 10]), table([1, 2, 3, 4])
    )
    assert values["spearman"] == pytest.approx(1)
    # covariance 14/4, deviations sqrt(5/4) and sqrt(50/4)
    assert values["pearson"] == pytest.approx(14 / np.sqrt(5 * 50))


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_metrics_equal_those_of_scikit_learn_and_scipy(classes):
    """Ours need neither, whose import takes a second."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 60)
    guesses = np.where(rng.random(60) < 0.5, labels, rng.integers(0, classes, 60))
    f1 = functools.partial(sklearn.metrics.f1_score, zero_division=0.0)
    expected = {
        ("classification", "accuracy"): sklearn.metrics.accuracy_score,
        ("classification", "macro_f1"): functools.partial(f1, average="macro"),
        ("classification", "matthews_correlation"): sklearn.metrics.matthews_corrcoef,
        ("ordinal", "quadratic_weighted_kappa"): functools.partial(
            sklearn.metrics.cohen_kappa_score, weights="quadratic", labels=range(classes)
        ),
        ("regression", "pearson"): lambda *values: scipy.stats.pearsonr(*values).statistic,
        ("regression", "spearman"): lambda *values: scipy.stats.spearmanr(*values).statistic,
        ("regression", "mae"): sklearn.metrics.mean_absolute_error,
        ("regression", "rmse"): sklearn.metrics.root_mean_squared_error,
        ("regression", "r2"): sklearn.metrics.r2_score,
    }
    if classes == 2:
        expected["classification", "f1"] = f1
    for (kind, name), function in expected.items():
        value = metrics.METRICS[kind][name](labels, guesses, table(labels))
        assert value == pytest.approx(function(labels, guesses), abs=1e-12), name


def test_perplexity_is_over_tokens_not_over_texts(tmp_path):
    """One text has a token of probability 1/2, the other three of 1/8; both are in the file."""
    outputs = np.array([[np.log(2), 1], [3 * np.log(8), 3]], np.float32)
    texts = task("language_model", ("perplexity", "nll"))
    values = metrics.compute_metrics(texts, outputs, table([0, 0]))
    assert values == {
        "perplexity": pytest.approx(2 ** (10 / 4)),
        "nll": pytest.approx(np.log(2) * 10 / 4),
    }
    # Labels of language modeling are ignored, also -1.
    path = Predictions(texts, "test", outputs, table([0, -1])).write(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["prediction"], line["tokens"]) for line in lines] == [
        (pytest.approx(2), 1),
        (pytest.approx(8), 3),
    ]
    assert lines[1]["nll"] == pytest.approx(3 * np.log(8))
    assert metrics.lowest_is_best("perplexity_matched")
    assert metrics.lowest_is_best("nll")
    assert not metrics.lowest_is_best("accuracy")


def test_unknown_metrics_name_the_nearest():
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        metrics.compute_metrics(task("classification", ("acuracy",)), one_hot([0]), table([0]))
    with pytest.raises(InputError, match=r"did you mean 'mrr@10'"):
        ranking.compute_ranking_metrics(("mrr@100",), {"q": {"d": 1}}, {"q": [("d", 1.0)]})


def test_multirc_counts_answers_and_whole_questions():
    # Question p: both answers correct. Question q: one of three wrong. Rows are interleaved, so
    # that only the table groups them.
    queries = ["p", "q", "p", "q", "q"]
    labels = [1, 1, 0, 0, 1]
    predicted = np.array([1, 1, 0, 1, 1])
    values = metrics.compute_metrics(
        task("classification", ("f1a", "exact_match")), one_hot(predicted), table(labels, queries)
    )
    # Over all answers: true positives 3, false positives 1.
    assert values["f1a"] == pytest.approx(2 * 3 / (2 * 3 + 1))
    assert values["exact_match"] == 1 / 2


def test_gender_parity_compares_predictions_not_labels():
    queries = ["0", "0", "1", "1", "2", "2"]
    labels = [0, 0, 1, 1, 0, 0]
    # Pair 0: equal and wrong. Pair 1: different. Pair 2: equal and correct.
    predicted = np.array([1, 1, 1, 0, 0, 0])
    values = metrics.compute_metrics(
        task("classification", ("accuracy", "gender_parity")),
        one_hot(predicted),
        table(labels, queries),
    )
    assert values == {"accuracy": 3 / 6, "gender_parity": pytest.approx(2 / 3)}
    with pytest.raises(InputError, match="pair '2' has 1"):
        metrics.compute_metrics(
            task("classification", ("gender_parity",)),
            one_hot(predicted[:5]),
            table(labels[:5], queries[:5]),
        )


def test_cb_averages_f1_over_classes():
    # Recall and precision: class 0 has 1 and 1/2, class 1 has 1/2 and 1, class 2 has 1 and 1.
    three = Task("t", "classification", Template("{x}"), ("accuracy", "macro_f1"), ("a", "b", "c"))
    values = metrics.compute_metrics(three, np.eye(3)[[0, 0, 1, 2]], table([0, 1, 1, 2]))
    assert values == {"accuracy": 3 / 4, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_a_choice_is_the_highest_score_of_its_question():
    examples = table([0, 1, 1, 0, 0], ["p", "q", "p", "q", "q"])
    choice = task("choice", ("accuracy",))
    for scores, accuracy in (
        ([0.1, 5, 0.2, -1, 4], 1.0),
        ([0.3, 5, 0.2, -1, 6], 0.0),
        ([0.0] * 5, 0.5),  # equal scores: the first option, wrong for p, correct for q
    ):
        values = metrics.compute_metrics(choice, np.array(scores), examples)
        assert values == {"accuracy": accuracy}


@pytest.mark.parametrize(
    ("option", "answers", "f1", "em"),
    [
        ("the Bob Dylan", ["Bob Dylan!"], 1, 1),  # articles, case and punctuation do not count
        ("Bob", ["Bob Dylan"], 2 * 1 * 0.5 / 1.5, 0),  # precision 1, recall 1/2
        ("Bob Bob", ["Bob"], 2 * 0.5 * 1 / 1.5, 0),  # repeated words count repeatedly
        ("Bob", ["Ann", "Bob"], 1, 1),  # the best of the correct answers
        ("Ann", ["Bob"], 0, 0),
        ("U.S.", ["us"], 1, 1),
        ("theatre", ["the atre"], 0, 0),  # an article is a whole word
    ],
)
def test_record_compares_entities_as_squad_does(option, answers, f1, em):
    record = task("choice", ("token_f1", "exact_match"))
    infos = [{"option": "never chosen", "answers": answers}, {"option": option, "answers": answers}]
    values = metrics.compute_metrics(
        record, np.array([0.0, 1.0]), table([0, em], ["q", "q"], ["0", "1"], infos)
    )
    assert values == {"token_f1": pytest.approx(f1), "exact_match": em}


def test_metrics_need_all_labels_or_none():
    accuracy = task("classification", ("accuracy",))
    assert metrics.compute_metrics(accuracy, one_hot([0, 1]), table([-1, -1])) == {}
    with pytest.raises(InputError, match="1 of 2 examples have no label"):
        metrics.compute_metrics(accuracy, one_hot([0, 1]), table([-1, 1]))
    # -1 is a valid target if the range contains it.
    values = metrics.compute_metrics(
        task("regression", ("pearson",), label_range=(-1.0, 1.0)),
        np.array([-1.0, -1, 1]),
        table([-1, -1, 1]),
    )
    assert values == {"pearson": pytest.approx(1)}


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.booleans(), st.integers(-3, 3)),
        min_size=1,
        max_size=12,
    ),
    st.randoms(),
)
def test_metrics_by_question_ignore_the_order_of_examples(rows, random):
    """Scores are made distinct, because ties depend on the order of options."""
    rows = [(query, right, score + index / 100) for index, (query, right, score) in enumerate(rows)]
    shuffled = random.sample(rows, len(rows))

    def values(rows):
        queries, labels, scores = (list(column) for column in zip(*rows, strict=True))
        choice = metrics.compute_metrics(
            task("choice", ("accuracy",)), np.array(scores), table(labels, queries)
        )
        return choice | metrics.compute_metrics(
            task("classification", ("exact_match",)),
            one_hot((np.array(scores) > 0).astype(int)),
            table(labels, queries),
        )

    assert values(rows) == pytest.approx(values(shuffled))


def test_registering_a_metric(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "regression", dict(metrics.METRICS["regression"]))
    monkeypatch.setattr(metrics, "LOWEST_IS_BEST", list(metrics.LOWEST_IS_BEST))

    def worst(labels, predictions, table):
        return float(np.abs(labels - predictions).max())

    metrics.register_metric("regression", "worst", worst, lowest=True)
    metrics.check_metrics(kinds.get("regression"), ("worst", "pearson"))
    assert metrics.lowest_is_best("worst_matched") and not metrics.lowest_is_best("pearson")
    for kind, name, message in (
        ("regression", "worst", "metric 'worst' of kind regression is already registered"),
        ("regresion", "worse", "unknown task kind 'regresion'; did you mean 'regression'"),
        ("ranking", "worst", "none can be added to kind ranking, .*: mrr@10"),
    ):
        with pytest.raises(InputError, match=message):
            metrics.register_metric(kind, name, worst)


def test_errors_of_a_regression_by_hand():
    names = ("mae", "rmse", "r2")
    values = metrics.compute_metrics(
        task("regression", names, label_range=(0.0, 10.0)),
        np.array([1.0, 2, 3, 8]),
        table([1, 2, 3, 4]),
    )
    # Errors 0, 0, 0 and 4; squared deviations of the labels sum to 5.
    assert values == {"mae": 1, "rmse": 2, "r2": pytest.approx(1 - 16 / 5)}


@pytest.mark.parametrize("labels", [[2.0], [3.0, 3.0]])
def test_what_is_undefined_in_a_regression_is_zero(labels):
    names = ("spearman", "pearson", "mae", "rmse", "r2")
    outputs = np.array(labels) + 1
    values = metrics.compute_metrics(
        task("regression", names, label_range=(0.0, 5.0)), outputs, table(labels)
    )
    assert values == {"spearman": 0, "pearson": 0, "mae": 1, "rmse": 1, "r2": 0}


@pytest.mark.parametrize("name", ["mae", "rmse", "mean_absolute_error", "rmse_matched"])
def test_errors_are_best_when_low(name):
    assert metrics.lowest_is_best(name)


def test_a_longer_name_is_another_metric(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "language_model", dict(metrics.METRICS["language_model"]))
    metrics.register_metric("language_model", "nll_gain", lambda *_: 1.0)
    assert not metrics.lowest_is_best("nll_gain")
    assert not metrics.lowest_is_best("nll_gain_matched")
