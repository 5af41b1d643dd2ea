"""Profiling of training steps."""

import jax

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.run import Run


class ProfileHook(Hook):
    """Profiles a range of steps, for TensorBoard or Perfetto, to `profile/` of the workdir.

    Args:
        steps: (first, last) step; empty for no profile.
        total: steps of the whole run.

    Raises:
        InputError: `steps` is not a valid range, or begins after the last step.
    """

    def __init__(self, steps: tuple[int, ...], total: int):
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise InputError(f"profile must be (first step, last step), got {tuple(steps)}")
        if steps and steps[0] > total:
            raise InputError(f"profile={tuple(steps)} begins after the last of {total} steps")
        self._steps = tuple(steps)
        self._is_running = False

    def on_start(self, run: Run) -> None:
        """Ensures that the profile is written even if the run ends during it."""
        run.resources.callback(self._stop)

    def before_step(self, run: Run, step: int) -> None:
        """Starts the profile before its first step; a resumed run may start within it."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._is_running:
            jax.profiler.start_trace(str(run.workdir / "profile"))
            self._is_running = True

    def is_due(self, run: Run, step: int) -> bool:
        """Due after the last step of the profile."""
        return self._is_running and step == self._steps[1]

    def on_due(self, run: Run, step: int) -> None:
        """Stops the profile; the devices have finished the step."""
        self._stop()

    def _stop(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
