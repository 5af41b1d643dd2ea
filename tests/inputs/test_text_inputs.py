"""Texts in memory: lists, frames and fields."""

import pandas
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.text_inputs import as_list, column_of, index_of, with_field_names


def test_frames_are_lists_of_rows():
    frame = pandas.DataFrame({"a": ["x", "y"], "b": ["z", "w"]}, index=[7, 3])
    assert as_list(frame, "texts") == [{"a": "x", "b": "z"}, {"a": "y", "b": "w"}]
    assert as_list(frame["a"], "texts") == ["x", "y"]
    assert list(index_of(frame)) == list(index_of(frame["a"])) == [7, 3]
    for texts in (["x"], ("x",), frame["a"].to_numpy(), iter("x")):
        assert index_of(texts) is None


def test_a_frame_with_a_repeated_column_is_refused():
    frame = pandas.DataFrame([["x", "y"]], columns=["a", "a"])
    with pytest.raises(InputError, match="texts has duplicate column names: a, a"):
        as_list(frame, "texts")


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        (("my text", "note"), "my text"),
        (("my_text", "my text"), "my_text"),
        (("my text", "my-text"), "my_text"),  # ambiguous
        (("note", 3), "my_text"),
    ],
)
def test_the_column_of_a_field(columns, column):
    assert column_of("my_text", columns) == column


def test_values_by_column_get_the_names_of_fields():
    task = Task("t", "regression", Template("{my_text} {b}"))
    assert with_field_names(task, {"my text": "x", "b": "y"}) == {
        "my text": "x",
        "my_text": "x",
        "b": "y",
    }
    values = {"my_text": "x", "b": "y"}
    assert with_field_names(task, values) is values
    assert with_field_names(task, {"c": "x"}) == {"c": "x"}
