"""JSON descriptions of dataclasses: read back, with fields of a newer version refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma_encoder.inputs.errors import InputError

Described = TypeVar("Described")


def tupled(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(tupled(item) for item in value)
    return value


def check_mapping(values: Any, what: str, *needed: str) -> None:
    """Raises InputError unless a description is a mapping with these fields."""
    if not isinstance(values, Mapping):
        raise InputError(f"the description of {what} is {type(values).__name__}; it is damaged")
    for name in needed:
        if name not in values:
            raise InputError(f"the description of {what} lacks the field {name!r}; it is damaged")


def former_names(cls: type) -> dict[str, str]:
    """The fields of a dataclass that had another name, by that name: the metadata `former`."""
    return {
        field.metadata["former"]: field.name
        for field in dataclasses.fields(cls)
        if "former" in field.metadata
    }


def from_fields(cls: type[Described], values: Mapping[str, Any], what: str) -> Described:
    """The dataclass with these fields, lists as tuples.

    Args:
        cls: the dataclass.
        values: by field name; fields that are not named keep their defaults.
        what: is described, for the message, e.g. "a task".

    Raises:
        InputError: a field that this version does not have, or one that it cannot do without.
    """
    check_mapping(values, what)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    former = former_names(cls)
    values = {former.get(name, name): value for name, value in values.items()}
    surplus = sorted(values.keys() - fields.keys())
    if surplus:
        raise InputError(
            f"the description of {what} has the field {surplus[0]!r}, which this version of "
            "gemma_encoder does not have: a newer one wrote it; install that one"
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    check_mapping(values, what, *missing)
    return cls(**{name: tupled(value) for name, value in values.items()})
