"""The parts of a recipe, each made of the config and of the parts before it."""

import dataclasses
import functools

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.prepared import PreparedSource
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model import lora
from gemma_encoder.model.config import EncoderConfig, HeadConfig, TransformerConfig
from gemma_encoder.model.heads import check_heads
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.hooks import Hook
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.recipe import sizes
from gemma_encoder.weights import backbone
from gemma_encoder.weights.tensors import Checkpoint


class Parts:
    """Makes the parts that a config describes, each when it is first asked for.

    Args:
        config: the typed config.
        dry: touch neither data nor weights nor a published tokenizer, see `build`.

    Raises:
        InputError: the config names what there is not, or its fields contradict each other.
    """

    best_metric: tuple[str, str] = ("", "")
    hooks: tuple[Hook, ...] = ()

    def __init__(self, config: TrainConfig, dry: bool):
        self.config, self.dry = config, dry
        self._check()

    def _check(self) -> None:
        """Refuses what needs neither data nor weights to be seen."""
        config, tasks = self.config, mixtures.expand_mixtures(self.config.tasks)
        if not tasks or len(set(map(task_name, tasks))) < len(tasks):
            raise InputError(f"tasks must name at least one task and none twice; got {tasks}")
        if config.model.size not in sizes():
            raise unknown("size", config.model.size, sizes())
        names = {*registry.names(DataOptions.from_config(config)), *map(task_name, tasks)}
        for name in config.task_weights:
            if name not in names:
                raise unknown("task in task_weights", name, names)
        if config.batch.examples_per_step < 0:
            raise InputError(
                "batch.examples_per_step must be positive, or 0 to have it measured; "
                f"got {config.batch.examples_per_step}"
            )

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """The tasks with their data, in the config's order."""
        config, options = self.config, DataOptions.from_config(self.config)
        sources = tuple(
            PreparedSource(name, config.prepared, options)
            if config.prepared
            else registry.get(name, options)
            for name in mixtures.expand_mixtures(config.tasks)
        )
        for source in () if self.dry else sources:
            source.check()
        return sources

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The opened checkpoint that training starts from, None where weights are random.

        Where both are named, `warm_start` comes before `pretrained`.
        """
        path = self.config.model.warm_start or self.config.model.pretrained
        return backbone.open_checkpoint(path) if path and not self.dry else None

    @functools.cached_property
    def transformer(self) -> TransformerConfig:
        """The transformer of the size, changed as `model.transformer` says.

        With weights it is exactly theirs, and must be of that size.
        """
        model = self.config.model
        named = GEMMA_CONFIGS.get(sizes()[model.size])
        expected = named and dataclasses.replace(named, **model.transformer)
        if self.checkpoint is None:
            if expected is None:
                raise InputError(
                    "model.size=pretrained needs model.pretrained, the checkpoint that says what "
                    "the model is; else name a size"
                )
            return expected
        stored = self.checkpoint.config(expected)
        transformer = dataclasses.replace(stored, **model.transformer)
        if unequal := backbone.transformer_differences(stored, expected or transformer):
            size = model.size if named else "what model.transformer says"
            raise InputError(
                f"the checkpoint {model.warm_start or model.pretrained} is not {size}: "
                f"{'; '.join(unequal)}; choose model.size=pretrained without model.transformer, "
                "or another checkpoint"
            )
        return transformer

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer by name; "auto" is the one of the weights, or of the model's family."""
        name = self.config.tokenizer
        if self.dry:
            return Tokenizer.load("small")
        if name == "auto" and self.checkpoint is not None:
            return backbone.checkpoint_tokenizer(self.checkpoint, self.transformer)
        tokenizer = Tokenizer.load(backbone.family(self.transformer) if name == "auto" else name)
        backbone.check_vocabulary(tokenizer, self.transformer)
        return tokenizer

    @functools.cached_property
    def encoder(self) -> EncoderConfig:
        """The encoder with a head for each task, or for several that share one."""
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
            head: HeadConfig(owner.num_outputs, owner.kind.head, model.head_hidden_dims)
            for head, owner in owners.items()
        }
        encoder = EncoderConfig(
            transformer=self.transformer,
            heads=heads,
            pooling=model.pooling,
            attention=model.attention,
            attention_dropout=model.attention_dropout,
            feed_forward_dropout=model.feed_forward_dropout,
            compute_dtype=model.compute_dtype,
            remat=model.remat,
            attention_implementation=model.attention_implementation,
            lora=model.lora,
        )
        check_heads(encoder)
        return encoder

    @functools.cached_property
    def stream(self) -> StreamOptions:
        """The shape of batches: room for lists and vector labels where a task has them."""
        config, batch = self.config, self.config.batch
        lists = any(source.task.is_list for source in self.sources)
        targets = max(source.task.target_width for source in self.sources)
        size = config.ranking.list_size if lists else 1
        parts = batch.readers * max(batch.micro_batches, 1)
        groups = max(batch.rows * batch.segments // size // parts, 1) * parts if lists else parts
        shape = BatchShape(batch.rows, batch.row_length, batch.segments, groups, size, targets)
        return StreamOptions(
            shape, config.max_length, batch.readers, config.seed, batch.padding, batch.micro_batches
        )

    @functools.cached_property
    def losses(self) -> LossOptions:
        """The constants of the loss."""
        config, shape = self.config, self.stream.shape
        return LossOptions(
            config.losses,
            config.task_weights,
            config.batch.examples_per_step or self._examples_per_step(),
            shape.rows * shape.row_length,
            shape.groups // self.stream.micro_batches,
            shape.list_size,
            config.loss_options,
        )

    def _examples_per_step(self) -> int:
        """A guess where no data may be touched; 0, for unknown, where nothing is trained."""
        return self.stream.shape.rows if self.dry else 0

    @functools.cached_property
    def optimizer(self) -> OptimizerConfig:
        """The options of the optimizer; with adapters, the backbone's own parameters are frozen."""
        options = self.config.optimizer
        if not self.config.model.lora.rank:
            return options
        frozen = rf"backbone/.*(?<!{lora.A}|{lora.B})"
        return dataclasses.replace(
            options, freeze=f"{options.freeze}|{frozen}" if options.freeze else frozen
        )
