"""Templates: fields of an example to one text, and the text to tokens of bounded length.

The rendered text is tokenized as a whole, so tokens may span the border between literal text and a
field. If it is too long, tokens are removed from the ends of the fields that the template lists in
`truncation`, in that order. The other fields, such as the query of a ranking, are shortened only if
they take more than a share of the row, `protected_share`, and then to no less than that share. So
no text is too long, unless the template's own words are.
"""

import dataclasses
import functools
import re
import string
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import Tokenizer

PROTECTED_SHARE = 0.5  # of a row, for the fields that are not truncated first


@dataclasses.dataclass(frozen=True, init=False)
class Template:
    """A text with named fields.

    Example: `Template("Query: {query} Document: {document}", truncation=("document",))`.

    Attributes:
        text: literal text with `{field}` in place of a field's value; `{{` and `}}` are literal
            braces.
        truncation: fields that are truncated first, in the order of truncation. By default all
            fields, the last one first.
        protected_share: share of `max_length` up to which the fields that are not listed in
            `truncation` are protected, all of them together. If they are longer, they are truncated
            once the listed fields have no more than the remaining share, the last field first.
    """

    text: str
    truncation: tuple[str, ...] = dataclasses.field(default=(), metadata={"former": "cut"})
    protected_share: float = PROTECTED_SHARE

    def __init__(
        self,
        text: str,
        truncation: Sequence[str] = (),
        protected_share: float = PROTECTED_SHARE,
        *,
        cut: Sequence[str] | None = None,  # the former name of `truncation`
    ):
        if cut is not None:
            warnings.warn("Template(cut=…) is now Template(truncation=…)", FutureWarning, 2)
            truncation = cut
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "truncation", tuple(truncation))
        object.__setattr__(self, "protected_share", protected_share)
        if not 0 < protected_share <= 1:
            raise InputError(
                f"template {self.text!r}: protected_share must be above 0 and at most 1, got "
                f"{protected_share}"
            )
        self._check_text()
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

    @property
    def protected(self) -> tuple[str, ...]:
        """Fields that are not listed in `truncation`, in order of appearance."""
        return tuple(field for field in self.fields if field not in self.truncation)

    @property
    def cut(self) -> tuple[str, ...]:
        """The former name of `truncation`."""
        return self.truncation

    def _check_text(self) -> None:
        """Raises InputError unless every replacement field is a plain name in braces."""
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(
                f"template {self.text!r} is malformed: {error}; write a field as {{name}} and a "
                "brace as {{ or }}"
            ) from None
        for _, field, form, conversion in parsed:
            if field is None:
                continue
            if not field.isidentifier() or form or conversion:
                raise InputError(
                    f"template {self.text!r}: a field is a plain name in braces, such as {{name}}; "
                    f"got {field!r}"
                )

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """(literal, field) pairs in order; the field is None after the last literal."""
        return tuple(
            (literal, field) for literal, field, _, _ in string.Formatter().parse(self.text)
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order of appearance."""
        return tuple(field for _, field in self.parts if field is not None)

    def render(
        self, values: Mapping[str, str], where: str = ""
    ) -> tuple[str, dict[str, tuple[int, int]]]:
        """Returns the text and the byte span of each field's value.

        Spans are (begin, end) in the text's UTF-8 encoding, the end exclusive.

        Raises:
            InputError: a field is missing, a value is not text, or all fields are blank.
        """
        pieces: list[str] = []
        spans: dict[str, tuple[int, int]] = {}
        size = 0
        for literal, field in self.parts:
            pieces.append(literal)
            size += len(literal.encode())
            if field is None:
                continue
            value = self._field_value(values, field, where)
            end = size + _num_bytes(value, field, where)
            spans[field] = (size, end)
            pieces.append(value)
            size = end
        if not any(values[field].strip() for field in self.fields):
            fields = ", ".join(map(repr, self.fields))
            raise _error(where, f"the text is empty: nothing but blanks in {fields}")
        return "".join(pieces), spans

    def _field_value(self, values: Mapping[str, str], field: str, where: str) -> str:
        value = values.get(field)
        if isinstance(value, str):
            return value
        if field in values:
            got = f"got {type(value).__name__}"
        else:
            got = f"got only {', '.join(map(repr, values)) or 'nothing'}"
        raise _error(where, f"the template {self.text!r} needs the field {field!r} as text; {got}")


def _num_bytes(value: str, field: str, where: str) -> int:
    try:
        return len(value.encode())
    except UnicodeEncodeError as error:
        raise _error(
            where,
            f"field {field!r} is not valid Unicode: {error.reason} at character {error.start}",
        ) from None


def _error(where: str, message: str) -> InputError:
    return InputError(f"{where}: {message}" if where else message)


class EncodedText(NamedTuple):
    """Tokens of one text, bos and eos included, and the number of tokens truncated."""

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
        tokenizer: encodes the texts.
        template: renders the fields and limits truncation; one for all examples, or one per
            example.
        examples: values by field name, one mapping per text.
        max_length: the limit, in tokens.
        where: names the examples in error messages; one string for all, or one per example.

    Raises:
        InputError: a field is missing or empty, or the template's own words are too long.
    """
    templates = [template] * len(examples) if isinstance(template, Template) else template
    locations = [where] * len(examples) if isinstance(where, str) else where
    rendered = [
        template.render(values, location)
        for template, values, location in zip(templates, examples, locations, strict=True)
    ]
    all_ids = tokenizer.encode([text for text, _ in rendered])
    encoded = []
    for ids, (text, spans), template, location in zip(
        all_ids, rendered, templates, locations, strict=True
    ):
        full_length = len(ids)
        if full_length + 2 > max_length:
            ids = _truncate(tokenizer, template, text, spans, max_length, location)
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0] = tokenizer.bos_id
        tokens[1:-1] = ids
        tokens[-1] = tokenizer.eos_id
        encoded.append(EncodedText(tokens, full_length - len(ids)))
    return encoded


def check_template_length(
    tokenizer: Tokenizer, template: Template, max_length: int, task: str
) -> None:
    """Raises InputError if the template's own words leave no room for a field."""
    shortest = dict.fromkeys(template.fields, "a")
    encode(tokenizer, template, [shortest], max_length, f"task {task!r}")


def _truncate(
    tokenizer: Tokenizer,
    template: Template,
    text: str,
    spans: Mapping[str, tuple[int, int]],
    max_length: int,
    where: str,
) -> list[int]:
    """Returns the ids of `text`, truncated to fit `max_length` with bos and eos.

    Tokens are removed from the ends of fields: first of those in `template.truncation`, in that
    order, as long as they leave room for the protected fields, then of the protected fields, the
    last one first. Only tokens that lie entirely inside a field are removed.
    """
    pieces = tokenizer.encode_with_spans(text)
    surplus = len(pieces) + 2 - max_length
    inside = {field: _inside(pieces, *spans[field]) for field in template.fields}
    protected_length = sum(len(inside[field]) for field in template.protected)
    above_share = max(protected_length - int(max_length * template.protected_share), 0)
    removed = np.zeros(len(pieces), bool)
    # The listed fields give way to protected fields within their share, but not above it.
    _remove(template.truncation, inside, pieces, surplus - above_share, removed)
    _remove(template.protected[::-1], inside, pieces, surplus, removed)
    if removed.sum() < surplus:
        raise _error(
            where,
            f"the template's own words alone exceed max_length={max_length} tokens; raise "
            "max_length or shorten the template",
        )
    return [piece[0] for piece, gone in zip(pieces, removed, strict=True) if not gone]


Piece = tuple[int, int, int]  # id, begin, end


def _inside(pieces: Sequence[Piece], first: int, last: int) -> list[int]:
    """Returns the indices of pieces that lie entirely inside a byte span."""
    return [i for i, (_, begin, end) in enumerate(pieces) if first <= begin < last and end <= last]


def _remove(
    fields: Sequence[str],
    inside: Mapping[str, Sequence[int]],
    pieces: Sequence[Piece],
    surplus: int,
    removed: np.ndarray,
) -> None:
    """Removes tokens from the ends of fields, in order, until `surplus` tokens are removed.

    Args:
        fields: the fields.
        inside: indices of the pieces inside each field.
        pieces: all pieces of the text.
        surplus: number of tokens to remove from the text.
        removed: [len(pieces)] bool, the tokens that are removed; modified.
    """
    for field in fields:
        indices = inside[field]
        remaining = surplus - int(removed.sum())
        if remaining <= 0:
            return
        start = max(len(indices) - remaining, 0)
        # An empty span precedes the last byte token of a character: remove whole characters only.
        while 0 < start < len(indices) and _is_empty(pieces[indices[start - 1]]):
            start -= 1
        removed[indices[start:]] = True


def _is_empty(piece: Piece) -> bool:
    _, begin, end = piece
    return begin == end


def identifier(column: str) -> str:
    """Returns a column's name as a valid field name of a template."""
    name = re.sub(r"\W", "_", column)
    return name if name.isidentifier() else f"_{name}"
