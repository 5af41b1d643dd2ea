"""Early stopping: ends a run whose `best_metric` no longer improves."""

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
    """Counts evaluations in a row without an improvement.

    An improvement is better than the best value so far by more than `min_delta`; only then does
    the best value move. NaN never is one.

    Attributes:
        limit: evaluations in a row after which it is exhausted.
        min_delta: in the metric's unit.
        lowest: whether lower values are better.
        best: the best value so far; None before the first.
        best_step: of that value.
        misses: evaluations since then.
    """

    limit: int
    min_delta: float
    lowest: bool
    best: float | None = None
    best_step: int = 0
    misses: int = 0

    def add(self, step: int, value: float) -> None:
        """Counts an evaluation."""
        gain = math.inf if self.best is None else value - self.best
        if self.best is not None and self.lowest:
            gain = -gain
        if gain > self.min_delta and not math.isnan(value):
            self.best, self.best_step, self.misses = value, step, 0
        else:
            self.misses += 1

    @property
    def is_exhausted(self) -> bool:
        """Whether to stop."""
        return self.misses >= self.limit


class EarlyStoppingHook(Hook):
    """Ends the run after `early_stopping.patience` evaluations in a row without an improvement.

    Nothing is saved for it. At a start the evaluations up to the restored step are counted again
    from `metrics.jsonl`, from which later ones have been dropped: a resumed run has the count of
    one that was never interrupted, and a run that was stopped early stops again before its next
    step. Evaluations at other steps than `evaluate_every` says are not counted, so that
    `gemma-encoder evaluate` changes nothing. The main process counts and decides for all.

    Args:
        recipe: of the run.
        cadence: of the run.

    Raises:
        InputError: no evaluation comes before the last step.
    """

    def __init__(self, recipe: Recipe, cadence: Cadence):
        options = recipe.config.early_stopping
        if not 0 < cadence.evaluate_every < cadence.total:
            raise InputError(
                f"early_stopping.patience={options.patience} counts evaluations, but with "
                f"evaluate_every={recipe.config.evaluate_every!r} none comes before the last of "
                f"{cadence.total} steps; set e.g. evaluate_every='10 percent', or patience to 0"
            )
        self._name, self._every = recipe.best_metric, cadence.evaluate_every
        self._patience = Patience(
            options.patience, options.min_delta, lowest_is_best(self._name[1])
        )

    def on_start(self, run: Run) -> None:
        """Counts the evaluations before this start."""
        if distributed.is_main_process():
            for step, value in self._history(run).items():
                self._patience.add(step, value)
        self._decide(run)

    def _history(self, run: Run) -> dict[int, float]:
        """The value of each evaluation in the log by its step, in the order of steps."""
        task, metric = self._name
        values = {
            line["step"]: line[metric]
            for line in read_metrics(run.workdir)
            if line["split"] == run.recipe.config.evaluate_split
            and line.get("task") == task
            and metric in line
            and line["step"] % self._every == 0
        }
        return dict(sorted(values.items()))

    def is_due(self, run: Run, step: int) -> bool:
        """After each evaluation but that of the last step."""
        return step < run.total and step % self._every == 0

    def on_due(self, run: Run, step: int) -> None:
        """Counts the evaluation of this step."""
        value = run.best_value()
        if value is None:
            raise InputError(
                f"early_stopping.patience needs {'/'.join(self._name)}, which the split "
                f"{run.recipe.config.evaluate_split!r} does not give: it has no labels"
            )
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
            f"{'/'.join(self._name)} on the best{best} by more than {patience.min_delta:g}"
        )
