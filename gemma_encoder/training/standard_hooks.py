"""The hooks of every run, in order: preemption, profile, log, evaluation, stopping, checkpoints."""

from gemma_encoder.evaluation.evaluator import EvaluationInterrupted
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.early_stopping import EarlyStoppingHook
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.profile import ProfileHook
from gemma_encoder.training.run import Cadence, Run


def standard_hooks(recipe: Recipe, cadence: Cadence) -> list[Hook]:
    """The hooks that a config describes.

    Raises:
        InputError: the profile or early stopping is configured wrong.
    """
    config = recipe.config
    stopping = [EarlyStoppingHook(recipe, cadence)] if config.early_stopping.patience else []
    return [
        PreemptionHook(),
        ProfileHook(config.profile),
        LoggingHook(),
        EvaluationHook(),
        *stopping,
        CheckpointHook(),
    ]


class PreemptionHook(Hook):
    """Stops the run once it gets the preemption signal."""

    def is_due(self, run: Run, step: int) -> bool:
        """Asks once a step, on all processes alike."""
        return run.preemption.reached()

    def on_due(self, run: Run, step: int) -> None:
        """Stops with a checkpoint and without an evaluation, which the next start makes up for."""
        stop_for_preemption(run)


def stop_for_preemption(run: Run) -> None:
    """Ends the run after this step as incomplete."""
    run.request_stop(
        f"told to stop: saving step {run.step}; start the same command again to go on",
        preempted=True,
    )


class LoggingHook(Hook):
    """Writes the means of the training metrics since the last line."""

    def is_due(self, run: Run, step: int) -> bool:
        """By `log_every`."""
        return run.cadence.is_due(run.cadence.log_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Writes a line to `metrics.jsonl`, TensorBoard and the terminal."""
        values = run.accumulator.close(step, run.stream.counts)
        run.log.write(step, "train", values)
        run.progress.report(
            step, f"loss {values['loss']:.4f}  {values['texts_per_second']:.0f} texts/s"
        )

    def on_end(self, run: Run) -> None:
        """Writes a line about the steps that have none yet."""
        if run.accumulator.steps:
            self.on_due(run, run.step)


class EvaluationHook(Hook):
    """Evaluates, and writes metrics and predictions."""

    def on_start(self, run: Run) -> None:
        """Makes up for an evaluation that a preemption prevented."""
        self._evaluator = run.recipe.evaluator(
            run.trainer.mesh, run.workdir, run.preemption.reached
        )
        every, start = run.cadence.evaluate_every, run.step
        was_due = start == run.total or (start and every and start % every == 0)
        if was_due and not run.was_evaluated():
            self._evaluate(run, logs=True)

    def is_due(self, run: Run, step: int) -> bool:
        """By `evaluate_every`."""
        return run.cadence.is_due(run.cadence.evaluate_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Evaluates; the checkpoint of this step is saved afterwards, with its value."""
        self._evaluate(run, logs=True)

    def on_end(self, run: Run) -> None:
        """Evaluates the last step, unless that is done; adds no line that the log has already."""
        if not run.preempted and not run.is_evaluated:
            self._evaluate(run, logs=not run.was_evaluated())

    def _evaluate(self, run: Run, *, logs: bool) -> None:
        write = run.log.write if logs else None
        try:
            run.evaluation = self._evaluator.run(run.trainer.state.parameters, run.step, write)
        except EvaluationInterrupted:
            stop_for_preemption(run)
            return
        if logs:
            run.progress.say(f"step {run.step}: {run.evaluation.line()}")


class CheckpointHook(Hook):
    """Saves checkpoints."""

    def is_due(self, run: Run, step: int) -> bool:
        """By `checkpoint_every`."""
        return run.cadence.is_due(run.cadence.checkpoint_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Saves; on an accelerator, writing goes on in the background."""
        run.save()

    def on_end(self, run: Run) -> None:
        """Saves the last step, unless that is done, and waits until all is written."""
        if run.step != run.saved_step:
            run.save()
        run.checkpoints.wait()
