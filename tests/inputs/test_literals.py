"""Literals of Python are parsed in bounded memory, or refused."""

import pytest

from gemma_encoder.inputs.literals import parse_literal


@pytest.mark.parametrize("value", [["a", 'b"', "c'"], [], ("a",), [1, 2.5, None], ["\\d"]])
def test_literals_are_parsed(value):
    assert parse_literal(repr(value)) == value


@pytest.mark.filterwarnings("error")
def test_an_unknown_escape_is_no_warning():
    assert parse_literal(r"['\d']") == [r"\d"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 90_000,
        "(" * 90_000,
        "-" * 90_000 + "1",
        "[" + "1+" * 40_000 + "1]",
        "[" + "9" * 5_000 + "]",
        "[9**9**9]",
        "['a' * 10**10]",
        "[__import__('os')]",
        "[x for x in (1,)]",
        "[1e400j, {[]: 1}]",
        "['a'",
        "[\0]",
        "[" + "1," * 100_000 + "]",
    ],
    ids=lambda text: text[:8],
)
def test_anything_else_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_literal(text)
