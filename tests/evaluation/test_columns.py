"""Columns of predictions: names that are taken, and values that are not finite."""

import numpy as np
import pandas
import pytest

from gemma_encoder import explain
from gemma_encoder.evaluation.columns import check_column_names, check_finite, output_columns
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from tests.evaluation.conftest import task

CLASSES = {"classes": ("a", "b", "c")}


@pytest.mark.parametrize("kind", kinds.names())
def test_columns_of_a_kind_are_those_of_its_predictions(kind):
    of_kind = task(kind, (), **(CLASSES if kinds.get(kind).has_classes else {}))
    outputs = of_kind.kind.postprocess(of_kind, np.ones((5, of_kind.num_outputs), np.float32))
    assert output_columns(of_kind).keys() == of_kind.kind.columns(of_kind, outputs).keys()
    for name in output_columns(of_kind):
        with pytest.raises(InputError, match=f"^column {name} has the name of the output's own "):
            check_column_names(of_kind, ["id", name], "records", "column {}".format)
    check_column_names(of_kind, ["id", "scores", "label"], "records", "column {}".format)


def test_flat_tables_have_a_column_for_each_class():
    of_kind = task("classification", (), **CLASSES)
    names = ["probability_b"]
    check_column_names(of_kind, names, "records", "column {}".format)
    with pytest.raises(InputError, match="the output's own column 'probability_b'"):
        check_column_names(of_kind, names, "table", "column {}".format)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_text_without_a_finite_score_is_named(value):
    scores = np.zeros((5, 3), np.float32)
    check_finite(scores, "scores", "text {}".format)
    scores[2, 1] = scores[4, 0] = scores[4, 1] = value
    with pytest.raises(InputError) as caught:
        check_finite(scores, "scores", "text {}".format)
    assert str(caught.value).startswith(
        "text 2: the model's scores are NaN or infinite, here and for 2 of 5 texts in all"
    )
    check_finite(np.zeros(0), "scores", "text {}".format)


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


def test_frames_keep_the_index_of_the_texts(predictor):
    texts = pandas.DataFrame(
        {"sentence": ["a .", "b .", "c ."], "id": [1, 2, 3]}, index=["x", "x", "z"]
    )
    texts.index.name = "key"
    frames = [
        predictor.predict(texts, "toy_sentiment", as_frame=True),
        predictor.predict(texts["sentence"], "toy_sentiment", as_frame=True),
        predictor.embed(texts["sentence"], as_frame=True),
        predictor.embed(texts, "toy_sentiment", as_frame=True),
    ]
    for frame in frames:
        pandas.testing.assert_index_equal(frame.index, texts.index)
    assert list(frames[0]["id"]) == [1, 2, 3]
    joined = texts.iloc[1:].join(frames[3].iloc[2:])
    assert joined.loc["z", "0"] == frames[3].loc["z", "0"]
    documents = pandas.Series(["d .", "e .", "f ."], index=[10, 11, 12])
    ranked = predictor.rank("q", documents, as_frame=True, top_k=2)
    assert list(documents.loc[ranked.index]) == list(ranked["document"])
    assert list(predictor.rank("q", list(documents), as_frame=True).index) == [0, 1, 2]


@pytest.mark.parametrize("column", ["prediction", "probability_positive"])
def test_a_frame_never_overwrites_a_column(predictor, monkeypatch, column):
    texts = pandas.DataFrame({"sentence": ["a ."], column: ["mine"]})
    assert predictor.predict(texts, "toy_sentiment").shape == (1, 2)
    monkeypatch.setattr(predictor, "_encoder", None)  # refused before the model runs
    with pytest.raises(InputError, match=f"column '{column}' of the texts has the name of the out"):
        predictor.predict(texts, "toy_sentiment", as_frame=True)


def test_texts_with_different_columns_make_a_frame(predictor):
    texts = [{"sentence": "a ."}, {"sentence": "b .", "id": 7}]
    frame = predictor.predict(texts, "toy_sentiment", as_frame=True)
    assert frame["id"].isna().tolist() == [True, False]


def test_a_damaged_model_is_refused(random_predictor):
    predictor = random_predictor()
    table = np.array(predictor.parameters["backbone"]["embedding"])
    pieces = predictor.spec.tokenizer.pieces(range(len(table)))
    table[pieces.index("▁wool")] = np.nan
    predictor.parameters["backbone"]["embedding"] = table
    texts = ["a fine film .", "he sold wool .", "wool .", "a dull one ."]
    assert np.isfinite(predictor.predict(texts[:1], "toy_sentiment")).all()
    calls = [
        lambda: predictor.predict(texts, "toy_sentiment", names=["f:1", "f:2", "f:3", "f:4"]),
        lambda: predictor.rank("a film", texts),
        lambda: predictor.embed(texts),
        lambda: predictor.similarity(texts),
        lambda: predictor.similarity(np.full((2, predictor.spec.encoder.pooled_dim), np.nan)),
        lambda: explain.attribute(predictor, texts[1], "toy_sentiment"),
    ]
    for call in calls:
        with pytest.raises(InputError, match="NaN or infinite") as caught:
            call()
        assert "\n" not in str(caught.value)
        if call is calls[0]:
            # Texts share rows, so those beside the damaged ones may be affected.
            assert str(caught.value).startswith("f:")
