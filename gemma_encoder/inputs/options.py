"""Typed options: frozen dataclasses with one help line per field, read from nested mappings.

An options class declares `rows: int = option(16, "rows of a global batch")`. The declaration gives
the default, the checks of names and types in a mapping, and the help text.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.json_text import from_json, to_json

Options = TypeVar("Options")

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    types.NoneType: "None",
}


class FieldHelp(NamedTuple):
    """Help entry of a field; `name` is its path, such as "batch.rows"."""

    name: str
    type: str
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name} ({self.type}, {self.default!r}): {self.help}"


def option(default: Any, text: str, **metadata: Any) -> Any:
    """Declares a dataclass field with a help line; a mapping as default is copied per object.

    Args:
        default: default value of the field.
        text: one line, shown by `--help`.
        **metadata: further metadata of the field, e.g. `former`, its former name.
    """
    metadata = {"help": text, **metadata}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_at_least(
    group: str, options: Any, fields: Iterable[str], least: float, below: float = math.inf
) -> None:
    """Raises InputError unless numeric fields are in [least, below), which excludes NaN.

    Args:
        group: path of the options in the config, e.g. "batch"; "" for the outermost.
        options: the options.
        fields: names of the fields.
        least: smallest value allowed.
        below: the values must be smaller.
    """
    for field in fields:
        value = getattr(options, field)
        if not least <= value < below:
            upper = "" if below == math.inf else f" and below {below}"
            raise InputError(f"{_join(group, field)} must be at least {least}{upper}, got {value}")


def check_finite_numbers(values: Mapping[str, Any], name: str = "") -> None:
    """Raises InputError for a NaN or infinity in a nested mapping, which JSON cannot store."""
    for key, value in values.items():
        path = _join(name, key)
        if isinstance(value, Mapping):
            check_finite_numbers(value, path)
        elif isinstance(value, list | tuple):
            check_finite_numbers({f"[{index}]": item for index, item in enumerate(value)}, path)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path} must be a finite number, got {value}")


def from_mapping(cls: type[Options], values: Mapping[str, Any], name: str = "") -> Options:
    """Builds options from a nested mapping; missing fields take their defaults.

    Args:
        cls: a dataclass.
        values: values by field; lists are converted to tuples, integers to floats.
        name: path of the options themselves, for error messages; "" for the outermost.

    Raises:
        InputError: a field is unknown, a value has the wrong type, or the class rejects a value.
    """
    return cls(**field_values(cls, values, name))


def former_names(cls: type) -> dict[str, str]:
    """Returns the current name of each renamed field by its former name (metadata `former`)."""
    return {
        field.metadata["former"]: field.name
        for field in dataclasses.fields(cls)
        if "former" in field.metadata
    }


def current_path(cls: type, path: str) -> str:
    """Returns a field's path, such as "own.truncation", with former names replaced."""
    first, dot, remainder = path.partition(".")
    first = former_names(cls).get(first, first)
    annotation = _annotations(cls).get(first)
    if remainder and dataclasses.is_dataclass(annotation):
        remainder = current_path(annotation, remainder)
    return f"{first}{dot}{remainder}"


def with_current_names(
    cls: type,
    values: Mapping[str, Any],
    warn: Callable[[str, str], None] = lambda former, current: None,
    name: str = "",
) -> dict[str, Any]:
    """Replaces former field names in a nested mapping of options, e.g. of an older checkpoint.

    A former name takes precedence over the current one with its default value, as in a config that
    starts from all defaults.

    Args:
        cls: the dataclass of the options.
        values: values by field.
        warn: called with the former and the current path of each renamed field.
        name: path of the options themselves; "" for the outermost.

    Raises:
        InputError: both names of a field are given, with different values.
    """
    annotations = _annotations(cls)
    former = former_names(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    result = {}
    for key, value in sorted(values.items(), key=lambda item: item[0] in former):
        current = former.get(key, key)
        if current != key:
            warn(_join(name, key), _join(name, current))
            if current in result and result[current] not in (defaults[current], value):
                raise InputError(
                    f"config field {_join(name, current)} is also given by its former name, "
                    f"{_join(name, key)}, with another value; remove the latter"
                )
        if dataclasses.is_dataclass(annotations.get(current)) and isinstance(value, Mapping):
            value = with_current_names(annotations[current], value, warn, _join(name, current))
        result[current] = value
    return result


def field_values(cls: type, values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Returns the given fields, each converted to its type; raises as `from_mapping` does."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    annotations = _annotations(cls)
    result = {}
    for key, value in values.items():
        path = _join(name, key)
        if key not in fields:
            raise unknown("config field", path, [_join(name, field) for field in fields])
        result[key] = convert(annotations[key], value, path)
        if fields[key].default_factory is not dataclasses.MISSING:
            result[key] = {**fields[key].default_factory(), **result[key]}
    return result


def check_type(cls: type, field: str, value: Any) -> None:
    """Raises InputError if a value does not have the type of a dataclass's field.

    Fields of types that JSON does not have, such as a `Kind`, are left to their class.
    """
    annotation = _annotations(cls)[field]
    is_json = annotation in NAMES or dataclasses.is_dataclass(annotation)
    if is_json or not inspect.isclass(annotation):
        convert(annotation, value, field)


def check_path(cls: type, path: str, name: str = "") -> None:
    """Raises InputError if a dataclass has no field at a path such as "batch.rows".

    Entries of a mapping may have any name. `name` is the path of the dataclass itself.
    """
    first, _, remainder = path.partition(".")
    field = _join(name, first)
    annotations = _annotations(cls)
    if first not in annotations:
        raise unknown("config field", field, [_join(name, valid) for valid in annotations])
    annotation = annotations[first]
    if remainder and dataclasses.is_dataclass(annotation):
        check_path(annotation, remainder, field)
    elif remainder and typing.get_origin(annotation) is not Mapping:
        raise InputError(
            f"config field {field} is {_description(annotation)}; it has no {remainder!r}"
        )


def convert(annotation: Any, value: Any, name: str) -> Any:
    """Converts a value to its annotated type, or raises InputError; `name` is the field's path."""
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
            return tuple(
                convert(item_type, item, f"{name}[{i}]")
                for i, (item_type, item) in enumerate(pairs)
            )
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    plain = kind in (str, bool, types.NoneType) or dataclasses.is_dataclass(kind)
    if kind is Any or (plain and isinstance(value, kind)):
        return value
    raise InputError(f"{name} must be {_description(annotation)}, got {value!r}")


def to_mapping(options: Any) -> dict[str, Any]:
    """Returns options as a JSON-ready nested dict; `from_mapping` is its inverse."""
    return from_json(to_json(dataclasses.asdict(options)))


def field_help(options: Any, name: str = "") -> Iterator[FieldHelp]:
    """Yields the help of every field, nested options included, in order of declaration.

    Args:
        options: an instance; its values are shown as the defaults.
        name: path of the options themselves; "" for the outermost.
    """
    annotations = _annotations(type(options))
    for field in dataclasses.fields(options):
        path = _join(name, field.name)
        value = getattr(options, field.name)
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
    raise InputError(f"{name} must be {_description(annotation)}, got {value!r}")


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else str(field)


def _description(annotation: Any) -> str:
    """Describes an annotation for a message, e.g. "a list of 2 values, each a whole number"."""
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(_description, arguments))
    if kind is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}values, each {_description(arguments[0])}"
    return NAMES.get(kind, "a mapping from field to value")


def _type_name(annotation: Any) -> str:
    if typing.get_args(annotation):
        return re.sub(r"\w+\.(?=\w)", "", str(annotation))
    return annotation.__name__
