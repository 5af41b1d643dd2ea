"""What a config means: its fields with their defaults, and the objects that they describe.

A config is a `ConfigDict` made by `default_config()` and changed by an experiment's file and by the command line. A field that is
not named here is an error. Durations are text in the user's unit: "500 steps", "3 epochs", "20000 examples", "10 percent".
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gemma_encoder.data import mixtures, own, registry, text
from gemma_encoder.data.pipeline import CHUNK, MEASURED, PREFETCH, StreamOptions, average_examples
from gemma_encoder.data.prepared import PreparedSource, check_prepared
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.packing import Packer
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model import lora
from gemma_encoder.model.config import (
    GEMMA_CONFIGS,
    SMALL,
    EncoderConfig,
    LoraConfig,
    PoolingConfig,
    TransformerConfig,
)
from gemma_encoder.training.losses import LossOptions
from gemma_encoder.training.optimizer import OptimizerOptions
from gemma_encoder.weights import backbone

SIZES = {"tiny": "gemma3_tiny", "pretrained": None} | {
    name: name for name in GEMMA_CONFIGS
}  # "pretrained": what the checkpoint says
UNITS = ("steps", "epochs", "examples", "percent")

# Fields that may change between two starts of one run: they decide what is seen and where it runs, not what is learnt.
MAY_CHANGE = (
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "best_metric",
    "profile",
    "hooks",
    "early_stopping",
    "mesh",
    "compilation_cache",
)


def default_config() -> ml_collections.ConfigDict:
    """Every field of a config, with the default of each."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.tasks = (
        "glue_sst2",
    )  # tasks, or mixtures by name: "glue", "superglue", "glue_and_msmarco"
    config.mixture = ml_collections.ConfigDict(
        {"mixing": "proportional", "temperature": 2.0}
    )  # "equal", "proportional", "temperature"
    config.task_weights = (
        ml_collections.ConfigDict()
    )  # loss weight by task name; 1 where a task is not named

    config.model = ml_collections.ConfigDict()
    config.model.size = "tiny"  # a name in SIZES
    config.model.pretrained = ""  # what weights.load_backbone reads: a folder, or a name such as GEMMA2_2B_PT; "" for random weights
    config.model.warm_start = ""  # a workdir of this project, one of its checkpoints: backbone, pooler and the heads of the same name and shape
    config.model.attention = "bidirectional"  # or "causal"
    config.model.pooling = ml_collections.ConfigDict(
        {"name": "mean", "k": 1, "probes": 1, "heads": 4, "projection": (), "normalize": False}
    )
    config.model.head_hidden = ()  # widths of the heads' hidden layers
    config.model.attention_dropout = 0.0
    config.model.feed_forward_dropout = 0.1
    config.model.compute_dtype = "bfloat16"  # or "float32"
    config.model.remat = "none"  # "none", "full", "dots", "offload"
    config.model.attention_implementation = (
        "auto"  # or "xla", "splash" (TPU), "cudnn", "tokamax" (NVIDIA GPUs)
    )

    config.model.lora = ml_collections.ConfigDict(
        {"rank": 0, "alpha": 16.0}
    )  # adapters instead of all the backbone; rank 0 for none

    config.tokenizer = "small"  # "small", "gemma2", "gemma3", the path of a SentencePiece model; "auto": what comes with the weights
    config.max_length = 128  # tokens of one text, bos and eos included; what is longer is cut as the task's template says
    config.batch = ml_collections.ConfigDict()
    config.batch.rows = 16
    config.batch.row_length = (
        128  # short rows cost less attention: the smallest multiple of 128 that holds max_length
    )
    config.batch.segments = 12  # most texts that share a row; 1 turns packing off
    config.batch.examples_per_step = 0  # what the loss is divided by, a constant; 0: the texts (a list counts once) that a batch holds on average
    config.batch.padding = "right"  # or "left"
    config.batch.micro_batches = (
        1  # parts of a batch that are worked on one after another, to save memory
    )
    config.batch.readers = 1  # parallel data readers, a multiple of the number of hosts

    config.ranking = ml_collections.ConfigDict(
        {"list_size": 8, "negative_ranks": (1, 1000), "run": ""}
    )  # run: path of the first stage's, by default beside the data
    config.own = ml_collections.ConfigDict(
        own.DEFAULTS
    )  # the user's own files and what their columns mean, see OwnOptions
    config.text = ml_collections.ConfigDict(
        text.DEFAULTS
    )  # unlabelled text to pretrain on, the task "text": see TextOptions
    config.prepared = ""  # folder that `python -m gemma_encoder.prepare` filled for this config; "" to read and tokenise the raw data
    config.max_train = 0  # use only the first so many records of each training split; 0 for all
    config.max_eval = 0  # the same for evaluation
    config.losses = ml_collections.ConfigDict(
        {
            "classification": "softmax_cross_entropy",
            "regression": "mean_squared_error",
            "ranking": "softmax",
            "choice": "softmax",
        }
        | {"language_model": "negative_log_likelihood"}
    )
    config.poly1_epsilon = 1.0

    config.optimizer = ml_collections.ConfigDict(
        dataclasses.asdict(OptimizerOptions(learning_rate=1e-4))
    )
    config.train_for = "3 epochs"
    config.warmup = "10 percent"
    config.log_every = "20 steps"
    config.evaluate_every = "100 percent"  # and always at the end
    config.checkpoint_every = "100 percent"  # and always at the end
    config.keep_checkpoints = 2  # the newest ones; the best one stays too
    config.best_metric = ""  # what the best checkpoint is chosen by, as "task/metric"; "" for the first task's main metric
    config.profile = ()  # (first, last) step of which a profile is written to the workdir
    config.hooks = ()  # names given by training.hooks.register_hook, called in this order
    config.early_stopping = ml_collections.ConfigDict(
        {"patience": 0, "min_delta": 0.0}
    )  # ends after so many evaluations in a row that do not improve best_metric by more than min_delta; 0 for never
    config.evaluate_split = "validation"
    config.compilation_cache = "auto"  # folder of compiled programs, from which a second start is fast; "auto": in the workdir; "" for none
    config.mesh = (
        -1,
        1,
        1,
    )  # sizes of the axes data, fsdp, tensor; -1 for all devices that are left
    return config


def parse_arg(
    arg: str, names: Sequence[str] = (), options: Sequence[str] = ("size",)
) -> tuple[str, dict[str, str], bool]:
    """Reads what follows the colon of `--config=FILE:ARG`, e.g. "sst2,size=gemma2_2b,smoke".

    Args:
        arg: comma-separated: one of `names`, `option=value`, and "smoke", in any order.
        names: valid bare words besides "smoke".
        options: valid options.

    Returns:
        The bare word ("" if none), the options, and whether "smoke" was among them.
    """
    word, values, smoke = "", {}, False
    for part in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = part.partition("=")
        if equals and name in options:
            values[name] = value
        elif equals:
            raise unknown("config option", name, options)
        elif part == "smoke":
            smoke = True
        elif part in names and not word:
            word = part
        else:
            raise unknown(
                "config argument", part, [*names, *(f"{option}=" for option in options), "smoke"]
            )
    return word, values, smoke


def is_small(size: str) -> bool:
    """Whether a size is one of our own, for a machine without an accelerator."""
    return SIZES[size] in SMALL


def set_size(config: ml_collections.ConfigDict, size: str) -> None:
    """Chooses the model's size, with the tokenizer and the compute dtype that go with it.

    Small sizes use the small tokenizer and float32, for a machine without an accelerator; the others use the tokenizer that comes
    with their weights (or their family's) and bfloat16, recompute layers in the backward pass, and are cut up over all devices.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    config.model.size = size
    if is_small(size):
        config.tokenizer, config.model.compute_dtype = "small", "float32"
    else:
        config.tokenizer, config.model.compute_dtype, config.model.remat = (
            "auto",
            "bfloat16",
            "full",
        )
        config.mesh = (1, -1, 1)


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Cuts any recipe down to seconds: a slice of the real data, a few steps, a small batch."""
    config.max_train, config.max_eval, config.train_for, config.log_every = (
        64,
        24,
        "6 steps",
        "2 steps",
    )
    config.max_length = config.batch.row_length = 128
    config.batch.rows, config.batch.segments, config.ranking.list_size = 8, 8, 4
    return config


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, e.g. Duration(3.0, "epochs")."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str | int, field: str) -> "Duration":
        """From "3 epochs" or a bare number of steps; `field` names it in the error."""
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text))
        if not match:
            raise InputError(
                f"{field}={text!r} is no duration; write a number and one of {', '.join(UNITS)}, e.g. '3 epochs'"
            )
        unit = match[2] or "steps"
        unit = unit if unit in UNITS else f"{unit}s"
        if unit not in UNITS:
            raise unknown(f"unit in {field}={text!r}", match[2], UNITS)
        return cls(float(match[1]), unit)

    def steps(self, examples_per_step: int, epoch: int, total: int | None = None) -> int:
        """As a number of steps, at least 1 unless it is zero; `epoch` is in examples, `total` in steps."""
        if not self.value:
            return 0
        if self.unit == "percent":
            if total is None:
                raise InputError("train_for cannot be given in percent")
            return max(
                math.ceil(self.value / 100 * total), 1
            )  # rounded up: 50 percent is due twice, not a third time just before the end
        examples = {"steps": examples_per_step, "epochs": epoch, "examples": 1}[
            self.unit
        ] * self.value
        return max(round(examples / examples_per_step), 1)


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
        optimizer: constants of the optimiser.
    """

    config: ml_collections.ConfigDict
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    encoder: EncoderConfig
    stream: StreamOptions
    losses: LossOptions
    optimizer: OptimizerOptions

    @property
    def tasks(self) -> tuple:
        """The tasks, in the config's order."""
        return tuple(source.task for source in self.sources)

    def rates(self) -> np.ndarray:
        """The share of each task in the training stream."""
        return mixtures.rates(
            self.sources, self.config.mixture.mixing, self.config.mixture.temperature
        )

    def epoch(self) -> int:
        """Training records of all tasks together: one epoch, in examples."""
        return sum(
            source.num_records("train") for source in self.sources if "train" in source.splits
        )

    def epochs(self, steps: int) -> list[int]:
        """For each task, a number of epochs that no reader's share of so many steps exceeds.

        Draws from a mixture are random and rows hold some texts more or fewer: two percent, five standard deviations and what
        waits to be packed or trained on are added to what is drawn on average.
        """
        shape, readers = self.stream.shape, self.stream.readers
        waiting = (Packer.LOOKAHEAD + PREFETCH + 1) * shape.rows // readers * shape.segments + CHUNK
        draws = 1.02 * max(steps, MEASURED) * self.losses.examples_per_step / readers + waiting
        result = []
        for source, rate in zip(self.sources, self.rates(), strict=True):
            mine = draws * rate + 5 * math.sqrt(draws * rate * (1 - rate))
            result.append(
                math.ceil(mine / max(source.num_records("train") // readers, 1)) if rate else 0
            )
        return result

    def steps(self, field: str, epoch: int, total: int | None = None) -> int:
        """A duration field as a number of steps."""
        return Duration.parse(self.config[field], field).steps(
            self.losses.examples_per_step, epoch, total
        )

    def check_rows(self, mesh: Mesh) -> None:
        """Raises InputError where a micro-batch's rows cannot be spread evenly over a mesh."""
        rows, parts, shards = (
            self.stream.shape.rows,
            self.stream.micro_batches,
            mesh.shape["data"] * mesh.shape["fsdp"],
        )
        if rows // parts % shards:
            cut = f" / micro_batches={parts}" if parts > 1 else ""
            raise InputError(
                f"batch.rows={rows}{cut} must be a multiple of data x fsdp = {shards} of the mesh {dict(mesh.shape)}"
            )

    def best_metric(self) -> tuple[str, str]:
        """The task and the metric that the best checkpoint is chosen by; raises InputError where the config names another."""
        evaluated = [
            source
            for source in self.sources
            if source.evaluation_splits(self.config.evaluate_split)
        ]
        names = {}
        for source in evaluated:
            parts = source.evaluation_splits(self.config.evaluate_split)
            names |= {
                f"{source.task.name}/{name}{f'_{part}' if part else ''}": None
                for name in source.task.metrics
                for part in parts
            }
        chosen = self.config.best_metric or next(iter(names))
        if chosen not in names:
            raise unknown("best_metric", chosen, names)
        return tuple(chosen.split("/", 1))

    def measured(self) -> "Recipe":
        """This recipe with `examples_per_step` known: the config's, or the average of the stream's first batches."""
        if self.losses.examples_per_step:
            return self
        average = average_examples(self.sources, self.rates(), self.tokenizer, self.stream)
        return dataclasses.replace(
            self, losses=self.losses._replace(examples_per_step=max(round(average), 1))
        )


def build(config: ml_collections.ConfigDict, *, dry: bool = False) -> Recipe:
    """Checks a config and makes what it describes; raises InputError for whatever cannot be.

    Args:
        config: all its fields.
        dry: touch neither data nor weights nor a published tokenizer: enough to compile the step, not to train. The tokenizer is
            then the small one, the size must be named, and `examples_per_step`, where it would be measured, is a guess.
    """
    tasks = mixtures.expand(config.tasks)
    if not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"tasks must name at least one task and none twice; got {tasks}")
    if config.model.size not in SIZES:
        raise unknown("size", config.model.size, SIZES)
    for name in config.task_weights:
        if name not in registry.names():
            raise unknown("task in task_weights", name, registry.names())
    for field in ("train_for", "warmup", "log_every", "evaluate_every", "checkpoint_every"):
        Duration.parse(config[field], field)
    options = DataOptions.from_config(config)
    sources = tuple(
        PreparedSource(name, config.prepared, options)
        if config.prepared
        else registry.get(name, options)
        for name in tasks
    )
    for source in () if dry else sources:
        source.check()
    _check_splits(sources, config.evaluate_split)
    transformer = _named_size(config) if dry else _transformer(config)
    tokenizer = Tokenizer.load("small") if dry else _tokenizer(config, transformer)
    for source in () if dry else sources:
        source.fit(tokenizer, config.max_length)
    encoder = _encoder(config, sources, transformer)
    lists = any(source.task.is_list for source in sources)
    batch, list_size = config.batch, config.ranking.list_size if lists else 1
    parts = batch.readers * max(batch.micro_batches, 1)
    groups = max(batch.rows * batch.segments // list_size // parts, 1) * parts if lists else parts
    shape = BatchShape(batch.rows, batch.row_length, batch.segments, groups, list_size)
    if batch.examples_per_step < 0:
        raise InputError(
            f"batch.examples_per_step must be positive, or 0 to have it measured; got {batch.examples_per_step}"
        )
    examples = batch.examples_per_step or dry * batch.rows
    losses = LossOptions(
        dict(config.losses),
        dict(config.task_weights),
        examples,
        batch.rows * batch.row_length,
        groups // max(batch.micro_batches, 1),
        list_size,
        config.poly1_epsilon,
    )
    for source in sources:
        losses.function(source.task.kind)
        if source.task.kind == "ranking":
            ranking.check_names(source.task.metrics)
    stream = StreamOptions(
        shape, config.max_length, batch.readers, config.seed, batch.padding, batch.micro_batches
    )
    if config.prepared:
        check_prepared(sources, tokenizer, stream)
    return Recipe(
        config=config,
        sources=sources,
        tokenizer=tokenizer,
        encoder=encoder,
        stream=stream,
        losses=losses,
        optimizer=_optimizer(config),
    )


def _named_size(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The transformer of the chosen size."""
    name = SIZES[config.model.size]
    if name is None:
        raise InputError(
            "model.size=pretrained needs model.pretrained, the checkpoint that says what the model is; else name a size"
        )
    return GEMMA_CONFIGS[name]


def _transformer(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The transformer of the chosen size; with pretrained weights, exactly theirs, which must be of that size."""
    size, path = config.model.size, config.model.pretrained or config.model.warm_start
    if not path:
        return _named_size(config)
    known = _named_size(config) if SIZES[size] else None
    transformer = backbone.open_checkpoint(path).config(known)
    if known is not None and (found := backbone.differences(transformer, known)):
        raise InputError(
            f"the checkpoint {path} is not {size}: {'; '.join(found)}; choose model.size=pretrained, or another checkpoint"
        )
    return transformer


def _tokenizer(config: ml_collections.ConfigDict, transformer: TransformerConfig) -> Tokenizer:
    source = config.model.pretrained or config.model.warm_start
    if config.tokenizer == "auto" and source:
        return backbone.load_tokenizer(source, transformer)
    tokenizer = Tokenizer.load(
        backbone.family(transformer) if config.tokenizer == "auto" else config.tokenizer
    )
    backbone.check_vocabulary(tokenizer, transformer)
    return tokenizer


def _check_splits(sources: Sequence[Source], evaluate_split: str) -> None:
    """Raises InputError where no task can be evaluated, and says once which tasks are not trained on, or not evaluated."""
    if not any(source.evaluation_splits(evaluate_split) for source in sources):
        raise unknown(
            "evaluate_split",
            evaluate_split,
            {split for source in sources for split in source.splits},
        )
    for source in sources:
        if "train" not in source.splits:
            logging.warning(
                "%s has no train split and is only evaluated, by the head %s",
                source.task.name,
                source.task.head,
            )
        if not source.evaluation_splits(evaluate_split):
            logging.warning(
                "%s has no %s split and is not evaluated; its splits, for --config.evaluate_split: %s",
                source.task.name,
                evaluate_split,
                ", ".join(source.splits),
            )


def _encoder(
    config: ml_collections.ConfigDict, sources: Sequence[Source], transformer: TransformerConfig
) -> EncoderConfig:
    owners: dict[str, Task] = {}
    for source in sources:
        task, owner = source.task, owners.setdefault(source.task.head, source.task)
        if (task.kind, task.classes) != (owner.kind, owner.classes):
            raise InputError(
                f"tasks {owner.name!r} and {task.name!r} cannot share the head {task.head!r}: "
                f"{owner.kind} {owner.classes or ''} is not {task.kind} {task.classes or ''}"
            )
    heads = {head: owner.num_outputs for head, owner in owners.items()}
    model = config.model
    return EncoderConfig(
        transformer=transformer,
        heads=heads,
        language_heads=tuple(
            head for head, owner in owners.items() if owner.kind == "language_model"
        ),
        pooling=PoolingConfig(**model.pooling),
        head_hidden=tuple(model.head_hidden),
        attention=model.attention,
        attention_dropout=model.attention_dropout,
        feed_forward_dropout=model.feed_forward_dropout,
        compute_dtype=model.compute_dtype,
        remat=model.remat,
        attention_implementation=model.attention_implementation,
        lora=LoraConfig(**model.lora),
    )


def _optimizer(config: ml_collections.ConfigDict) -> OptimizerOptions:
    """The optimiser's options; with adapters, the backbone's own parameters are frozen."""
    options = OptimizerOptions(**config.optimizer)
    if not config.model.lora.rank:
        return options
    frozen = rf"backbone/.*(?<!{lora.A}|{lora.B})"
    return dataclasses.replace(
        options, freeze=f"{options.freeze}|{frozen}" if options.freeze else frozen
    )


def differences(stored: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configs (as nested dicts) differ, except those that may change, as "field: stored -> now"."""
    found = []
    for name in sorted({*stored, *now}):
        if not prefix and name in MAY_CHANGE:
            continue
        before, after = stored.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return found
