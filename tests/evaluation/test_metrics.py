"""Metrics against values worked by hand."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.evaluation.predictions import Predictions, predict_split
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.batch import BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template


def task(kind, names, **fields):
    return Task(
        "t",
        kind,
        Template("{x}"),
        tuple(names),
        **({"classes": ("a", "b")} if kind == "classification" else {}),
        **fields,
    )


def one_hot(classes):
    return np.eye(2)[classes]


def table(labels, queries=None, documents=None, infos=None):
    result = ExampleTable()
    for number, label in enumerate(labels):
        result.add(
            Example(
                {"x": "x"},
                float(label),
                *(
                    column[number] if column else default
                    for column, default in ((queries, ""), (documents, ""), (infos, {}))
                ),
            )
        )
    return result


def test_classification_metrics_by_hand():
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    labels, predicted = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
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


def test_perplexity_is_over_tokens_not_over_texts(tmp_path):
    """Two texts: one token of probability 1/2, three of 1/8. A text's own perplexity is in the file, with what it is made of."""
    outputs = np.array([[np.log(2), 1], [3 * np.log(8), 3]], np.float32)
    texts = task("language_model", ("perplexity", "nll"))
    values = metrics.compute_metrics(texts, outputs, table([0, 0]))
    assert values == {
        "perplexity": pytest.approx(2 ** (10 / 4)),
        "nll": pytest.approx(np.log(2) * 10 / 4),
    }
    path = Predictions(texts, "test", outputs, table([0, -1])).write(
        tmp_path
    )  # nothing to label: a label that is unknown is none
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["prediction"], line["tokens"]) for line in lines] == [
        (pytest.approx(2), 1),
        (pytest.approx(8), 3),
    ]
    assert lines[1]["nll"] == pytest.approx(3 * np.log(8))
    assert (
        metrics.lowest_is_best("perplexity_matched")
        and metrics.lowest_is_best("nll")
        and not metrics.lowest_is_best("accuracy")
    )


def test_unknown_metrics_name_the_nearest():
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        metrics.compute_metrics(task("classification", ("acuracy",)), one_hot([0]), table([0]))
    with pytest.raises(InputError, match=r"did you mean 'mrr@10'"):
        ranking.compute_ranking_metrics(("mrr@100",), {"q": {"d": 1}}, {"q": [("d", 1.0)]})


def test_ranking_metrics_by_hand():
    run = ranking.make_run(
        ["q1"] * 3 + ["q2"] * 2, ["a", "b", "c", "a", "b"], np.array([3.0, 2.0, 1.0, 1.0, 2.0])
    )
    qrels = {
        "q1": {"b": 1},
        "q2": {"b": 2, "z": 1},
        "q3": {"a": 1},
    }  # q3 was never retrieved: it counts zero
    values = ranking.compute_ranking_metrics(("mrr@10", "ndcg@10"), qrels, run)
    assert values["mrr@10"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    first = 1 / np.log2(3)
    second = 2 / (2 + 1 / np.log2(3))
    assert values["ndcg@10"] == pytest.approx((first + second + 0) / 3)


def test_ranks_beyond_ten_do_not_count():
    documents = [f"d{i:02d}" for i in range(11)]
    run = ranking.make_run(["q"] * 11, documents, -np.arange(11.0))
    assert ranking.compute_ranking_metrics(("mrr@10",), {"q": {"d10": 1}}, run)["mrr@10"] == 0
    assert ranking.compute_ranking_metrics(("mrr@10",), {"q": {"d09": 1}}, run)[
        "mrr@10"
    ] == pytest.approx(0.1)


def test_ties_are_ordered_by_document_id_and_evaluators_agree(tmp_path):
    import ir_measures

    rng = np.random.default_rng(0)
    queries = [f"q{i // 20}" for i in range(400)]
    documents = [f"d{i % 20}" for i in range(400)]
    scores = rng.integers(0, 3, 400).astype(np.float32)  # many ties
    run = ranking.make_run(queries, documents, scores)
    for scored in run.values():
        values = [score for _, score in scored]
        assert all(a > b for a, b in itertools.pairwise(values))
    tied = [
        document for document, score in run["q0"] if scores[int(document[1:])] == scores[:20].max()
    ]
    assert tied == sorted(tied)
    qrels = {
        f"q{i}": {
            f"d{place}": grade
            for place, grade in zip(rng.choice(20, 2, replace=False), (1, 2), strict=True)
        }
        for i in range(20)
    }
    ranking.write_trec(run, tmp_path / "run.trec")
    written = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    measures = [ir_measures.RR @ 10, ir_measures.nDCG @ 10]
    fresh = ir_measures.calc_aggregate(measures, qrels, written)
    ours = ranking.compute_ranking_metrics(("mrr@10", "ndcg@10"), qrels, run)
    assert ours == {"mrr@10": fresh[measures[0]], "ndcg@10": fresh[measures[1]]}
    by_hand = np.mean(
        [
            next(
                (1 / rank for rank, (d, _) in enumerate(run[q][:10], 1) if qrels[q].get(d, 0) > 0),
                0,
            )
            for q in qrels
        ]
    )
    assert ours["mrr@10"] == pytest.approx(by_hand)


def test_a_written_score_restores_the_float32_exactly(tmp_path):
    scores = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    ranking.write_trec(
        ranking.make_run(["q"] * 50, [f"d{i}" for i in range(50)], scores), tmp_path / "run.trec"
    )
    read = {
        line.split()[2]: np.float32(line.split()[4])
        for line in (tmp_path / "run.trec").read_text().splitlines()
    }
    assert all(read[f"d{i}"] == scores[i] for i in range(50))


def test_a_document_twice_is_refused():
    with pytest.raises(InputError, match="appears twice"):
        ranking.make_run(["q", "q"], ["d", "d"], np.zeros(2))


def batches(ids, heads):
    shape = BatchShape(rows=1, row_length=1, segments=2)
    for start in range(0, len(ids), 2):
        batch = empty_batch(shape)
        batch.example_id[0], batch.weight[0] = (
            ids[start : start + 2],
            [i >= 0 for i in ids[start : start + 2]],
        )
        yield batch


def test_predictions_come_back_in_the_tables_order():
    regression = task("regression", ("spearman",), label_range=(0.0, 5.0))

    def forward(batch):
        return {"t": batch.example_id[..., None] / 10.0}, batch.example_id, batch.weight

    np.testing.assert_allclose(
        predict_split(regression, batches([2, 0, 1, -1], None), forward), [0, 0.5, 1.0]
    )
    with pytest.raises(AssertionError, match="exactly once"):
        predict_split(regression, batches([0, 0], None), forward)
    with pytest.raises(AssertionError, match="exactly once"):
        predict_split(regression, batches([0, 2], None), forward)
    with pytest.raises(InputError, match="no example to evaluate"):
        predict_split(regression, iter(()), forward)
    with pytest.raises(InputError, match="not finite"):
        predict_split(
            regression,
            batches([0, 1], None),
            lambda b: ({"t": np.full((1, 2, 1), np.nan)}, b.example_id, b.weight),
        )


def test_outputs_are_probabilities_or_units():
    def outputs(of_kind, scores):
        return of_kind.kind.postprocess(of_kind, np.array(scores, np.float32))

    probabilities = outputs(task("classification", ("accuracy",)), [[0.0, np.log(3)], [1000, 0.0]])
    np.testing.assert_allclose(probabilities, [[0.25, 0.75], [1, 0]], atol=1e-6)
    targets = outputs(task("regression", ("pearson",), label_range=(1.0, 5.0)), [[0.5]])
    np.testing.assert_allclose(targets, [3.0])
    np.testing.assert_allclose(outputs(task("ranking", ("mrr@10",)), [[0.5]]), [0.5])


def test_prediction_files(tmp_path):
    path = Predictions(
        task("classification", ("accuracy",)), "validation", np.array([[0.25, 0.75]]), table([1])
    ).write(tmp_path)
    assert json.loads(path.read_text()) == {
        "example": 0,
        "label": 1,
        "prediction": 1,
        "probabilities": [0.25, 0.75],
    }
    ranked = Predictions(
        task("ranking", ("mrr@10",)),
        "validation",
        np.array([0.5, 2.0]),
        table([0, 1], ["q", "q"], ["a", "b"]),
    )
    assert ranked.metrics() == {"mrr@10": 1.0}
    path = ranked.write(tmp_path)
    assert path.name == "t.validation.trec"
    assert path.read_text() == "q Q0 b 1 2 gemma_encoder\nq Q0 a 2 0.5 gemma_encoder\n"
    assert (
        path.with_suffix(".tsv").read_text() == "q\tb\t1\nq\ta\t2\n"
    )  # MS MARCO's own format, in the same order


def test_multirc_counts_answers_and_whole_questions():
    # Question p: both answers right. Question q: one of three wrong. Rows interleaved: only the table says what belongs together.
    queries = ["p", "q", "p", "q", "q"]
    labels, predicted = [1, 1, 0, 0, 1], np.array([1, 1, 0, 1, 1])
    values = metrics.compute_metrics(
        task("classification", ("f1a", "exact_match")), one_hot(predicted), table(labels, queries)
    )
    assert values["f1a"] == pytest.approx(
        2 * 3 / (2 * 3 + 1)
    )  # true positives 3, false positive 1, over all answers
    assert values["exact_match"] == 1 / 2


def test_gender_parity_asks_for_equal_answers_not_right_ones():
    queries, labels = ["0", "0", "1", "1", "2", "2"], [0, 0, 1, 1, 0, 0]
    predicted = np.array(
        [1, 1, 1, 0, 0, 0]
    )  # pair 0 wrong alike, pair 1 divided, pair 2 right alike
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
    # class 0: 1 of 1 found, 1 of 2 said right; class 1: 1 of 2 found, all said right; class 2: found whole
    three = Task("t", "classification", Template("{x}"), ("accuracy", "macro_f1"), ("a", "b", "c"))
    values = metrics.compute_metrics(three, np.eye(3)[[0, 0, 1, 2]], table([0, 1, 1, 2]))
    assert values == {"accuracy": 3 / 4, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_a_choice_is_the_highest_score_of_its_question():
    queries, labels = ["p", "q", "p", "q", "q"], [0, 1, 1, 0, 0]
    choice = task("choice", ("accuracy",))
    assert metrics.compute_metrics(
        choice, np.array([0.1, 5, 0.2, -1, 4]), table(labels, queries)
    ) == {"accuracy": 1.0}
    assert metrics.compute_metrics(
        choice, np.array([0.3, 5, 0.2, -1, 6]), table(labels, queries)
    ) == {"accuracy": 0.0}
    assert metrics.compute_metrics(choice, np.zeros(5), table(labels, queries)) == {
        "accuracy": 0.5
    }  # equal scores: the first option, wrong of p, right of q


@pytest.mark.parametrize(
    ("option", "answers", "f1", "em"),
    [
        ("the Bob Dylan", ["Bob Dylan!"], 1, 1),  # articles, case and punctuation do not count
        ("Bob", ["Bob Dylan"], 2 * 1 * 0.5 / 1.5, 0),  # precision 1, recall 1/2
        ("Bob Bob", ["Bob"], 2 * 0.5 * 1 / 1.5, 0),  # a word counts as often as it stands there
        ("Bob", ["Ann", "Bob"], 1, 1),  # the best of the right answers
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
    # Where -1 is a target like any other, it is no sign of a missing label.
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
def test_metrics_by_question_do_not_depend_on_the_order_of_examples(rows, random):
    """The table groups them; only equal scores make the order of options matter."""
    rows = [(query, right, score + place / 100) for place, (query, right, score) in enumerate(rows)]
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


def test_prediction_files_of_options_and_answers(tmp_path):
    infos = [{"idx": 3, "option": text, "answers": []} for text in ("Ann", "Bob")]
    found = Predictions(
        task("choice", ("accuracy",)),
        "test",
        np.array([0.5, 2.0]),
        table([-1, -1], ["3", "3"], ["0", "1"], infos),
    )
    assert found.metrics() == {}
    first, _ = map(json.loads, found.write(tmp_path).read_text().splitlines())
    assert first == {
        "example": 0,
        "idx": 3,
        "option": "Ann",
        "answers": [],
        "query": "3",
        "document": "0",
        "label": -1,
        "prediction": 0.5,
    }


def test_an_msmarco_run_is_the_trec_run_cut_off(tmp_path):
    run = ranking.make_run(["q"] * 4, ["b", "a", "d", "c"], np.array([1.0, 1.0, 3.0, 2.0]))
    ranking.write_msmarco(run, tmp_path / "run.tsv", depth=3)
    assert (
        tmp_path / "run.tsv"
    ).read_text() == "q\td\t1\nq\tc\t2\nq\ta\t3\n"  # a before b: equal scores


def test_a_metric_of_ones_own(monkeypatch):
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
        ("ranking", "worst", "none can be added to those of kind ranking, .*: mrr@10"),
    ):
        with pytest.raises(InputError, match=message):
            metrics.register_metric(kind, name, worst)
