"""Predictions: outputs by example id, and the files of a split."""

import json

import numpy as np
import pytest

from gemma_encoder.evaluation.predictions import Predictions, score_split
from gemma_encoder.inputs.batch import BatchShape, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from tests.evaluation.conftest import table, task


def predict_split(task, batches, forward):
    """Returns the outputs of every example by example id."""
    return task.kind.postprocess(task, score_split(task, batches, forward))


def batches(ids):
    shape = BatchShape(rows=1, row_length=1, segments=2)
    for start in range(0, len(ids), 2):
        batch = empty_batch(shape)
        batch.example_id[0] = ids[start : start + 2]
        batch.weight[0] = [i >= 0 for i in ids[start : start + 2]]
        yield batch


def test_predictions_are_in_table_order():
    regression = task("regression", ("spearman",), label_range=(0.0, 5.0))

    def forward(batch):
        return {"t": batch.example_id[..., None] / 10.0}, batch.example_id, batch.weight

    np.testing.assert_allclose(
        predict_split(regression, batches([2, 0, 1, -1]), forward), [0, 0.5, 1.0]
    )
    with pytest.raises(AssertionError, match="exactly once"):
        predict_split(regression, batches([0, 0]), forward)
    with pytest.raises(AssertionError, match="exactly once"):
        predict_split(regression, batches([0, 2]), forward)
    with pytest.raises(InputError, match="no example to evaluate"):
        predict_split(regression, iter(()), forward)
    with pytest.raises(InputError, match="NaN or infinite"):
        predict_split(
            regression,
            batches([0, 1]),
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
    # The same order in MS MARCO's own format.
    assert path.with_suffix(".tsv").read_text() == "q\tb\t1\nq\ta\t2\n"


def test_prediction_files_of_options_and_answers(tmp_path):
    infos = [{"idx": 3, "option": text, "answers": []} for text in ("Ann", "Bob")]
    predictions = Predictions(
        task("choice", ("accuracy",)),
        "test",
        np.array([0.5, 2.0]),
        table([-1, -1], ["3", "3"], ["0", "1"], infos),
    )
    assert predictions.metrics() == {}
    first, _ = map(json.loads, predictions.write(tmp_path).read_text().splitlines())
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


def test_the_first_stage_keeps_its_order_beyond_float32():
    """Counting on over the queries, float32 would give equal scores from 2**24 pairs on."""
    order = Predictions(
        task("ranking", ("mrr@10",)),
        "validation",
        np.zeros(4),
        ExampleTable([1, 0, 1, 0], ["q", "q", "p", "p"], ["z", "a", "y", "b"], [{}] * 4),
        first_stage=True,
    ).first_stage_run()
    assert order == {"q": [("z", 0.0), ("a", -1.0)], "p": [("y", 0.0), ("b", -1.0)]}
