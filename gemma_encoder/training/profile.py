"""A profile of some steps of a run."""

import jax

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.run import Run


class ProfileHook(Hook):
    """Profiles some steps, for TensorBoard or Perfetto, under `profile/` of the workdir.

    Args:
        steps: (first, last); empty for none.

    Raises:
        InputError: `steps` is neither.
    """

    def __init__(self, steps: tuple[int, ...]):
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise InputError(f"profile must be (first step, last step), got {tuple(steps)}")
        self._steps, self._is_running = tuple(steps), False

    def on_start(self, run: Run) -> None:
        """Has the profile written even if the run ends in the middle of it."""
        run.resources.callback(self._stop)

    def before_step(self, run: Run, step: int) -> None:
        """Starts at the first step."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(run.workdir / "profile"))
            self._is_running = True

    def is_due(self, run: Run, step: int) -> bool:
        """After the last step."""
        return self._is_running and step == self._steps[1]

    def on_due(self, run: Run, step: int) -> None:
        """Stops, now that the devices have finished the step."""
        self._stop()

    def _stop(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
