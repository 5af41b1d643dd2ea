"""Texts in memory as users give them: lists, DataFrames, and texts of one or several fields."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import identifier


def as_list(texts: Any, name: str) -> list:
    """Returns the texts as a list; the rows of a DataFrame as dictionaries."""
    if isinstance(texts, str | Mapping):
        raise InputError(f"{name} must be a list; put a single one in brackets")
    if hasattr(texts, "columns") and hasattr(texts, "to_dicts"):  # polars
        return texts.to_dicts()
    if hasattr(texts, "columns") and hasattr(texts, "to_dict"):  # pandas
        if not texts.columns.is_unique:
            columns = ", ".join(map(str, texts.columns))
            raise InputError(f"{name} has duplicate column names: {columns}")
        return texts.to_dict("records")
    try:
        return list(texts)
    except TypeError:
        raise InputError(f"{name} must be a list, got {type(texts).__name__}") from None


def index_of(texts: Any) -> Any:
    """Returns the index of a DataFrame or a Series; None for other collections."""
    index = getattr(texts, "index", None)
    return None if callable(index) else index  # lists have a method of that name


def column_of(field: str, names: Collection[str]) -> str:
    """Returns the column of a field: that name, or the only one that a template spells so."""
    if field in names:
        return field
    spelled = [name for name in names if isinstance(name, str) and identifier(name) == field]
    return spelled[0] if len(spelled) == 1 else field


def with_field_names(task: Task, text: Mapping[str, Any], role: str = "") -> Mapping[str, Any]:
    """Returns values by column with those of the task's fields under the names of the fields.

    Args:
        task: the task.
        text: values by column.
        role: selects the template whose fields they are.
    """
    columns = {field: column_of(field, text) for field in task.template_for(role).fields}
    if all(field == column for field, column in columns.items()):
        return text
    return {**text, **{field: text[name] for field, name in columns.items() if name in text}}


def named_fields(task: Task, text: Any, where: str, role: str = "") -> dict[str, str]:
    """Returns a string or tuple as a dictionary of the task's fields, for texts of a role."""
    fields = task.template_for(role).fields
    if not isinstance(text, str | Sequence) or isinstance(text, bytes):
        raise InputError(
            f"{where}: expected a string, a dictionary of fields or a tuple of them, got "
            f"{type(text).__name__}"
        )
    values = (text,) if isinstance(text, str) else tuple(text)
    if len(values) != len(fields):
        raise InputError(
            f"{where}: task {task.name!r} needs {len(fields)} fields ({', '.join(fields)})"
            f"{f' for a {role}' if role else ''}, got {len(values)}"
        )
    return dict(zip(fields, values, strict=True))
