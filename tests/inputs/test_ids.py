"""Ids as words of run and qrels files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs.ids import decode_id, encode_id


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("q1", "q1"),
        ("żółć-日本語", "żółć-日本語"),
        ("100%", "100%"),
        ("50%2F50", "50%2F50"),
        ("query 0", "query%200"),
        ("My File 0.pdf", "My%20File%200.pdf"),
        ("a\tb\r\n", "a%09b%0D%0A"),
        ("100 %", "100%20%25"),
        ("a%20b", "a%2520b"),  # would be read as "a b"
        ("a%25b", "a%2525b"),
        ("a\u00a0b\u2003c\u3000", "a%C2%A0b%E2%80%83c%E3%80%80"),
        ("\ufeffa", "%EF%BB%BFa"),
        ("", "%00"),
        ("%00", "%2500"),
    ],
)
def test_only_ids_that_need_it_are_encoded(text, word):
    assert encode_id(text) == word
    assert decode_id(word) == text


@given(st.text(st.sampled_from("ab%2059C0EF \t\n\x1c\x85\u2028\u3000\ufeffé"), max_size=12))
def test_every_id_is_one_word_and_restored(text):
    word = encode_id(text)
    assert word.split() == [word] and word.splitlines() == [word]
    assert decode_id(word) == text
