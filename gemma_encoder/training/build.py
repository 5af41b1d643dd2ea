"""From a config to the objects that it describes, checked: sources, tokenizer, encoder, options."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_encoder.data import mixtures
from gemma_encoder.data.prepared import check_prepared
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.evaluation import metrics
from gemma_encoder.evaluation.evaluator import Evaluator
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.durations import Duration
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.parts import Parts
from gemma_encoder.training.training_parts import TrainingParts
from gemma_encoder.weights.tensors import Checkpoint


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The objects that a config describes, checked.

    Attributes:
        config: the config itself.
        sources: the tasks with their data, in the config's order.
        tokenizer: text to ids.
        encoder: the model.
        stream: shapes and seeds of the batches.
        losses: constants of the loss.
        optimizer: constants of the optimizer.
        checkpoint: the opened checkpoint whose weights training starts from; None for random ones.
        best_metric: the task and the metric that the best checkpoint is chosen by.
        hooks: those that the config names.
    """

    config: TrainConfig
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    encoder: EncoderConfig
    stream: StreamOptions
    losses: LossOptions
    optimizer: OptimizerConfig
    checkpoint: Checkpoint | None = None
    best_metric: tuple[str, str] = ("", "")
    hooks: tuple[Hook, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the config's order."""
        return tuple(source.task for source in self.sources)

    def rates(self) -> np.ndarray:
        """The share of each task in the training stream."""
        mixture = self.config.mixture
        return mixtures.rates(self.sources, mixture.mixing, mixture.temperature)

    def epoch(self) -> int:
        """Training records of all tasks together: one epoch, in examples."""
        trained = [source for source in self.sources if "train" in source.splits]
        return sum(source.size("train") for source in trained)

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict[str, list[list[str]]]]:
        """By task and split that is trained or evaluated on, (file, fingerprint) in order."""
        result = {}
        for source in self.sources:
            splits = {"train"}.intersection(source.splits)
            splits |= set(source.evaluation_splits(self.config.evaluate_split).values())
            result[source.task.name] = {
                split: [list(pair) for pair in source.fingerprints(split)]
                for split in sorted(splits)
            }
        return result

    def steps(self, field: str, epoch: int, total: int | None = None) -> int:
        """A duration field of the config as a number of steps."""
        return Duration.parse(getattr(self.config, field), field).steps(
            self.losses.examples_per_step, epoch, total
        )

    def evaluator(
        self,
        mesh: Mesh,
        workdir: epath.Path | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluator:
        """Returns what evaluates all tasks on `evaluate_split`; arguments as for `Evaluator`."""
        return Evaluator(
            self.sources,
            self.config.evaluate_split,
            self.encoder,
            self.tokenizer,
            self.stream,
            mesh,
            workdir,
            stop,
        )

    def check_rows(self, mesh: Mesh) -> None:
        """Raises InputError where a micro-batch's rows cannot be spread evenly over a mesh."""
        rows, parts = self.stream.shape.rows, self.stream.micro_batches
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if rows // parts % shards:
            cut = f" / micro_batches={parts}" if parts > 1 else ""
            raise InputError(
                f"batch.rows={rows}{cut} must be a multiple of data x fsdp = {shards} "
                f"of the mesh {dict(mesh.shape)}"
            )


def build(
    config: ConfigDict | TrainConfig, *, for_training: bool = False, dry: bool = False
) -> Recipe:
    """Checks a config and makes what it describes; raises InputError for whatever cannot be.

    Args:
        config: all its fields.
        for_training: make also what training alone needs: `examples_per_step` is measured where it
            is not given, `best_metric` and the hooks are looked up.
        dry: touch neither data nor weights nor a published tokenizer: enough to compile the step,
            not to train. The tokenizer is then the small one, the size must be named, and
            `examples_per_step`, where it would be measured, is a guess.
    """
    make_parts = TrainingParts if for_training else Parts
    parts = make_parts(TrainConfig.from_config_dict(config), dry)
    _check_splits(parts.sources, parts.config.evaluate_split)
    for source in () if dry else parts.sources:
        source.fit(parts.tokenizer, parts.config.max_length)
    recipe = Recipe(
        parts.config,
        parts.sources,
        parts.tokenizer,
        parts.encoder,
        parts.stream,
        parts.losses,
        parts.optimizer,
        parts.checkpoint,
        parts.best_metric,
        parts.hooks,
    )
    recipe.losses.check(recipe.tasks)
    for task in recipe.tasks:
        metrics.check_metrics(task.kind, task.metrics)
    if recipe.config.prepared:
        check_prepared(recipe.sources, recipe.tokenizer, recipe.config.max_length)
    return recipe


def _check_splits(sources: Sequence[Source], split: str) -> None:
    """Raises InputError where no task has the split; says which are not trained or evaluated."""
    if not any(source.evaluation_splits(split) for source in sources):
        raise unknown("evaluate_split", split, {name for one in sources for name in one.splits})
    for source in sources:
        task = source.task
        if "train" not in source.splits:
            logging.warning(
                "%s has no train split and is only evaluated, by the head %s", task.name, task.head
            )
        if not source.evaluation_splits(split):
            logging.warning(
                "%s has no %s split and is not evaluated; its splits, for "
                "--config.evaluate_split: %s",
                task.name,
                split,
                ", ".join(source.splits),
            )
