"""A run in progress: what its loop and its hooks share."""

import contextlib
import dataclasses

from absl import logging
from etils import epath

from gemma_encoder import distributed
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.distributed import PreemptionSignal
from gemma_encoder.evaluation.evaluator import Evaluation
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.accumulator import MetricsAccumulator, NotFinite
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.failure import report_failure
from gemma_encoder.training.metrics_log import MetricsLog, Progress, read_metrics
from gemma_encoder.training.step import StepMetrics
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.weights.native import InferenceSpec


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The durations of a recipe, in steps.

    Attributes:
        epoch: training examples of all tasks, the only one that is not in steps.
        total: of the whole run.
        warmup: over which the learning rate rises.
        log_every, evaluate_every, checkpoint_every: 0 for only at the end.
    """

    epoch: int
    total: int
    warmup: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Cadence":
        """The durations of a recipe whose `examples_per_step` is measured."""
        epoch = recipe.epoch()
        total = recipe.steps("train_for", epoch)
        if total >= 2**31:
            raise InputError(
                f"train_for={recipe.config.train_for!r} is {total} steps; more than a run can count"
            )
        fields = ("warmup", "log_every", "evaluate_every", "checkpoint_every")
        return cls(epoch, total, *(recipe.steps(field, epoch, total) for field in fields))

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is due."""
        return step == self.total or bool(every and step % every == 0)


@dataclasses.dataclass
class Run:
    """A run in progress. Hooks get it; what they may use is listed first.

    Attributes:
        trainer: holds the state and takes the steps.
        cadence: the run's durations in steps.
        workdir: of the run.
        command: how the run was started.
        log: `metrics.jsonl` and TensorBoard.
        progress: messages for people.
        evaluation: the latest one; None before the first.
        best_metric: the task and the metric by which the best checkpoint is selected.
        resources: closed when the run ends, however it ends; for what a hook holds open.
        stop_reason: why the run ends before its last step; "" while it does not.
        preempted: whether that is for others to need the machine: the run is then incomplete.
        saved_step: of the newest checkpoint, 0 before the first.
        stream: of training batches.
        checkpoints: of the workdir.
        accumulator: metrics since the last line of the log.
        preemption: the signal to stop.
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
        """What is trained, and its config."""
        return self.trainer.recipe

    @property
    def step(self) -> int:
        """Steps taken, that under way included."""
        return self.trainer.step_number

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.cadence.total

    @property
    def metrics(self) -> StepMetrics | None:
        """Metrics, on the host, of the newest step that was waited for: this step's, when due."""
        return self.accumulator.latest

    @property
    def is_over(self) -> bool:
        """Whether no further step is to be taken."""
        return self.step >= self.total or bool(self.stop_reason)

    def request_stop(self, reason: str, *, preempted: bool = False) -> None:
        """Ends the run after this step, with an evaluation and a checkpoint of it.

        Args:
            reason: for people.
            preempted: end now, with a checkpoint alone; the same command resumes. All processes
                must ask for the same.
        """
        if not self.stop_reason:
            self.progress.say(reason)
            self.stop_reason = reason
        self.preempted |= preempted

    @property
    def is_evaluated(self) -> bool:
        """Whether `evaluation` is of the present step."""
        return self.evaluation is not None and self.evaluation.step == self.step

    def best_value(self) -> float | None:
        """The present step's `best_metric`; None where it was not evaluated or has no labels."""
        if not self.is_evaluated:
            return None
        task, metric = self.best_metric
        return self.evaluation.metrics.get(task, {}).get(metric)

    def was_evaluated(self) -> bool:
        """Whether the log holds an evaluation of the present step, by this start or another."""
        lines = read_metrics(self.workdir) if distributed.is_main_process() else []
        split = self.recipe.config.evaluate_split
        return distributed.decided_by_main(
            any(line["step"] == self.step and line["split"] == split for line in lines)
        )

    def advance(self, batch: Batch) -> None:
        """Dispatches a step, then waits for the numbers of the one before it."""
        metrics = self.trainer.step(batch)
        self.settle()
        self._unread = self.step, metrics, batch

    def settle(self) -> None:
        """Waits for the numbers of the newest step.

        Raises:
            InputError: the loss or the gradient is not finite; diagnostics are in the workdir.
        """
        if self._unread is None:
            return
        step, metrics, _ = self._unread
        try:
            loss = self.accumulator.add(step, metrics)
        except NotFinite as error:
            folder = report_failure(self.workdir, self.recipe, self._unread, str(error))
            raise InputError(
                f"{error}; lower optimizer.learning_rate or lengthen warmup. "
                f"What led to it is in {folder}; checkpoints before it are kept"
            ) from error
        self._unread = None
        self.progress.advance(loss)

    def save(self) -> None:
        """Saves a checkpoint of the present step, with its `best_metric` where it was evaluated."""
        value = self.best_value()
        self.saved_step = self.step
        self.checkpoints.save(
            self.trainer.state,
            self._inference_spec(),
            self.stream.state(),
            {} if value is None else {"best": value},
        )

    def rescue(self) -> None:
        """Saves the steps since the last checkpoint, if it can, after a hook has failed."""
        if self.step == self.saved_step:
            return
        try:
            self.settle()  # a state of NaN is not worth keeping
            if not self.checkpoints.can_save_after_a_failure(self.step):
                logging.error("the other processes go on: step %d is not saved", self.step)
                return
            self.save()
            self.checkpoints.wait()
        except InputError as error:
            logging.error("step %d is not saved: %s", self.step, error)

    def _inference_spec(self) -> InferenceSpec:
        """The part of a checkpoint that inference and its readers need."""
        recipe, stream = self.recipe, self.recipe.stream
        record = {
            "command": self.command,
            "config": recipe.config.to_dict(),
            "data": recipe.fingerprints,
            "examples": {
                source.task.name: source.size("train")
                for source in recipe.sources
                if "train" in source.splits
            },
            "metrics": list(self.log.latest.values()),
        }
        return InferenceSpec(
            recipe.encoder,
            recipe.tasks,
            recipe.tokenizer,
            stream.max_length,
            stream.shape.row_length,
            stream.padding,
            self.step,
            record,
        )
