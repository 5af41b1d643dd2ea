"""Numbers of any size are readable."""

import pytest

from gemma_encoder.inputs.number_text import format_label, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (8.4521e-6, "8.45e-06"),
        (-4e-5, "-4e-05"),
        (-0.25, "-0.250"),
        (1234.5, "1234.500"),
        (1.7e9 + 39.4, "1700000039"),
    ],
)
def test_small_and_large_numbers_are_not_hidden(value, text):
    assert format_number(value) == text


def test_signs_are_shown_on_request():
    assert format_number(0.5, "+") == "+0.500" and format_number(3e-6, "+") == "+3e-06"


def test_labels_are_shown_as_they_were_written():
    assert [format_label(value) for value in (4.0, 0.25, 1.7e9 + 39)] == ["4", "0.25", "1700000039"]
