"""The program's own hooks: preemption, profiling, logging, checkpoints, evaluation, stopping."""

from gemma_encoder import activity
from gemma_encoder.evaluation.evaluator import EvaluationInterrupted
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.early_stopping import EarlyStoppingHook
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.profile import ProfileHook
from gemma_encoder.training.run import Cadence, Run


def standard_hooks(recipe: Recipe, cadence: Cadence) -> list[Hook]:
    """Returns the program's hooks for a recipe, in the order of their calls.

    Raises:
        InputError: the fields of the profile or of early stopping are invalid.
    """
    config = recipe.config
    stopping = [EarlyStoppingHook(recipe, cadence)] if config.early_stopping.patience else []
    return [
        PreemptionHook(),
        ProfileHook(config.profile, cadence.total),
        LoggingHook(),
        CheckpointHook(),  # before the evaluation, which may fail
        EvaluationHook(),
        *stopping,
    ]


class PreemptionHook(Hook):
    """Stops the run on the preemption signal."""

    def is_due(self, run: Run, step: int) -> bool:
        """Checks the signal once per step, on all processes."""
        return run.preemption.reached()

    def on_due(self, run: Run, step: int) -> None:
        """Stops with a checkpoint, but no evaluation: the next start catches up on it."""
        stop_for_preemption(run)


def stop_for_preemption(run: Run) -> None:
    """Ends the run after this step as preempted."""
    run.request_stop(
        f"preempted: saving step {run.step}; rerun the same command to resume",
        preempted=True,
    )


class LoggingHook(Hook):
    """Logs the means of the training metrics since the last line, and truncated texts."""

    def __init__(self):
        self._texts_told = 0  # texts of the newest message about truncation

    def is_due(self, run: Run, step: int) -> bool:
        """Due every `log_every` steps."""
        return run.cadence.is_due(run.cadence.log_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Writes a line to `metrics.jsonl`, TensorBoard and the terminal."""
        values = run.accumulator.close(run.stream.counts)
        run.log.write(step, "train", values)
        loss = values["loss"]
        rate = values["texts_per_second"]
        if not run.preempted:  # the line about it is the last
            run.progress.report(step, f"loss {loss:.4f}  {rate:.0f} texts/s")

        if not self._texts_told:
            self._tell_truncation(run, "training texts so far")

    def on_end(self, run: Run) -> None:
        """Writes a line about the steps since the last line, if any."""
        if run.accumulator.steps:
            self.on_due(run, run.step)
        if not run.preempted:
            self._tell_truncation(run, "training texts")

    def _tell_truncation(self, run: Run, texts: str) -> None:
        """Says how many texts were truncated, if any, and if there are more than before.

        With several processes, they are the texts of the main process.
        """
        counts = run.stream.counts
        total = sum(values["texts"] for values in counts.values())
        num_truncated = sum(values["cut_texts"] for values in counts.values())
        if num_truncated and total != self._texts_told:
            self._texts_told = total
            run.progress.say(
                f"{num_truncated} of {total} {texts} ({num_truncated / total:.1%}) exceed "
                f"max_length={run.recipe.config.max_length} tokens and were truncated"
            )


class CheckpointHook(Hook):
    """Saves checkpoints."""

    def is_due(self, run: Run, step: int) -> bool:
        """Due every `checkpoint_every` steps."""
        return run.cadence.is_due(run.cadence.checkpoint_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Saves a checkpoint; on accelerators it is written in the background."""
        run.save()

    def on_end(self, run: Run) -> None:
        """Saves the last step, if not done yet, and waits until all checkpoints are written."""
        if run.step != run.saved_step:
            run.save()
        with activity.during(f"saving step {run.step}"):
            run.checkpoints.wait()


class EvaluationHook(Hook):
    """Evaluates the model, and writes metrics and predictions."""

    def on_start(self, run: Run) -> None:
        """Catches up on an evaluation that a preemption or a failure skipped."""
        self._evaluator = run.recipe.evaluator(
            run.trainer.mesh, run.workdir, run.preemption.reached
        )
        start = run.step
        every = run.cadence.evaluate_every
        was_due = start == run.total or (start and every and start % every == 0)
        if not was_due:
            return
        if not run.was_evaluated():
            self._evaluate(run, logs=True)
        elif not run.checkpoints.has_evaluation(start):  # killed before it was added
            run.add_evaluation()

    def is_due(self, run: Run, step: int) -> bool:
        """Due every `evaluate_every` steps."""
        return run.cadence.is_due(run.cadence.evaluate_every, step)

    def on_due(self, run: Run, step: int) -> None:
        """Evaluates after the checkpoint of this step, to which the evaluation is added."""
        self._evaluate(run, logs=True)

    def on_end(self, run: Run) -> None:
        """Evaluates the last step, if not done yet; adds no lines that the log already has."""
        if not run.preempted and not run.is_evaluated:
            self._evaluate(run, logs=not run.was_evaluated())

    def _evaluate(self, run: Run, *, logs: bool) -> None:
        write = run.log.write if logs else None
        try:
            run.evaluation = self._evaluator.run(run.trainer.state.parameters, run.step, write)
        except EvaluationInterrupted:
            stop_for_preemption(run)
            return
        run.add_evaluation()
        if logs:
            run.progress.say(f"step {run.step}: {run.evaluation.line()}")
