"""A profile of some steps of a run."""

import jax
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.step import StepMetrics


class Profile:
    """A profile of some steps, for TensorBoard or Perfetto, under `profile/` of the workdir.

    Args:
        workdir: of the run.
        steps: (first, last); empty for none.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, ...]):
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise InputError(f"profile must be (first step, last step), got {tuple(steps)}")
        self._folder, self._steps, self._running = workdir / "profile", tuple(steps), False

    def before(self, step: int) -> None:
        """Begins, if `step` is the first one."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: StepMetrics) -> None:
        """Ends, if `step` is the last one, once the devices have done it."""
        if self._running and step == self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
