"""Dataclasses from their JSON descriptions; unknown fields, of a newer version, are errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma_encoder.inputs.errors import InputError

Described = TypeVar("Described")


def tupled(value: Any) -> Any:
    """Converts lists to tuples, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(tupled(item) for item in value)
    return value


def check_mapping(values: Any, subject: str, *needed: str) -> None:
    """Raises InputError unless a description is a mapping with the needed fields."""
    if not isinstance(values, Mapping):
        raise InputError(f"the description of {subject} is {type(values).__name__}; it is damaged")
    for name in needed:
        if name not in values:
            raise InputError(
                f"the description of {subject} lacks the field {name!r}; it is damaged"
            )


def former_names(cls: type) -> dict[str, str]:
    """Returns the current name of each renamed field by its former name (metadata `former`)."""
    return {
        field.metadata["former"]: field.name
        for field in dataclasses.fields(cls)
        if "former" in field.metadata
    }


def from_fields(cls: type[Described], values: Mapping[str, Any], subject: str) -> Described:
    """Builds a dataclass from its description, with lists converted to tuples.

    Args:
        cls: the dataclass.
        values: values by field name; missing fields take their defaults.
        subject: names the description in error messages, e.g. "a task".

    Raises:
        InputError: a field is unknown to this version, or a required field is missing.
    """
    check_mapping(values, subject)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    former = former_names(cls)
    values = {former.get(name, name): value for name, value in values.items()}
    surplus = sorted(values.keys() - fields.keys())
    if surplus:
        raise InputError(
            f"the description of {subject} has the field {surplus[0]!r}, which this version of "
            "gemma_encoder does not know: a newer version wrote it; install that version"
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    check_mapping(values, subject, *missing)
    return cls(**{name: tupled(value) for name, value in values.items()})
