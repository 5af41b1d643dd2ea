"""Dataclasses from their JSON descriptions; unknown fields, of a newer version, are errors."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gemma_encoder.inputs.errors import InputError, reason, shortened
from gemma_encoder.inputs.options import check_type, former_names

Described = TypeVar("Described")


def tupled(value: Any) -> Any:
    """Converts lists to tuples, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(tupled(item) for item in value)
    return value


@contextlib.contextmanager
def described_at(where: object = "", advice: str = "") -> Iterator[None]:
    """Completes the messages of errors in a description with where it is and what to do.

    Errors of other types, which only a damaged description raises, become an InputError.
    """
    begin = f"{where}: " if where else ""
    end = f"; {advice}" if advice else ""
    try:
        yield
    except InputError as error:
        raise InputError(f"{begin}{error}{end}") from None
    except Exception as error:
        problem = f"{begin}the description is damaged ({reason(error)}){end}"
        raise InputError(problem) from error


def check_mapping(values: Any, subject: str, *needed: str) -> None:
    """Raises InputError unless a description is a mapping with the needed fields."""
    if not isinstance(values, Mapping):
        raise InputError(f"the description of {subject} is {type(values).__name__}; it is damaged")
    for name in needed:
        if name not in values:
            raise InputError(
                f"the description of {subject} lacks the field {name!r}; it is damaged"
            )


def from_fields(cls: type[Described], values: Mapping[str, Any], subject: str) -> Described:
    """Builds a dataclass from its description, with lists converted to tuples.

    Args:
        cls: the dataclass.
        values: values by field name; missing fields take their defaults.
        subject: names the description in error messages, e.g. "a task".

    Raises:
        InputError: a field is unknown to this version, a required field is missing, or a value has
            another type than the field.
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
    for name, value in values.items():
        try:
            check_type(cls, name, value)
        except InputError as error:
            problem = f"the description of {subject} is damaged"
            raise InputError(f"{shortened(str(error))}; {problem}") from None
    return cls(**{name: tupled(value) for name, value in values.items()})
