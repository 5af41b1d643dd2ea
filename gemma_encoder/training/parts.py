"""Builds the parts of a recipe from a config."""

import dataclasses
import functools

import jax

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.prepared import PreparedSource
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model import lora, processor
from gemma_encoder.model.config import AUTO, EncoderConfig, HeadConfig, TransformerConfig
from gemma_encoder.model.heads import check_heads
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.recipe import sizes
from gemma_encoder.training.stored_tasks import StoredTasks
from gemma_encoder.weights import backbone
from gemma_encoder.weights.tensors import Checkpoint


class Parts:
    """Builds the parts that a config describes, each on first access.

    Args:
        config: the typed config.
        dry: access no data, weights or published tokenizer, see `build`.
        stored: the tasks of the checkpoint that is resumed or evaluated, None for a new run.
        platform: where the model computes, see `build`.

    Raises:
        InputError: the config has an unknown name, or its fields contradict each other.
    """

    best_metric: tuple[str, str] = ("", "")
    hooks: tuple[Hook, ...] = ()

    def __init__(
        self,
        config: TrainConfig,
        dry: bool,
        stored: StoredTasks | None = None,
        platform: str | None = None,
    ):
        self.config = config
        self.dry = dry
        self.stored = stored
        self.platform = platform
        self._check()

    def _check(self) -> None:
        """Checks the fields that can be validated without data and weights."""
        config = self.config
        tasks = mixtures.expand_mixtures(config.tasks)
        if not tasks or len(set(map(task_name, tasks))) < len(tasks):
            raise InputError(f"tasks must name at least one task and none twice; got {tasks}")
        if config.model.size not in sizes():
            raise unknown("size", config.model.size, sizes())
        valid_names = {*registry.names(DataOptions.from_config(config)), *map(task_name, tasks)}
        for name in config.task_weights:
            if name not in valid_names:
                raise unknown("task in task_weights", name, valid_names)
        if config.batch.examples_per_step < 0:
            raise InputError(
                "batch.examples_per_step must be positive, or 0 to measure it; "
                f"got {config.batch.examples_per_step}"
            )

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """The tasks with their data, in the config's order."""
        config = self.config
        options = DataOptions.from_config(config, self.stored and self.stored.by_name())
        names = mixtures.expand_mixtures(config.tasks)
        if config.prepared:
            sources = tuple(PreparedSource(name, config.prepared, options) for name in names)
        else:
            sources = tuple(registry.get(name, options) for name in names)
        if not self.dry:
            for source in sources:
                source.check()
        if self.stored is not None:
            self.stored.check([source.task for source in sources])
        return sources

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The opened checkpoint of the initial weights; None for random weights.

        If both are set, `warm_start` takes precedence over `pretrained`.
        """
        path = self.config.model.warm_start or self.config.model.pretrained
        return backbone.open_checkpoint(path) if path and not self.dry else None

    @functools.cached_property
    def transformer(self) -> TransformerConfig:
        """The transformer config of `model.size`, with the overrides of `model.transformer`.

        With a checkpoint, it is the checkpoint's config, which must match the size.
        """
        model = self.config.model
        named = GEMMA_CONFIGS.get(sizes()[model.size])
        expected = named and dataclasses.replace(named, **model.transformer)
        if self.checkpoint is None:
            if expected is None:
                raise InputError(
                    "model.size=pretrained needs model.pretrained, the checkpoint that defines the "
                    "model; set it, or name a size"
                )
            return expected
        stored = self.checkpoint.config(expected)
        transformer = dataclasses.replace(stored, **model.transformer)
        if unequal := backbone.transformer_differences(stored, expected or transformer):
            size = model.size if named else "the model that model.transformer describes"
            raise InputError(
                f"the checkpoint {model.warm_start or model.pretrained} is not {size}: "
                f"{'; '.join(unequal)}; choose model.size=pretrained without model.transformer, "
                "or another checkpoint"
            )
        return transformer

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer by name; "auto" is that of the checkpoint, or of the model's family."""
        name = self.config.tokenizer
        if self.dry:
            return Tokenizer.load("small")
        if name == "auto" and self.checkpoint is not None:
            return backbone.checkpoint_tokenizer(self.checkpoint, self.transformer)
        if name == "auto":
            name = backbone.family(self.transformer)
        tokenizer = Tokenizer.load(name)
        backbone.check_vocabulary(tokenizer, self.transformer)
        return tokenizer

    @functools.cached_property
    def encoder(self) -> EncoderConfig:
        """The encoder config, with one head for all tasks that share it."""
        owners: dict[str, Task] = {}
        for task in (source.task for source in self.sources):
            owner = owners.setdefault(task.head, task)
            if (task.kind, task.classes) != (owner.kind, owner.classes):
                raise InputError(
                    f"tasks {owner.name!r} and {task.name!r} cannot share the head {task.head!r}: "
                    f"{owner.kind} {owner.classes or ''} is not {task.kind} {task.classes or ''}"
                )
        model = self.config.model
        heads = {
            head: HeadConfig(self._head_outputs(owner), owner.kind.head, model.head_hidden_dims)
            for head, owner in owners.items()
        }
        encoder = EncoderConfig(
            transformer=self.transformer,
            heads=heads,
            pooling=model.pooling,
            attention=model.attention,
            attention_dropout=model.attention_dropout,
            feed_forward_dropout=model.feed_forward_dropout,
            compute_dtype=self._compute_dtype(),
            remat=model.remat,
            attention_implementation=model.attention_implementation,
            lora=model.lora,
            quantization=model.quantization,
        )
        check_heads(encoder)
        return encoder

    def _head_outputs(self, task: Task) -> int:
        """Returns the width of a task's head, which the model defines for vectors of texts."""
        if task.kind.head == "sparse":
            return 2 * self.config.model.sparse_terms
        pooling = self.config.model.pooling
        return task.num_outputs or pooling.output_dim(self.transformer.embed_dim)

    def _compute_dtype(self) -> str:
        """Returns the dtype of activations; "auto" is that of the stored run, or the faster one."""
        name = self.config.model.compute_dtype
        if name == AUTO and self.stored is not None:
            return self.stored.spec.encoder.compute_dtype
        return processor.resolve_compute_dtype(name, self.platform or jax.default_backend())

    @functools.cached_property
    def stream(self) -> StreamOptions:
        """The shape of batches, with capacity for lists and vector labels if a task has them."""
        config = self.config
        batch = config.batch
        list_sizes = [size for source in self.sources if (size := self._list_size(source)) > 1]
        list_size = max(list_sizes, default=1)
        blocks = batch.readers * max(batch.micro_batches, 1)
        groups = blocks
        if list_sizes:
            groups *= max(batch.rows * batch.segments // min(list_sizes) // blocks, 1)
        shape = BatchShape(
            batch.rows,
            batch.row_length,
            batch.segments,
            groups,
            list_size,
            max(source.task.target_width for source in self.sources),
        )
        options = StreamOptions(
            shape, config.max_length, batch.readers, config.seed, batch.padding, batch.micro_batches
        )
        if list_size > options.block.rows * options.block.segments:
            raise InputError(
                f"lists of {list_size} texts (ranking.list_size documents, or 1 query and "
                "retrieval.positives + retrieval.negatives documents) do not fit in a block of "
                f"{options.block.rows} rows of {batch.segments} segments (batch.rows / "
                "batch.readers / batch.micro_batches); raise batch.rows or batch.segments, or "
                "lower batch.readers or batch.micro_batches"
            )
        return options

    def _list_size(self, source: Source) -> int:
        """Returns the most texts of a training list of a task, 1 for tasks without lists."""
        if source.task.kind.embeds:
            return self.config.retrieval.list_size
        return self.config.ranking.list_size if source.task.is_list else 1

    @functools.cached_property
    def losses(self) -> LossOptions:
        """The constants of the loss."""
        config = self.config
        shape = self.stream.shape
        return LossOptions(
            config.losses,
            config.task_weights,
            config.batch.examples_per_step or self._examples_per_step(),
            shape.rows * shape.row_length,
            shape.groups // self.stream.micro_batches,
            shape.list_size,
            config.loss_options,
            config.model.pooling.normalize,
            config.retrieval.list_size,
        )

    def _examples_per_step(self) -> int:
        """Returns a guess if data must not be read, else 0 for unknown, as nothing is trained."""
        return self.stream.shape.rows if self.dry else 0

    @functools.cached_property
    def optimizer(self) -> OptimizerConfig:
        """Options of the optimizer; with LoRA, the backbone's own parameters are frozen."""
        options = self.config.optimizer
        if not self.config.model.lora.rank:
            return options
        frozen = rf"backbone/.*(?<!{lora.A}|{lora.B})"
        freeze = f"{options.freeze}|{frozen}" if options.freeze else frozen
        return dataclasses.replace(options, freeze=freeze)
