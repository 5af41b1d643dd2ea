"""Texts of strangers in Markdown are shown as they are, whatever they contain."""

import hypothesis
import hypothesis.strategies as st
import pytest

from gemma_encoder.inputs.untrusted import printable
from gemma_encoder.weights import markdown_text

yaml = pytest.importorskip("yaml")
MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

NASTY = (
    *("[x](http://y)", "![x](y)", "<b>x</b>", "<script>alert(1)</script>", "a|b", "\\|", "\\\\|"),
    *("`", "``", "```\n# x", "~~~", "---", "\n---\nlicense: mit\n---\n", "# x", "> x", "- x", "|"),
    *("**x**", "_x_", "__x__", "a_b", "~~x~~", "&lt;", "&#42;", "<http://x>", "http://x.y", "1. x"),
    *("a@b.c", "\\", "\x1b[31m", "\u202e", "\ud800", "$x$", ":x:", "x: y", "\t", "😀", "ж", "' \""),
    *("![", "www.x.y", "]: x"),
)
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=3), min_size=1, max_size=5).map("".join)
settings = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


def rendered(markdown):
    """Returns the kinds of all tokens, and the texts of inline ones, of GitHub's Markdown."""
    tokens = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    )
    kinds = [token.type for token in tokens]
    inner = [child for token in tokens for child in token.children or ()]
    return kinds, {child.type for child in inner}, "".join(child.content for child in inner)


@settings
@hypothesis.given(texts)
def test_a_literal_text_is_only_text(value):
    kinds, inner, text = rendered(f"# A {markdown_text.literal(value)}.")
    assert kinds == ["heading_open", "inline", "heading_close"]
    assert inner <= {"text"}
    assert text == f"A {printable(value, allowed='').strip()}."


@settings
@hypothesis.given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_cells_of_a_table_are_only_text(rows):
    kinds, inner, _ = rendered(markdown_text.table(("a", "b"), rows))
    assert kinds.count("td_open") == 2 * len(rows) and kinds[-1] == "table_close"
    assert inner <= {"text"}


@settings
@hypothesis.given(texts)
def test_code_stays_within_its_fence(value):
    kinds, inner, text = rendered(f"- {markdown_text.code_span(value)} x")
    assert (
        inner - {"text"} == ({"code_inline"} if printable(value).strip(" ") else set())
        and kinds.count("inline") == 1
    )
    assert text.strip() == f"{printable(value, allowed='')} x".strip()
    tokens = MarkdownIt("commonmark").parse(f"{markdown_text.code_block(value, 'json')}\n\nend")
    assert [token.type for token in tokens] == [
        *("fence", "paragraph_open", "inline", "paragraph_close")
    ]


@settings
@hypothesis.given(st.lists(texts, max_size=3))
def test_yaml_holds_the_same_values(values):
    text = "\n".join([markdown_text.yaml_field("tags", values), markdown_text.yaml_field("b", 1)])
    assert "\n" not in text.replace("\nb: 1", "")
    assert yaml.safe_load(text) == {"tags": values, "b": 1}


@pytest.mark.parametrize("value", ["toy_sentiment", "0.247 to 0.753", "accuracy (%)", "a-b/c"])
def test_plain_names_are_not_escaped(value):
    assert markdown_text.literal(value) == value
