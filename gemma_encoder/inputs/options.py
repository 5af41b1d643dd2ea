"""Typed options: frozen dataclasses with a line of help on each field, read from nested mappings.

An options class declares `rows: int = option(16, "rows of a global batch")`. From the declaration
come its defaults, the check of a mapping's names and types, and the lines of a program's help.
"""

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

from gemma_encoder.inputs.descriptions import former_names
from gemma_encoder.inputs.errors import InputError, unknown

Options = TypeVar("Options")

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    types.NoneType: "None",
}


class FieldHelp(NamedTuple):
    """What a program's help says of a field; `name` is its path, such as "batch.rows"."""

    name: str
    type: str
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name} ({self.type}, {self.default!r}): {self.help}"


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with its default and its line of help; a mapping is copied for each object.

    Args:
        default: value of the field where none is given.
        text: one line for a reader of `--help`.
        **metadata: further facts about the field, e.g. `former`, the name that it had before.
    """
    metadata = {"help": text, **metadata}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(cls: type[Options], values: Mapping[str, Any], name: str = "") -> Options:
    """Builds options from a nested mapping; fields that are left out have their defaults.

    Args:
        cls: a dataclass.
        values: by field; lists are taken for tuples, whole numbers for floats.
        name: path of the options themselves, for messages; "" for the outermost.

    Raises:
        InputError: an unknown field, a value of another type, or whatever the class itself refuses.
    """
    return cls(**field_values(cls, values, name))


def current_path(cls: type, path: str) -> str:
    """The path of a field, such as "own.truncation", where `path` may hold former names."""
    first, dot, rest = path.partition(".")
    first = former_names(cls).get(first, first)
    annotation = _annotations(cls).get(first)
    if rest and dataclasses.is_dataclass(annotation):
        rest = current_path(annotation, rest)
    return f"{first}{dot}{rest}"


def with_current_names(
    cls: type,
    values: Mapping[str, Any],
    warn: Callable[[str, str], None] = lambda former, current: None,
    name: str = "",
) -> dict[str, Any]:
    """A nested mapping of options, such as an earlier version stored, with today's field names.

    Args:
        cls: the dataclass of the options.
        values: by field.
        warn: called with the former and the current path of each field that was renamed.
        name: path of the options themselves; "" for the outermost.
    """
    annotations = _annotations(cls)
    result = {}
    for key, value in values.items():
        current = former_names(cls).get(key, key)
        if current != key:
            warn(_join(name, key), _join(name, current))
        if dataclasses.is_dataclass(annotations.get(current)) and isinstance(value, Mapping):
            value = with_current_names(annotations[current], value, warn, _join(name, current))
        result[current] = value
    return result


def field_values(cls: type, values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """The given fields of a dataclass, each converted to its type; errors as in `from_mapping`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    annotations, result = _annotations(cls), {}
    for key, value in values.items():
        path = _join(name, key)
        if key not in fields:
            raise unknown("config field", path, [_join(name, field) for field in fields])
        result[key] = convert(annotations[key], value, path)
        if fields[key].default_factory is not dataclasses.MISSING:
            result[key] = {**fields[key].default_factory(), **result[key]}
    return result


def check_path(cls: type, path: str, name: str = "") -> None:
    """Raises InputError where a dataclass has no field at a path such as "batch.rows".

    Entries of a mapping may have any name. `name` is the path of the dataclass itself.
    """
    first, _, rest = path.partition(".")
    annotations, field = _annotations(cls), _join(name, first)
    if first not in annotations:
        raise unknown("config field", field, [_join(name, each) for each in annotations])
    annotation = annotations[first]
    if rest and dataclasses.is_dataclass(annotation):
        check_path(annotation, rest, field)
    elif rest and typing.get_origin(annotation) is not Mapping:
        raise InputError(f"config field {field} is {_words(annotation)}; it has no {rest!r}")


def convert(annotation: Any, value: Any, name: str) -> Any:
    """A value as its annotation says, or InputError; `name` is the field's path."""
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind in (types.UnionType, typing.Union):
        return _first_fit(annotation, value, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return from_mapping(kind, value, name)
    if kind is Mapping and isinstance(value, Mapping):
        return {key: convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is tuple and isinstance(value, list | tuple):
        repeated = arguments[-1] is Ellipsis
        if repeated or len(value) == len(arguments):
            annotations = arguments[:1] * len(value) if repeated else arguments
            pairs = zip(annotations, value, strict=True)
            return tuple(convert(one, item, f"{name}[{i}]") for i, (one, item) in enumerate(pairs))
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    plain = kind in (str, bool, types.NoneType) or dataclasses.is_dataclass(kind)
    if kind is Any or (plain and isinstance(value, kind)):
        return value
    raise InputError(f"{name} must be {_words(annotation)}, got {value!r}")


def to_mapping(options: Any) -> dict[str, Any]:
    """The JSON-ready nested dict of options; `from_mapping` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def field_help(options: Any, name: str = "") -> Iterator[FieldHelp]:
    """The help of every field, nested options included, in the order of declaration.

    Args:
        options: an object whose values are the defaults to show.
        name: path of the options themselves; "" for the outermost.
    """
    annotations = _annotations(type(options))
    for field in dataclasses.fields(options):
        path, value = _join(name, field.name), getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from field_help(value, path)
        else:
            text = field.metadata.get("help", "")
            yield FieldHelp(path, _type_name(annotations[field.name]), value, text)


def _first_fit(annotation: Any, value: Any, name: str) -> Any:
    for alternative in typing.get_args(annotation):
        try:
            return convert(alternative, value, name)
        except InputError:
            continue
    raise InputError(f"{name} must be {_words(annotation)}, got {value!r}")


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else str(field)


def _words(annotation: Any) -> str:
    """An annotation as a message has it, e.g. "2 values, each a whole number"."""
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(_words, arguments))
    if kind is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}values, each {_words(arguments[0])}"
    return NAMES.get(kind, "a mapping from field to value")


def _type_name(annotation: Any) -> str:
    if typing.get_args(annotation):
        return re.sub(r"\w+\.(?=\w)", "", str(annotation))
    return annotation.__name__
