"""Registry of tasks by name.

To add a task, add a declaration to the module of its benchmark, or call `register`.
"""

from collections.abc import Callable

from gemma_encoder.data import seqio_source
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tasks import (
    beir,
    glue,
    msmarco,
    own,
    superglue,
    text,
    toy,
    toy_retrieval,
)
from gemma_encoder.inputs.errors import InputError, unknown

_TASKS: dict[str, Callable[[DataOptions], Source]] = {
    **glue.TASKS,
    **superglue.TASKS,
    **msmarco.TASKS,
    **beir.TASKS,
    **own.TASKS,
    **text.TASKS,
    **toy.TASKS,
    **toy_retrieval.TASKS,
}


def names(options: DataOptions | None = None) -> tuple[str, ...]:
    """Returns the sorted names of all tasks; `own` goes by the name that `options` give it."""
    return tuple(sorted(_by_name(options or DataOptions())))


def register(name: str, make: Callable[[DataOptions], Source]) -> None:
    """Adds a custom task.

    Args:
        name: must not be registered yet.
        make: returns the source of the task for the data options of a config.

    Raises:
        InputError: the name is taken.
    """
    if name in _TASKS:
        raise InputError(f"task {name!r} is already registered")
    _TASKS[name] = make


def get(name: str, options: DataOptions | None = None) -> Source:
    """Returns the source of a task.

    Raises:
        InputError: the name is unknown, or the options or the data of the task are invalid.
    """
    options = options or DataOptions()
    if name.startswith(seqio_source.PREFIX):
        return seqio_source.SeqioSource(name, options)
    tasks = _by_name(options)
    if name not in tasks:
        raise unknown("task", name, tasks)
    return tasks[name](options)


def _by_name(options: DataOptions) -> dict[str, Callable[[DataOptions], Source]]:
    own = options.own.get("name") or "own"
    if own == "own":
        return _TASKS
    if own in _TASKS:
        raise InputError(f"own.name: {own!r} is the name of another task; choose a new name")
    return {own if name == "own" else name: make for name, make in _TASKS.items()}
