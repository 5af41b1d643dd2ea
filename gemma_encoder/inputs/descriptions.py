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


def from_fields(cls: type[Described], values: Mapping[str, Any], what: str) -> Described:
    """The dataclass with these fields, lists as tuples.

    Args:
        cls: the dataclass.
        values: by field name; fields that are not named keep their defaults.
        what: is described, for the message, e.g. "a task".

    Raises:
        InputError: a field that this version does not have, or one that it cannot do without.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
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
    if missing:
        raise InputError(f"the description of {what} lacks the field {missing[0]!r}; it is damaged")
    return cls(**{name: tupled(value) for name, value in values.items()})
