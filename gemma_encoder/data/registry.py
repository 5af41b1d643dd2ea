"""Every task by its name. Adding a task is adding one declaration to a benchmark's module, or calling `register`."""

from collections.abc import Callable

from gemma_encoder.data import beir, glue, msmarco, own, superglue, text, toy
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError, unknown

_TASKS: dict[str, Callable[[DataOptions], Source]] = {
    **glue.TASKS,
    **superglue.TASKS,
    **msmarco.TASKS,
    **beir.TASKS,
    **own.TASKS,
    **text.TASKS,
    **toy.TASKS,
}


def names() -> tuple[str, ...]:
    """All registered tasks, sorted."""
    return tuple(sorted(_TASKS))


def register(name: str, make: Callable[[DataOptions], Source]) -> None:
    """Adds a task of one's own: `make` gives its source for the options of a config. A name is registered once."""
    if name in _TASKS:
        raise InputError(f"task {name!r} is already registered")
    _TASKS[name] = make


def get(name: str, options: DataOptions | None = None) -> Source:
    """The source of a task; raises InputError for an unknown name (with the nearest valid one) or missing data."""
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    return _TASKS[name](options or DataOptions())
