"""How the fields of an example become one text, and the text becomes tokens of a bounded length.

The whole text is tokenised at once, so that it reads to the model as it would read to a person. When it is too long, tokens
are removed from the end of one field after another, in the order that the template states, and from nowhere else.
"""

import dataclasses
import functools
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with named fields, e.g. `Template("Query: {query} Document: {document}", truncation=("document",))`.

    Attributes:
        text: literal text with `{field}` where a field's value goes; `{{` and `}}` stand for braces.
        truncation: the fields that may be truncated, the first one first; a field that is not
            listed is never truncated. By default all fields, the last one first.
            By default every field, the last one first.
    """

    text: str
    truncation: tuple[str, ...] = dataclasses.field(default=(), metadata={"former": "cut"})

    def __post_init__(self):
        try:
            parsed = [
                part[1:] for part in string.Formatter().parse(self.text) if part[1] is not None
            ]
        except ValueError as error:
            raise InputError(
                f"template {self.text!r} is malformed: {error}; write a field as {{name}} and a brace as {{{{ or }}}}"
            ) from None
        for field, form, conversion in parsed:
            if not field.isidentifier() or form or conversion:
                raise InputError(
                    f"template {self.text!r}: a field is a plain name in braces, such as {{name}}; got {field!r}"
                )
        if not self.fields:
            raise InputError(f"template {self.text!r} names no field; write one as {{name}}")
        if len(set(self.fields)) < len(self.fields):
            raise InputError(f"template {self.text!r} names a field twice")
        surplus = set(self.truncation) - set(self.fields)
        if surplus:
            raise InputError(
                f"template {self.text!r} has no field {sorted(surplus)[0]!r} to truncate"
            )
        if not self.truncation:
            object.__setattr__(self, "truncation", tuple(reversed(self.fields)))

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """(literal, field) pairs in order; the field is None after the last literal."""
        return tuple(
            (literal, field) for literal, field, _, _ in string.Formatter().parse(self.text)
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in the order in which they appear."""
        return tuple(field for _, field in self.parts if field is not None)

    def render(
        self, values: Mapping[str, str], where: str = ""
    ) -> tuple[str, dict[str, tuple[int, int]]]:
        """The text, and where each field's value stands in it, as (first, past the last) byte of its UTF-8.

        Raises InputError when a field is missing, a value is no text, or every field is blank.
        """
        text, spans, size = "", {}, 0
        for literal, field in self.parts:
            text, size = text + literal, size + len(literal.encode())
            if field is None:
                continue
            value = values.get(field)
            if not isinstance(value, str):
                got = (
                    f"got {type(value).__name__}"
                    if field in values
                    else f"got only {', '.join(map(repr, values)) or 'nothing'}"
                )
                raise InputError(
                    f"{where}: the template {self.text!r} needs the field {field!r} as text; {got}".removeprefix(
                        ": "
                    )
                )
            try:
                spans[field] = (size, size + len(value.encode()))
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: field {field!r} is no valid Unicode: {error.reason} at character {error.start}".removeprefix(
                        ": "
                    )
                ) from None
            text, size = text + value, spans[field][1]
        if not any(values[field].strip() for field in self.fields):
            raise InputError(
                f"{where}: the text is empty: nothing but blanks in {', '.join(map(repr, self.fields))}".removeprefix(
                    ": "
                )
            )
        return text, spans


class EncodedText(NamedTuple):
    """Tokens of one text, bos and eos included, and how many tokens were truncated."""

    tokens: np.ndarray
    num_truncated: int


def encode(
    tokenizer: Tokenizer,
    template: Template | Sequence[Template],
    examples: Sequence[Mapping[str, str]],
    max_length: int,
    where: Sequence[str] | str = "",
) -> list[EncodedText]:
    """Tokenizes the fields of each example into at most `max_length` tokens, bos and eos included.

    Args:
        tokenizer: text to ids.
        template: makes a text of fields and says which may be truncated; one for all, or one per
            example.
        examples: one mapping of field names to values per text.
        max_length: the limit, in tokens.
        where: names the examples in messages: one string for all, or one per example.

    Raises:
        InputError: a field is missing or empty, or the text is too long even with every field that
            may be truncated gone.
    """
    templates = [template] * len(examples) if isinstance(template, Template) else template
    names = [where] * len(examples) if isinstance(where, str) else where
    rendered = [
        template.render(values, name)
        for template, values, name in zip(templates, examples, names, strict=True)
    ]
    all_ids = tokenizer.encode([text for text, _ in rendered])
    encoded = []
    for ids, (text, spans), template, name in zip(all_ids, rendered, templates, names, strict=True):
        whole = len(ids)
        if whole + 2 > max_length:
            surplus = whole + 2 - max_length
            ids = _truncate(tokenizer, template, text, spans, surplus, max_length, name)
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        encoded.append(EncodedText(tokens, whole - len(ids)))
    return encoded


def _truncate(tokenizer, template, text, spans, surplus, max_length, where) -> list[int]:
    """The ids of `text` with `surplus` of them removed from the ends of the cuttable fields, in their order."""
    pieces = tokenizer.encode_with_spans(text)
    removed = np.zeros(len(pieces), bool)
    for field in template.truncation:
        first, last = spans[field]
        inside = [
            i for i, (_, begin, end) in enumerate(pieces) if first <= begin < last and end <= last
        ]
        start = max(len(inside) - (surplus - int(removed.sum())), 0)
        while (
            0 < start < len(inside) and pieces[inside[start - 1]][1] == pieces[inside[start - 1]][2]
        ):
            start -= 1  # the byte tokens before belong to the character that is cut: never leave half a character
        removed[inside[start:]] = True
        if removed.sum() >= surplus:
            return [piece[0] for piece, gone in zip(pieces, removed, strict=True) if not gone]
    fixed = [field for field in template.fields if field not in template.truncation]
    what = (
        f"the fields that are never truncated ({', '.join(fixed)})"
        if fixed
        else "the template's own words"
    )
    raise InputError(
        f"{where}: {what} alone exceed max_length={max_length} tokens; raise max_length or shorten the text".removeprefix(
            ": "
        )
    )
