"""Templates: rendering, and truncation of the listed fields first, in the listed order."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.template import Template, encode

RANKING = Template("Query: {query} Document: {document}", truncation=("document",))

words = st.sampled_from(
    ["the", "movie", "was", "a", "xylophone", "12", "{x}", "né", "文", "€5", "👩", "end."]
)
values = st.lists(words, min_size=1, max_size=12).map(" ".join)
rarely_spaced = st.text(st.sampled_from("ab 文€👩é"), min_size=1, max_size=12).filter(
    str.strip
)  # mostly characters of several byte tokens
literals = st.sampled_from(["", " ", "文", "€ ", " Document: ", "; ", "é", " 文"])


@st.composite
def cases(draw):
    """(template, values): up to three fields, any literals around them, any truncation order."""
    fields = draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    truncation = tuple(draw(st.permutations(fields))[: draw(st.integers(1, len(fields)))])
    text = "".join(draw(literals) + f"{{{field}}}" for field in fields) + draw(literals)
    share = draw(st.sampled_from([0.25, 0.5, 1]))
    template = Template(text, truncation, share)
    return template, {field: draw(values | rarely_spaced) for field in fields}


def characters(tokenizer, text) -> list[tuple[list[int], int, int]]:
    """Returns (ids, begin, end) of each removable unit, with its byte span.

    A unit is a piece, or all byte tokens of a character.
    """
    groups = []
    ids = []
    for identity, first, last in tokenizer.encode_with_spans(text):
        ids.append(identity)
        if last > first:
            groups.append((ids, first, last))
            ids = []
    return groups


def expected_truncation(tokenizer, template, fields, max_length) -> list[int] | None:
    """Truncates by the definition; returns None if the text cannot be made to fit.

    Removes the last removable unit of the first listed field that has one, until the text would fit
    with the protected fields at their share; then likewise of protected fields, the last one first.
    """
    text = ""
    spans = {}
    for part in re.split(r"(\{\w+\})", template.text):
        if part.startswith("{"):
            field = part[1:-1]
            part = fields[field]
            spans[field] = (len(text.encode()), len((text + part).encode()))
        text += part
    groups = characters(tokenizer, text)

    def inside(field):
        first, last = spans[field]
        return [i for i, (_, begin, end) in enumerate(groups) if first <= begin and end <= last]

    def remove(fields, length):
        for field in fields:
            while sum(len(ids) for ids, _, _ in groups) > length and inside(field):
                del groups[inside(field)[-1]]

    protected = [field for field in template.fields if field not in template.truncation]
    protected_length = sum(len(groups[i][0]) for field in protected for i in inside(field))
    share = int(max_length * template.protected_share)
    remove(template.truncation, max_length - 2 + max(protected_length - share, 0))
    remove(reversed(protected), max_length - 2)
    remaining = [identity for ids, _, _ in groups for identity in ids]
    return remaining if len(remaining) <= max_length - 2 else None


@given(cases())
def test_a_text_that_fits_is_tokenized_as_a_whole(tokenizer, case):
    template, fields = case
    text, spans = template.render(fields)
    assert text == template.text.format(**fields)
    for field, (first, last) in spans.items():
        assert text.encode()[first:last].decode() == fields[field]
    [ids] = tokenizer.encode([text])
    [encoded] = encode(tokenizer, template, [fields], len(ids) + 2)
    assert encoded.tokens.dtype == np.int32
    assert encoded.tokens.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert encoded.num_truncated == 0


@given(cases(), st.integers(4, 40))
def test_truncation_follows_its_definition(tokenizer, case, max_length):
    template, fields = case
    [complete] = encode(tokenizer, template, [fields], 1000)
    assume(len(complete.tokens) > max_length)
    expected = expected_truncation(tokenizer, template, fields, max_length)
    if expected is None:
        with pytest.raises(InputError, match=f"max_length={max_length}"):
            encode(tokenizer, template, [fields], max_length)
        return
    [encoded] = encode(tokenizer, template, [fields], max_length)
    assert encoded.tokens.tolist() == [tokenizer.bos_id, *expected, tokenizer.eos_id]
    assert encoded.num_truncated == len(complete.tokens) - len(encoded.tokens)
    # Removing a character of four byte tokens may remove three more tokens than needed.
    assert max_length - 3 <= len(encoded.tokens) <= max_length


@given(values, values, st.integers(12, 40))
def test_truncation_removes_whole_characters_of_the_document(
    tokenizer, to_bytes, query, document, max_length
):
    fields = {"query": query, "document": document}
    [complete] = encode(tokenizer, RANKING, [fields], 1000)
    [of_query] = tokenizer.encode([query])
    assume(len(of_query) < max_length / 2)
    [encoded] = encode(tokenizer, RANKING, [fields], max_length)
    text = to_bytes(encoded.tokens[1:-1])
    text.decode()  # raises if a character is incomplete
    rendered = to_bytes(complete.tokens[1:-1])
    # Only the end of the document is missing, unless the words of the template leave no room.
    if len(tokenizer.encode([f"Query: {query} Document: "])[0]) + 2 <= max_length:
        assert text.startswith(f"Query: {query} Document:".encode())
        assert rendered.startswith(text)


@given(values.filter(lambda text: text.isascii() and "{" not in text), st.integers(3, 30))
def test_truncated_ascii_texts_have_exactly_max_length_tokens(tokenizer, text, max_length):
    template = Template("{text}")
    [complete] = encode(tokenizer, template, [{"text": text}], 1000)
    [encoded] = encode(tokenizer, template, [{"text": text}], max_length)
    assert len(encoded.tokens) == min(len(complete.tokens), max_length)
    np.testing.assert_array_equal(encoded.tokens[:-1], complete.tokens[: len(encoded.tokens) - 1])
    assert encoded.tokens[-1] == tokenizer.eos_id


def test_fields_are_truncated_one_after_another(tokenizer, to_bytes):
    template = Template("A: {a} B: {b} C: {c}", truncation=("b", "a"), protected_share=1)
    fields = {"a": "one two three four", "b": "five six seven eight", "c": "nine ten eleven twelve"}
    [complete] = encode(tokenizer, template, [fields], 1000)
    texts = []
    for max_length in range(len(complete.tokens), 0, -1):
        [encoded] = encode(tokenizer, template, [fields], max_length)
        assert len(encoded.tokens) == max_length
        text = to_bytes(encoded.tokens[1:-1]).decode()
        if not text.endswith(fields["c"]):
            break
        texts.append(text)
    # The protected field is truncated once nothing but border tokens is left of the listed ones.
    assert not any(word in text for word in ("two", "six"))
    assert " nine ten" in text
    a_complete = ["A: one two three four B:" in text for text in texts]
    # `a` is complete until `b` is used up; then it is truncated and never complete again.
    assert a_complete == sorted(a_complete, reverse=True)
    assert a_complete[0]
    assert not a_complete[-1]
    assert not any(
        word in text
        for text, has_all_of_a in zip(texts, a_complete, strict=True)
        if not has_all_of_a
        for word in ("six", "seven", "eight")
    )
    assert "four" not in texts[-1]


def test_by_default_fields_are_truncated_from_last_to_first():
    assert Template("{a} {b} {c}").truncation == ("c", "b", "a")
    assert Template("{a} {b} {c}", truncation=("a",)).truncation == ("a",)


def test_a_character_of_several_byte_tokens_is_removed_whole(tokenizer, to_bytes):
    template = Template("{a}!")
    fields = {"a": "文文文"}
    pieces = tokenizer.encode_with_spans(fields["a"])
    assert len(pieces) == 9, "the test needs a character that is encoded as three byte tokens"
    for max_length, count in [(12, 3), (11, 2), (10, 2), (9, 2), (8, 1), (5, 0)]:
        [encoded] = encode(tokenizer, template, [fields], max_length)
        assert to_bytes(encoded.tokens[1:-1]).decode() == "文" * count + "!"
        assert encoded.num_truncated == 9 - 3 * count


@pytest.mark.parametrize("text", ["{a}文 {b}", "{a}文{b}", "{a}{b}", "文{a}文{b}文"])
def test_byte_tokens_just_after_a_field_are_not_removed(tokenizer, to_bytes, text):
    fields = {"a": "good good good", "b": "文 bad"}
    template = Template(text, truncation=("a",))
    [complete] = encode(tokenizer, template, [fields], 1000)
    [encoded] = encode(tokenizer, template, [fields], len(complete.tokens) - 1)
    decoded = to_bytes(encoded.tokens[1:-1]).decode()
    before, after = text.split("{a}")
    assert decoded.startswith(before + "good")
    assert decoded.endswith(after.format(b=fields["b"]))


def test_braces_are_doubled(tokenizer):
    template = Template("{{{a}}} {{b}}")
    assert template.fields == ("a",)
    assert template.render({"a": "x"})[0] == "{x} {b}"
    # A value is never read as a template.
    assert Template("{a}").render({"a": "{b} {} }{"})[0] == "{b} {} }{"


def test_examples_of_a_batch_are_encoded_independently(tokenizer):
    examples = [{"query": "a query", "document": "a document " * n} for n in (1, 30, 2)]
    together = encode(tokenizer, RANKING, examples, 16)
    for encoded, example in zip(together, examples, strict=True):
        [alone] = encode(tokenizer, RANKING, [example], 16)
        np.testing.assert_array_equal(encoded.tokens, alone.tokens)
        assert encoded.num_truncated == alone.num_truncated
    assert encode(tokenizer, RANKING, [], 16) == []


def test_extra_fields_are_ignored():
    assert Template("{a}").render({"a": "x", "b": 3})[0] == "x"


def test_one_field_may_be_blank():
    assert Template("{title}. {body}").render({"title": "", "body": "x"})[0] == ". x"


def test_a_missing_field_is_refused():
    with pytest.raises(
        InputError,
        match=r"train record 3: the template .* needs the field 'document' as text; "
        "got only 'query', 'doc'",
    ):
        RANKING.render({"query": "a", "doc": "b"}, "train record 3")


@pytest.mark.parametrize(
    ("value", "kind"), [(b"bytes", "bytes"), (None, "NoneType"), (3.0, "float"), (["a"], "list")]
)
def test_a_value_that_is_not_text_is_refused(value, kind):
    with pytest.raises(
        InputError,
        match=f"record 1: the template .* needs the field 'document' as text; got {kind}",
    ):
        RANKING.render({"query": "a", "document": value}, "record 1")


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u3000"])
def test_a_text_of_blanks_is_refused(tokenizer, blank):
    with pytest.raises(
        InputError, match="record 9: the text is empty: nothing but blanks in 'query', 'document'"
    ):
        encode(
            tokenizer,
            RANKING,
            [{"query": "a", "document": "b"}, {"query": blank, "document": blank}],
            16,
            ["record 8", "record 9"],
        )


def test_a_message_without_location_starts_with_the_problem():
    with pytest.raises(InputError, match=r"^the text is empty"):
        Template("{a}").render({"a": " "})
    with pytest.raises(InputError, match=r"^the template"):
        Template("{a}").render({})


def test_a_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(InputError, match="record 2: "):
        encode(tokenizer, Template("{a}"), [{"a": "half a pair \ud83d"}], 16, "record 2")


@pytest.mark.parametrize(
    ("share", "query", "document", "expected"),
    [
        (0.5, 100, 100, (10, 4)),  # the query keeps its share, the document what is left
        (0.5, 100, 1, (13, 1)),  # a short document leaves more to the query
        (0.5, 8, 100, (8, 6)),  # a query within its share is complete
        (0.25, 100, 100, (5, 9)),
        (1.0, 100, 100, (14, 0)),
        (1.0, 12, 100, (12, 2)),
    ],
)
def test_a_query_is_cut_to_its_share(tokenizer, share, query, document, expected):
    """In a row of 20 tokens, of which bos, eos and the template's own words take 6."""
    template = Template("q:{query} d:{document}", ("document",), share)
    fields = {"query": " x" * query, "document": " y" * document}
    [encoded] = encode(tokenizer, template, [fields], 20)
    text = tokenizer.pieces(encoded.tokens)
    assert len(encoded.tokens) == 20
    assert encoded.num_truncated == query + document - sum(expected)
    assert (sum("x" in piece for piece in text), sum("y" in piece for piece in text)) == expected


def test_several_protected_fields_share_the_row(tokenizer, to_bytes):
    template = Template("{a};{b};{c}", truncation=("c",))
    fields = {name: f" {name}" * 50 for name in "abc"}
    [encoded] = encode(tokenizer, template, [fields], 60)
    text = to_bytes(encoded.tokens[1:-1]).decode()
    assert len(encoded.tokens) == 60
    assert text.count("a") + text.count("b") == 30 and text.count("b") == 0
    fields["a"] = " a"
    [encoded] = encode(tokenizer, template, [fields], 60)
    text = to_bytes(encoded.tokens[1:-1]).decode()
    assert (text.count("a"), text.count("b")) == (1, 29)


@pytest.mark.parametrize("share", [0, -0.5, 1.1, float("nan")])
def test_a_share_outside_the_row_is_refused(share):
    with pytest.raises(InputError, match="protected_share must be above 0 and at most 1"):
        Template("{a}", protected_share=share)


def test_a_limit_below_the_templates_own_words_is_refused(tokenizer):
    with pytest.raises(InputError, match="the template's own words alone exceed max_length=4"):
        encode(tokenizer, Template("Sentence number one: {a}"), [{"a": "hello"}], 4)


def test_a_template_without_fields_is_refused():
    for text in ("", "no field", "{{a}}"):
        with pytest.raises(InputError, match="names no field"):
            Template(text)


def test_truncating_an_unknown_field_is_refused():
    with pytest.raises(InputError, match="has no field 'documnt' to truncate"):
        Template("{query} {document}", truncation=("documnt",))


@pytest.mark.parametrize("text", ["{a", "a}", "{a} {", "{}", "{a!r}", "{a:>10}", "{a} {a}"])
def test_a_malformed_template_is_refused(text):
    with pytest.raises(InputError, match=re.escape(f"template {text!r}")):
        Template(text)


def test_the_former_name_of_truncation_is_accepted():
    with pytest.warns(FutureWarning, match="Template\\(truncation=…\\)"):
        template = Template("{a} {b}", cut=("a",))
    assert template == Template("{a} {b}", truncation=("a",))
    assert template.cut == template.truncation == ("a",)
    expected = {"text": "{a} {b}", "truncation": ("a",), "protected_share": 0.5}
    assert dataclasses.asdict(template) == expected
    assert dataclasses.replace(template, truncation=("b",)).truncation == ("b",)
