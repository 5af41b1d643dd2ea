"""Early stopping: stops a run whose `best_metric` no longer improves."""

import dataclasses
import math

from gemma_encoder import distributed
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.run import Cadence, Run


@dataclasses.dataclass
class Patience:
    """Counts consecutive evaluations without an improvement.

    A value is an improvement if it beats the best value by more than `min_delta`; only then is
    the best value updated. NaN is never an improvement.

    Attributes:
        limit: consecutive evaluations without improvement after which patience is exhausted.
        min_delta: minimum improvement, in the metric's unit.
        lowest: whether lower values are better.
        best: the best value so far; None before the first.
        best_step: step of the best value.
        misses: evaluations since `best_step`.
    """

    limit: int
    min_delta: float
    lowest: bool
    best: float | None = None
    best_step: int = 0
    misses: int = 0

    def add(self, step: int, value: float) -> None:
        """Adds the value of an evaluation."""
        gain = math.inf if self.best is None else value - self.best
        if self.best is not None and self.lowest:
            gain = -gain
        if gain > self.min_delta and not math.isnan(value):
            self.best = value
            self.best_step = step
            self.misses = 0
        else:
            self.misses += 1

    @property
    def is_exhausted(self) -> bool:
        """True if the run should stop."""
        return self.misses >= self.limit


class EarlyStoppingHook(Hook):
    """Stops the run after `early_stopping.patience` evaluations in a row without improvement.

    The count is not checkpointed. It is rebuilt at each start from `metrics.jsonl`, which holds
    the evaluations up to the restored step: a resumed run has the count of an uninterrupted one,
    and a run that was stopped early stops again before its next step. Only evaluations at the
    steps of `evaluate_every` count, so that `gemma-encoder evaluate` has no effect. The main
    process counts and decides for all processes.

    Args:
        recipe: the run's recipe.
        cadence: the run's cadence.

    Raises:
        InputError: no evaluation is due before the last step, or the split has no labels.
    """

    def __init__(self, recipe: Recipe, cadence: Cadence):
        options = recipe.config.early_stopping
        if not 0 < cadence.evaluate_every < cadence.total:
            raise InputError(
                f"early_stopping.patience={options.patience} counts evaluations, but with "
                f"evaluate_every={recipe.config.evaluate_every!r} none is due before the last of "
                f"{cadence.total} steps; set e.g. evaluate_every='10 percent', or patience to 0"
            )
        self._task, self._metric = recipe.best_metric
        if self._task in recipe.unlabeled:
            raise self._unlabeled(recipe)
        self._every = cadence.evaluate_every
        lowest = lowest_is_best(self._metric)
        self._patience = Patience(options.patience, options.min_delta, lowest)

    def _unlabeled(self, recipe: Recipe) -> InputError:
        return InputError(
            f"early_stopping.patience needs {self._task}/{self._metric}, which the split "
            f"{recipe.config.evaluate_split!r} does not have: it is unlabeled"
        )

    def on_start(self, run: Run) -> None:
        """Counts the evaluations of earlier starts."""
        if distributed.is_main_process():
            for step, value in self._history(run).items():
                self._patience.add(step, value)
        self._decide(run)

    def _history(self, run: Run) -> dict[int, float]:
        """Returns the value of each evaluation in the log by its step, in the order of steps."""
        values = {
            line["step"]: line[self._metric]
            for line in read_metrics(run.workdir)
            if line["split"] == run.recipe.config.evaluate_split
            and line.get("task") == self._task
            and self._metric in line
            and line["step"] % self._every == 0
        }
        return dict(sorted(values.items()))

    def is_due(self, run: Run, step: int) -> bool:
        """Due after each evaluation except that of the last step."""
        return step < run.total and step % self._every == 0

    def on_due(self, run: Run, step: int) -> None:
        """Counts the evaluation of this step."""
        value = run.best_value()
        if value is None:
            raise self._unlabeled(run.recipe)
        self._patience.add(step, value)
        self._decide(run)

    def _decide(self, run: Run) -> None:
        if run.step < run.total and distributed.decided_by_main(self._patience.is_exhausted):
            run.request_stop(self._reason(run.step))

    def _reason(self, step: int) -> str:
        patience = self._patience
        best = "" if patience.best is None else f" {patience.best:.4f} of step {patience.best_step}"
        return (
            f"stopped early at step {step}: {patience.limit} evaluations in a row did not improve "
            f"{self._task}/{self._metric} on the best{best} by more than {patience.min_delta:g}"
        )
