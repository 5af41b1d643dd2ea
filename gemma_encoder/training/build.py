"""Builds and validates what a config describes: sources, tokenizer, encoder, options."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_encoder.data import mixtures
from gemma_encoder.data.prepared import check_prepared
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.evaluation.evaluator import Evaluator
from gemma_encoder.evaluation.requirements import check_split_metrics, check_task_metrics
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import check_template_length
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.training.baselines import best_constants, head_constants
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.durations import Duration
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.parts import Parts
from gemma_encoder.training.retrieval_checks import check_retrieval
from gemma_encoder.training.stored_tasks import StoredTasks
from gemma_encoder.training.training_parts import TrainingParts
from gemma_encoder.weights.tensors import Checkpoint


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The validated objects that a config describes.

    Attributes:
        config: the typed config.
        sources: the tasks with their data, in the config's order.
        tokenizer: the tokenizer.
        encoder: the model config.
        stream: shapes and seeds of the batches.
        losses: constants of the loss.
        optimizer: options of the optimizer.
        checkpoint: the opened checkpoint of the initial weights; None for random weights.
        best_metric: (task, metric) that selects the best checkpoint.
        hooks: the hooks that the config names.
        unlabeled: names of the tasks whose evaluation splits have no labels.
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
    unlabeled: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks in the config's order."""
        return tuple(source.task for source in self.sources)

    def rates(self) -> np.ndarray:
        """Returns the sampling rate of each task in the training stream."""
        mixture = self.config.mixture
        return mixtures.rates(self.sources, mixture.mixing, mixture.temperature)

    def epoch(self) -> int:
        """Returns the examples of one epoch: the training records of all tasks."""
        return sum(source.size("train") for source in self.sources if "train" in source.splits)

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict[str, list[list[str]]]]:
        """The [file, fingerprint] pairs of each task's split that is trained or evaluated on."""
        result = {}
        for source in self.sources:
            splits = {"train"}.intersection(source.splits)
            splits |= set(source.evaluation_splits(self.config.evaluate_split).values())
            result[source.task.name] = {
                split: [list(pair) for pair in source.fingerprints(split)]
                for split in sorted(splits)
            }
        return result

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The constant output that fits the training labels best, of each task that has one."""
        return best_constants(self.sources)

    def head_constants(self) -> dict[str, float]:
        """Returns the initial value of parameters of heads that start at a constant score."""
        return head_constants(self.tasks, self.rates(), self.constants, self.encoder)

    def steps(self, field: str, epoch: int, total: int | None = None) -> int:
        """Returns a duration field of the config in steps; arguments as in `Duration.steps`."""
        duration = Duration.parse(getattr(self.config, field), field)
        return duration.steps(self.losses.examples_per_step, epoch, total)

    def evaluator(
        self,
        mesh: Mesh,
        workdir: epath.Path | None = None,
        stop: Callable[[], bool] = lambda: False,
        constants: Mapping[str, Any] | None = None,
    ) -> Evaluator:
        """Returns the evaluator of all tasks on `evaluate_split`; arguments as in `Evaluator`.

        `constants` are by default those of the config's training data.
        """
        return Evaluator(
            self.sources,
            self.config.evaluate_split,
            self.encoder,
            self.tokenizer,
            self.stream,
            mesh,
            workdir,
            stop,
            self.constants if constants is None else constants,
        )

    def check_losses(self) -> None:
        """Raises InputError if a loss, or its options, do not fit a task, its data or the model."""
        self.losses.check(self.tasks)
        check_retrieval(self.sources, self.losses, self.encoder)

    def check_rows(self, mesh: Mesh) -> None:
        """Raises InputError if the rows of a micro-batch do not shard evenly over the mesh."""
        rows = self.stream.shape.rows
        micro_batches = self.stream.micro_batches
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if rows // micro_batches % shards:
            divisor = f" / micro_batches={micro_batches}" if micro_batches > 1 else ""
            raise InputError(
                f"batch.rows={rows}{divisor} must be a multiple of data x fsdp = {shards} "
                f"of the mesh {dict(mesh.shape)}"
            )


def build(
    config: ConfigDict | TrainConfig,
    *,
    for_training: bool = False,
    dry: bool = False,
    stored: StoredTasks | None = None,
    evaluates: bool = True,
    platform: str | None = None,
) -> Recipe:
    """Validates a config and builds what it describes.

    Args:
        config: the complete config.
        for_training: also build what only training needs: measure `examples_per_step` if it is
            not set, and look up `best_metric` and the hooks.
        dry: access no data, weights or published tokenizer. The recipe is enough to compile the
            step, but not to train: the tokenizer is the small one, the size must be named, and
            an `examples_per_step` that would be measured is a guess.
        stored: the tasks of the checkpoint that is resumed or evaluated.
        evaluates: also check that the labels of `evaluate_split` suffice for the tasks' metrics.
        platform: "cpu", "gpu" or "tpu", where the model computes; by default JAX's, which is only
            then looked up if `model.compute_dtype` is "auto".

    Raises:
        InputError: the config is invalid, contradicts the checkpoint, or its data or weights cannot
            be read.
    """
    parts_class = TrainingParts if for_training else Parts
    parts = parts_class(TrainConfig.from_config_dict(config), dry, stored, platform)
    for source in parts.sources:
        check_task_metrics(source.task)
    _check_splits(parts.sources, parts.config.evaluate_split)
    unlabeled: tuple[str, ...] = ()
    if not dry:
        _fit_sources(parts)
        _ = parts.encoder  # tasks that cannot share a head are refused before labels are read
        unlabeled = _check_labels(parts) if evaluates else ()
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
        unlabeled,
    )
    if recipe.config.best_metric and recipe.best_metric[0] in unlabeled:
        raise InputError(
            f"best_metric={recipe.config.best_metric!r} needs labels, which the split "
            f"{recipe.config.evaluate_split!r} does not have; leave it out, or evaluate another "
            "split"
        )
    recipe.check_losses()
    if recipe.config.prepared:
        check_prepared(recipe.sources, recipe.tokenizer, recipe.config.max_length)
    return recipe


def _fit_sources(parts: Parts) -> None:
    """Prepares the sources for reading, and checks that templates leave room for a text."""
    max_length = parts.config.max_length
    for source in parts.sources:
        source.fit(parts.tokenizer, max_length)
        task = source.task
        for template in (task.template, *(template for _, template in task.role_templates)):
            check_template_length(parts.tokenizer, template, max_length, task.name)


def _check_labels(parts: Parts) -> tuple[str, ...]:
    """Checks metrics against labels; returns the tasks whose evaluation splits have no labels."""
    unlabeled = []
    for source in parts.sources:
        splits = source.evaluation_splits(parts.config.evaluate_split).values()
        labeled = [check_split_metrics(source, split) for split in splits]
        if not all(labeled):
            unlabeled.append(source.task.name)
    return tuple(unlabeled)


def _check_splits(sources: Sequence[Source], split: str) -> None:
    """Raises InputError if no task has the split; warns of tasks not trained or not evaluated."""
    if not any(source.evaluation_splits(split) for source in sources):
        splits = {name for source in sources for name in source.splits}
        raise unknown("evaluate_split", split, splits)
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
