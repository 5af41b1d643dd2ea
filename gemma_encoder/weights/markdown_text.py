"""Markdown whose texts are shown as they are: names in training data may contain any characters.

Valid for CommonMark and GitHub's tables, in which every punctuation character may be escaped.
"""

import re
from collections.abc import Sequence
from typing import Any

from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.untrusted import printable

# Punctuation that may have a meaning within a line; an underscore has none between letters, a dot
# none outside of an address.
_SPECIAL = re.compile(r"[\\`*{}\[\]<>#|~&:@$^!]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)
_SURROGATES = re.compile(r"\\u(d[89ab]..)\\u(d[c-f]..)")


def literal(value: Any) -> str:
    """Returns a value as text on one line; nothing in it is a link, an image, HTML or a table."""
    return _SPECIAL.sub(r"\\\g<0>", printable(str(value), allowed="")).strip()


def code_span(value: Any) -> str:
    """Returns a value as code within a line."""
    text = printable(str(value), allowed="")
    if not text.strip():
        return ""
    fence = "`" * _fence_length(text, 1)
    needs_blank = text[:1] in ("`", " ") or text[-1:] in ("`", " ")
    return f"{fence} {text} {fence}" if needs_blank else f"{fence}{text}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Returns a block of code, with a fence that is longer than any in the text."""
    text = printable(text)
    fence = "`" * _fence_length(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence_length(text: str, least: int) -> int:
    """Returns the length of a row of backticks that the text does not contain."""
    return max([least - 1, *map(len, re.findall("`+", text))]) + 1


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table of literal texts."""
    lines = [" | ".join(map(literal, row)) for row in rows]
    lines = [" | ".join(map(literal, header)), " | ".join(["---"] * len(header)), *lines]
    return "\n".join(f"| {line} |" for line in lines)


def yaml_field(name: str, value: Any) -> str:
    """Returns a line of YAML whose value is written as JSON, which YAML contains.

    YAML has another escape than JSON for characters beyond 16 bits.
    """

    def escape(match: re.Match[str]) -> str:
        pair = bytes.fromhex(match[1] + match[2]).decode("utf-16-be")
        return f"\\U{ord(pair):08x}"

    return f"{name}: {_SURROGATES.sub(escape, to_json(value))}"
