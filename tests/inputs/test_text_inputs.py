"""Texts in memory: lists, frames and fields."""

import pandas
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.text_inputs import as_list, index_of


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
