"""Hooks: callbacks of the training loop, the program's own and the user's."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gemma_encoder.inputs.errors import InputError, described, unknown

if TYPE_CHECKING:
    from gemma_encoder.training.run import Run


class Hook:
    """Callback that a run calls at certain steps. Subclass it and override methods as needed.

    For example, a hook that records the loss of every tenth step:

        class Losses(Hook):
            def __init__(self):
                self.values = []

            def is_due(self, run, step):
                return step % 10 == 0

            def on_due(self, run, step):
                self.values.append(float(run.metrics.loss))

    Pass it as `loop.train(config, workdir, hooks=[Losses()])`, or register it by name with
    `register_hook` and list the name in `config.hooks`.

    The training clock is paused in all methods but `before_step` and `is_due`. A hook that is due
    makes the run wait for the step's metrics: if it is due at every step, consecutive steps no
    longer overlap. With several processes, every method is called on all of them, and decisions
    about the run (`run.request_stop`) must be the same on all. If a method raises, the steps since
    the last checkpoint are saved, and the run ends with an error that names the hook.
    """

    def __init_subclass__(cls, **options: object) -> None:
        """Rejects misspelled hook methods, which would never be called."""
        super().__init_subclass__(**options)
        methods = [name for name in vars(Hook) if not name.startswith("_")]
        for name in vars(cls):
            if name.startswith(("on_", "before_", "after_")) and name not in methods:
                raise unknown(f"method of a hook in {cls.__name__}:", name, methods)

    def on_start(self, run: "Run") -> None:
        """Called before the first step, with the state restored or initialized."""

    def before_step(self, run: "Run", step: int) -> None:
        """Called before each step, while the one before it may still be running."""

    def is_due(self, run: "Run", step: int) -> bool:
        """Returns True if `on_due` should be called; called after each step, in order."""
        return False

    def on_due(self, run: "Run", step: int) -> None:
        """Called after a step if due; `run.metrics` holds the metrics of the step."""

    def on_end(self, run: "Run") -> None:
        """Called after the last step, unless the run ends with an error."""


class Hooks:
    """Calls hooks in order: first the program's, then the user's.

    Args:
        standard: the program's hooks.
        users: the user's hooks; an error in one of them names it.
    """

    def __init__(self, standard: Sequence[Hook], users: Sequence[Hook] = ()):
        self._all = (*standard, *users)
        self._users = users

    def start(self, run: "Run") -> None:
        """Calls `on_start`, then starts the training clock."""
        for hook in self._all:
            with self._guard(hook, "on_start", run):
                hook.on_start(run)
        run.accumulator.resume()

    def before_step(self, run: "Run") -> None:
        """Calls `before_step`."""
        for hook in self._all:
            with self._guard(hook, "before_step", run):
                hook.before_step(run, run.step + 1)

    def after_step(self, run: "Run") -> None:
        """Calls `is_due` and, if due, `on_due` of each hook before the next hook."""
        paused = False
        for hook in self._all:
            with self._guard(hook, "is_due", run):
                due = hook.is_due(run, run.step)
            if not due:
                continue
            if not paused:
                run.settle()
                run.accumulator.pause()
                paused = True
            with self._guard(hook, "on_due", run):
                hook.on_due(run, run.step)
            if run.preempted:  # little time is left: do only what `end` does
                return
        if paused and not run.is_over:
            # Log lines restart at checkpoints, so that a run resumed there writes the same lines.
            if run.saved_step == run.step or run.is_evaluated:
                run.accumulator.restart()
            run.accumulator.resume()

    def end(self, run: "Run") -> None:
        """Pauses the training clock, then calls `on_end`."""
        run.accumulator.pause()
        for hook in self._all:
            with self._guard(hook, "on_end", run):
                hook.on_end(run)

    @contextlib.contextmanager
    def _guard(self, hook: Hook, event: str, run: "Run") -> Iterator[None]:
        """Saves the state if a hook fails; names a user's hook, or the file that failed."""
        try:
            yield
        except Exception as error:
            run.rescue()
            is_users = any(hook is user_hook for user_hook in self._users)
            if not is_users and not isinstance(error, OSError):  # InputError, or a bug of ours
                raise
            step = run.checkpoints.latest_step()
            saved = "no step is saved" if step is None else f"step {step} is saved"
            if not is_users:
                raise InputError(
                    f"step {run.step}: {described(error)}; {saved} in {run.workdir}; free disk "
                    "space or restore the file, then rerun the same command"
                ) from error
            raise InputError(
                f"hook {type(hook).__name__} failed in {event} at step {run.step}{_line(error)}: "
                f"{described(error)}; {saved} in {run.workdir}; "
                "fix the hook and rerun the same command"
            ) from error


def _line(error: Exception) -> str:
    """Returns the line of the hook that raised, outside this file, as " (FILE:LINE)"."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


_FACTORIES: dict[str, Callable[[], Hook]] = {}


def register_hook(name: str, factory: Callable[[], Hook]) -> None:
    """Registers a hook under a name that `config.hooks` may list.

    Args:
        name: a name that is not registered yet.
        factory: called once per run, without arguments, e.g. a subclass of `Hook`. The hook can
            read the config in `on_start`, as `run.recipe.config`.
    """
    if name in _FACTORIES:
        raise InputError(f"hook {name!r} is already registered")
    _FACTORIES[name] = factory


def named_hooks(names: Sequence[str]) -> tuple[Hook, ...]:
    """Creates the registered hooks of these names; raises InputError for an unknown name."""
    for name in names:
        if name not in _FACTORIES:
            raise unknown("hook", name, _FACTORIES)
    return checked_hooks([_FACTORIES[name]() for name in names])


def checked_hooks(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """Returns the hooks as a tuple; raises InputError if an item is not a hook."""
    if not isinstance(hooks, Sequence):
        raise InputError(f"hooks must be a list of hooks, got {type(hooks).__name__}")
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise InputError(
                f"{hook!r} is not a hook; pass an instance of a subclass of "
                "gemma_encoder.training.hooks.Hook"
            )
    return tuple(hooks)
