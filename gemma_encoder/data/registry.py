"""Every task by its name. Adding a task is adding one declaration to a benchmark's module, or calling `register`."""

from collections.abc import Callable

from gemma_encoder.data import seqio_source
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tasks import beir, glue, msmarco, own, superglue, text, toy
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


def names(options: DataOptions | None = None) -> tuple[str, ...]:
    """All registered tasks, sorted; that of the user's own files by the name that `options` give."""
    return tuple(sorted(_by_name(options or DataOptions())))


def register(name: str, make: Callable[[DataOptions], Source]) -> None:
    """Adds a task of one's own: `make` gives its source for the options of a config. A name is registered once."""
    if name in _TASKS:
        raise InputError(f"task {name!r} is already registered")
    _TASKS[name] = make


def get(name: str, options: DataOptions | None = None) -> Source:
    """The source of a task; raises InputError for an unknown name (with the nearest valid one) or missing data."""
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
        raise InputError(f"own.name: {own!r} is the name of another task; choose one that is new")
    return {own if name == "own" else name: make for name, make in _TASKS.items()}
