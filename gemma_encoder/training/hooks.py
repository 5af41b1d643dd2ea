"""Hooks: what a run does at cadences besides taking steps, and how users add their own."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gemma_encoder.inputs.errors import InputError, described, unknown

if TYPE_CHECKING:
    from gemma_encoder.training.run import Run


class Hook:
    """Something a run does at certain steps. Subclass it and override what you need.

    For example, a hook that keeps the loss of every tenth step:

        class Losses(Hook):
            def __init__(self):
                self.values = []

            def is_due(self, run, step):
                return step % 10 == 0

            def on_due(self, run, step):
                self.values.append(float(run.metrics.loss))

    Pass it as `loop.train(config, workdir, hooks=[Losses()])`, or give it a name by
    `register_hook` and list that in `config.hooks`.

    The clock of training stands still in all methods but `before_step` and `is_due`. A hook that
    is due makes the run wait for the step's numbers: due at every step, it costs the overlap of
    one step with the next. On several processes every method is called on all of them; what
    decides about the run (`run.request_stop`) must decide alike. When a method raises, the steps
    since the last checkpoint are saved, and the run ends with an error that names the hook.
    """

    def __init_subclass__(cls, **options: object) -> None:
        """Refuses a method that looks like one a run calls, but is none: it would never be called."""
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
        """Whether `on_due` is to be called after this step; asked after each, in order."""
        return False

    def on_due(self, run: "Run", step: int) -> None:
        """Called after a step, where due; `run.metrics` holds that step's."""

    def on_end(self, run: "Run") -> None:
        """Called after the last step, unless the run ends by an error."""


class Hooks:
    """Calls hooks in order: those of the program, then those of the user.

    Args:
        standard: of the program.
        users: of the user; an error in one of them names it.
    """

    def __init__(self, standard: Sequence[Hook], users: Sequence[Hook] = ()):
        self._all, self._users = (*standard, *users), users

    def start(self, run: "Run") -> None:
        """Before the first step."""
        for hook in self._all:
            with self._guard(hook, "on_start", run):
                hook.on_start(run)
        run.accumulator.resume()

    def before_step(self, run: "Run") -> None:
        """Before each step."""
        for hook in self._all:
            with self._guard(hook, "before_step", run):
                hook.before_step(run, run.step + 1)

    def after_step(self, run: "Run") -> None:
        """After each step: asks each hook whether it is due, and calls it, before the next."""
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
            if run.preempted:  # little time is left: no more than what `end` does
                return
        if paused and not run.is_over:
            # A line of the log begins at a checkpoint: it is the same after a restart from there.
            if run.saved_step == run.step or run.is_evaluated:
                run.accumulator.restart()
            run.accumulator.resume()

    def end(self, run: "Run") -> None:
        """After the last step."""
        run.accumulator.pause()
        for hook in self._all:
            with self._guard(hook, "on_end", run):
                hook.on_end(run)

    @contextlib.contextmanager
    def _guard(self, hook: Hook, event: str, run: "Run") -> Iterator[None]:
        """Saves what was trained when a hook fails, and names a user's hook in the error."""
        try:
            yield
        except Exception as error:
            run.rescue()
            if not any(hook is users for users in self._users):
                raise
            name, step = type(hook).__name__, run.checkpoints.latest_step()
            saved = "no step is saved" if step is None else f"step {step} is saved"
            raise InputError(
                f"hook {name} failed in {event} at step {run.step}{_line(error)}: "
                f"{described(error)}; {saved} in {run.workdir}; "
                "mend the hook and start the same command again"
            ) from error


def _line(error: Exception) -> str:
    """The line of the hook that raised, outside this file: " (FILE:LINE)"."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


_FACTORIES: dict[str, Callable[[], Hook]] = {}


def register_hook(name: str, factory: Callable[[], Hook]) -> None:
    """Gives a hook a name that `config.hooks` may list.

    Args:
        name: not registered before.
        factory: called once a run, without arguments; a subclass of `Hook` is one. The hook gets
            the config in `on_start`, as `run.recipe.config`.
    """
    if name in _FACTORIES:
        raise InputError(f"hook {name!r} is already registered")
    _FACTORIES[name] = factory


def named_hooks(names: Sequence[str]) -> tuple[Hook, ...]:
    """The registered hooks of these names; raises InputError for one that is not registered."""
    for name in names:
        if name not in _FACTORIES:
            raise unknown("hook", name, _FACTORIES)
    return checked_hooks([_FACTORIES[name]() for name in names])


def checked_hooks(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """The hooks themselves; raises InputError where something is none."""
    if not isinstance(hooks, Sequence):
        raise InputError(f"hooks is a list of hooks, got {type(hooks).__name__}")
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise InputError(
                f"{hook!r} is not a hook; pass an instance of a subclass of "
                "gemma_encoder.training.hooks.Hook"
            )
    return tuple(hooks)
