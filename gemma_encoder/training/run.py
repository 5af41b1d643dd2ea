"""State of a run in progress, shared by the training loop and its hooks."""

import contextlib
import dataclasses
import math
from typing import Any

from absl import logging
from etils import epath

from gemma_encoder import activity, distributed
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.distributed import PreemptionSignal
from gemma_encoder.evaluation.details import read_details
from gemma_encoder.evaluation.evaluator import Evaluation
from gemma_encoder.evaluation.prediction_files import FOLDER
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError, reason
from gemma_encoder.training.accumulator import MetricsAccumulator, NotFinite
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.failure import report_failure
from gemma_encoder.training.metrics_log import MetricsLog, Progress
from gemma_encoder.training.step import StepMetrics
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.weights.native import InferenceSpec


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Durations of a recipe, in steps.

    Attributes:
        examples_per_epoch: training examples of all tasks; the only one that is not in steps.
        total: steps of the whole run.
        warmup: steps of the learning-rate warmup.
        log_every, evaluate_every, checkpoint_every: 0 for only at the end.
    """

    examples_per_epoch: int
    total: int
    warmup: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Cadence":
        """Computes the durations of a recipe that is built for training."""
        epoch = recipe.epoch()
        total = recipe.steps("train_for", epoch)
        if total >= 2**31:
            raise InputError(
                f"train_for={recipe.config.train_for!r} is {total} steps; it must be below 2^31"
            )
        fields = ("warmup", "log_every", "evaluate_every", "checkpoint_every")
        return cls(epoch, total, *(recipe.steps(field, epoch, total) for field in fields))

    def is_due(self, every: int, step: int) -> bool:
        """Returns True if an action is due that is taken every `every` steps and at the end."""
        return step == self.total or bool(every and step % every == 0)


@dataclasses.dataclass
class Run:
    """A run in progress, which is passed to hooks.

    Attributes (those meant for hooks come first):
        trainer: holds the state and takes the steps.
        cadence: the run's durations in steps.
        workdir: folder of the run.
        command: the command that started the run.
        log: `metrics.jsonl` and TensorBoard.
        progress: progress bar and messages.
        evaluation: the latest evaluation; None before the first.
        best_metric: (task, metric) that selects the best checkpoint.
        resources: closed when the run ends, also by an error; hooks may add theirs.
        stop_reason: why the run ends before its last step; "" if it does not.
        preempted: whether the run ends because of preemption, and is incomplete.
        saved_step: step of the newest checkpoint, 0 before the first.
        stream: training batches.
        checkpoints: checkpoints of the workdir.
        accumulator: metrics since the last log line.
        preemption: the preemption signal.
    """

    trainer: Trainer
    cadence: Cadence
    workdir: epath.Path
    command: str
    best_metric: tuple[str, str]
    stream: TrainStream
    checkpoints: Checkpoints
    log: MetricsLog
    progress: Progress
    accumulator: MetricsAccumulator
    preemption: PreemptionSignal
    resources: contextlib.ExitStack
    saved_step: int = 0
    evaluation: Evaluation | None = None
    stop_reason: str = ""
    preempted: bool = False
    _unread: tuple[int, StepMetrics, Batch] | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe being trained, with its config."""
        return self.trainer.recipe

    @property
    def step(self) -> int:
        """Steps taken, the step in flight included."""
        return self.trainer.step_number

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.cadence.total

    @property
    def metrics(self) -> StepMetrics | None:
        """Metrics, on the host, of the newest finished step; in `on_due`, of the current step."""
        return self.accumulator.latest

    @property
    def is_over(self) -> bool:
        """True if no further step will be taken."""
        return self.step >= self.total or bool(self.stop_reason)

    def request_stop(self, reason: str, *, preempted: bool = False) -> None:
        """Ends the run after this step, with a final evaluation and checkpoint.

        All processes must make the same request.

        Args:
            reason: message to show.
            preempted: end with a checkpoint but without evaluation; the same command resumes.
        """
        if not self.stop_reason:
            self.progress.say(reason)
            self.stop_reason = reason
        self.preempted |= preempted

    @property
    def is_evaluated(self) -> bool:
        """True if `evaluation` is of the current step."""
        return self.evaluation is not None and self.evaluation.step == self.step

    def best_value(self) -> float | None:
        """Returns `best_metric` of the current step; None if not evaluated, or without labels."""
        if not self.is_evaluated:
            return None
        task, metric = self.best_metric
        return self.evaluation.metrics.get(task, {}).get(metric)

    def was_evaluated(self) -> bool:
        """Returns True if the log has a whole evaluation of the current step, of any start.

        The lines of an evaluation that was killed between two tasks are dropped.
        """
        split = self.recipe.config.evaluate_split
        tasks = {s.task.name for s in self.recipe.sources if s.evaluation_splits(split)}
        return distributed.decided_by_main(
            distributed.is_main_process() and self.log.has_evaluation(self.step, split, tasks)
        )

    def advance(self, batch: Batch) -> None:
        """Dispatches a step, then waits for the metrics of the previous step."""
        is_compiled = self.trainer.is_compiled
        if not is_compiled:
            self.accumulator.pause()  # compiling is no training
        metrics = self.trainer.step(batch)
        if not is_compiled:
            self.accumulator.resume()
        self.settle()
        self._unread = self.step, metrics, batch

    def settle(self) -> None:
        """Waits for the metrics of the newest step.

        Raises:
            InputError: the loss or the gradient is NaN or infinite; diagnostics are in the workdir.
        """
        if self._unread is None:
            return
        step, metrics, _ = self._unread
        try:
            loss = self.accumulator.add(step, metrics)
        except NotFinite as error:
            try:
                folder = report_failure(self.workdir, self.recipe, self._unread, str(error))
                diagnostics = f"Diagnostics are in {folder}"
            except OSError as problem:
                diagnostics = f"Diagnostics cannot be written: {reason(problem)}"
            raise InputError(
                f"{error}; lower optimizer.learning_rate or lengthen warmup. "
                f"{diagnostics}; earlier checkpoints are intact"
            ) from error
        self._unread = None
        self.progress.advance(loss)

    def save(self) -> None:
        """Saves a checkpoint of the current step, with its `best_metric` if it was evaluated."""
        value = self.best_value()
        self.saved_step = self.step
        with activity.during(f"saving step {self.step}"):
            self.checkpoints.save(
                self.trainer.state, self._inference_spec(), self.stream.state(), _selecting(value)
            )

    def add_evaluation(self) -> None:
        """Adds the evaluation of the current step to the checkpoint of this step, if any."""
        if not self.step or self.step != self.saved_step:
            return
        value = self.best_value() if self.is_evaluated else self._logged_value()
        with activity.during(f"saving the evaluation of step {self.step}"):
            self.checkpoints.add_evaluation(self._inference_spec(), _selecting(value))

    def _logged_value(self) -> float | None:
        """Returns `best_metric` of the current step from the log, on the main process."""
        task, metric = self.best_metric
        line = self.log.latest.get((task, self.recipe.config.evaluate_split), {})
        return line.get(metric) if line.get("step") == self.step else None

    def rescue(self) -> None:
        """Saves the current step, if possible, after a hook has failed."""
        if self.step == self.saved_step:
            return
        try:
            self.settle()  # raises for a NaN or infinite state, which is not worth saving
            if not self.checkpoints.can_save_after_a_failure(self.step):
                logging.error("the other processes continue: step %d is not saved", self.step)
                return
            self.save()
            self.checkpoints.wait()
        except InputError as error:
            logging.error("step %d is not saved: %s", self.step, error)

    def _inference_spec(self) -> InferenceSpec:
        """Returns the spec for inference, with a record of the run for model cards and reports."""
        recipe = self.recipe
        stream = recipe.stream
        record = {
            "command": self.command,
            "config": recipe.config.to_dict(),
            "data": recipe.fingerprints,
            "examples": {
                source.task.name: source.size("train")
                for source in recipe.sources
                if "train" in source.splits
            },
            "inferred": {
                source.task.name: dict(source.inferred)
                for source in recipe.sources
                if source.inferred
            },
            "metrics": list(self.log.latest.values()),
            "constants": recipe.constants,
            "details": self._details(),
        }
        return InferenceSpec(
            recipe.encoder,
            tuple(task.uncalibrated() for task in recipe.tasks),  # it was of other parameters
            recipe.tokenizer,
            stream.max_length,
            stream.shape.row_length,
            stream.padding,
            self.step,
            record,
        )

    def _details(self) -> dict[str, dict[str, Any]]:
        """Returns the chance values and class scores of the logged metrics, by task and split."""
        folder = self.workdir / FOLDER
        result: dict[str, dict[str, Any]] = {}
        for (name, split), line in self.log.latest.items():
            source = next((item for item in self.recipe.sources if item.task.name == name), None)
            for full_split in source.evaluation_splits(split).values() if source else ():
                try:
                    details = read_details(folder, name, full_split, line["step"])
                except InputError as error:  # they only inform: training goes on
                    logging.warning("%s", error)
                    continue
                if details:
                    result.setdefault(name, {})[full_split] = details
        return result


def _selecting(value: float | None) -> dict[str, float]:
    """Returns the metrics that select the best checkpoint; none for an undefined value."""
    return {} if value is None or math.isnan(value) else {"best": value}
