"""The config of a run: each field with its type, default and help line.

These dataclasses are the only definition of the config. `default_config` converts them to the
`ConfigDict` that an experiment's file and the command line modify; `TrainConfig.from_config_dict`
converts that back, and all other code uses the typed config. This module imports neither JAX nor
TensorFlow, so that `--help` and config errors are fast.
"""

import dataclasses
import functools
import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from gemma_encoder import runtime
from gemma_encoder.data.retrieval_options import RetrievalOptions
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.text import TextOptions
from gemma_encoder.inputs import kinds, options
from gemma_encoder.inputs.errors import InputError, described, location, one_line, unknown
from gemma_encoder.inputs.options import option
from gemma_encoder.model.config import (
    MAX_TOKENS,
    LoraConfig,
    PoolingConfig,
    TransformerConfig,
)
from gemma_encoder.training.durations import Duration
from gemma_encoder.training.loss_options import LossOptionsConfig
from gemma_encoder.training.optimizer_config import OptimizerConfig

LENGTHS = ("train_for", "warmup", "log_every", "evaluate_every", "checkpoint_every")
Length = str | int  # text that `durations.Duration` parses, or a number of steps


def changeable(default: Any, text: str) -> Any:
    """Declares an option that may change between two starts of a run."""
    return option(default, text, may_change=True)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Sampling rates of the tasks."""

    mixing: str = option(
        "proportional", '"equal", "proportional" to the number of records, or "temperature"'
    )
    temperature: float = option(
        2.0, 'temperature of mixing="temperature": 1 is proportional, larger is closer to equal'
    )

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise InputError(f"mixture.temperature must be positive, got {self.temperature}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder and its initial weights."""

    size: str = option("tiny", 'model size by name, or "pretrained": the size of the checkpoint')
    pretrained: str = option(
        "", "pretrained Gemma checkpoint to start from: a folder, or a name such as GEMMA2_2B_PT"
    )
    warm_start: str = option(
        "", "fine-tuned workdir to start from: its backbone, pooler and matching heads"
    )
    attention: str = option("bidirectional", 'attention mask: "bidirectional" or "causal"')
    pooling: PoolingConfig = option(
        PoolingConfig(), "pooling of the hidden states of a text into one vector"
    )
    head_hidden_dims: tuple[int, ...] = option(
        (), "widths of the hidden layers of the heads", former="head_hidden"
    )
    attention_dropout: float = option(0.0, "dropout rate of attention probabilities")
    feed_forward_dropout: float = option(0.1, "dropout rate of the output of feed-forward layers")
    compute_dtype: str = option(
        "auto", 'dtype of activations: "bfloat16", "float32", or "auto", the faster one'
    )
    remat: str = option(
        "none", 'recomputation in the backward pass: "none", "full", "dots" or "offload"'
    )
    attention_implementation: str = option(
        "auto", 'attention kernel: "auto", "xla", "splash" (TPU), "cudnn" or "tokamax" (NVIDIA GPU)'
    )
    sparse_terms: int = option(
        256, "sparse heads: weights of a text that predictions hold, the largest ones"
    )
    lora: LoraConfig = option(LoraConfig(), "low-rank adapters, trained instead of the backbone")
    quantization: str = option(
        "none", '"int8": quantization-aware training, for inference in int8; or "none"'
    )
    transformer: Mapping[str, Any] = option(
        {}, "fields of TransformerConfig that override those of the size, e.g. {'num_layers': 2}"
    )

    def __post_init__(self):
        fields = options.field_values(TransformerConfig, self.transformer, "model.transformer")
        object.__setattr__(self, "transformer", fields)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of a batch."""

    rows: int = option(16, "rows of a global batch")
    row_length: int = option(128, "tokens per row, a multiple of 128; shorter rows cost less")
    segments: int = option(12, "maximum number of texts packed into a row; 1 disables packing")
    examples_per_step: int = option(
        0, "constant divisor of the loss; 0: texts in an average batch (a list counts once)"
    )
    padding: str = option("right", 'side of a row that is padded: "right" or "left"')
    micro_batches: int = option(
        1, "gradient accumulation: parts of a batch, processed in turn to save memory"
    )
    readers: int = option(1, "parallel data readers, a multiple of the number of hosts")

    def __post_init__(self):
        options.check_at_least(
            "batch", self, ("rows", "row_length", "segments", "micro_batches", "readers"), 1
        )
        options.check_at_least("batch", self, ("row_length",), 1, below=MAX_TOKENS + 1)


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """The lists of ranking tasks."""

    list_size: int = option(8, "documents per training list")
    negative_ranks: tuple[int, int] = option(
        (1, 1000), "(first, last) rank in the first-stage run from which negatives are sampled"
    )
    run: str = option("", "path of the first-stage run; by default the run beside the data")


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stops a run whose `best_metric` no longer improves."""

    patience: int = option(0, "stop after this many evaluations without improvement; 0: never")
    min_delta: float = option(0.0, "minimum change of the metric that counts as an improvement")

    def __post_init__(self):
        options.check_at_least("early_stopping", self, ("patience", "min_delta"), 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The complete config. Changeable fields may differ between two starts of a run."""

    seed: int = option(0, "random seed of initial weights, data order and dropout")
    tasks: tuple[str, ...] = option(("glue_sst2",), 'names of tasks, or of mixtures such as "glue"')
    mixture: MixtureConfig = option(MixtureConfig(), "sampling rates of the tasks")
    task_weights: Mapping[str, float] = option({}, "loss weight by task name; 1 by default")
    model: ModelConfig = option(ModelConfig(), "the encoder and its initial weights")
    tokenizer: str = option(
        "small", '"small", "gemma2", "gemma3", a SentencePiece file, or "auto": that of the weights'
    )
    max_length: int = option(
        128, "maximum tokens of a text, bos and eos included; longer texts are truncated"
    )
    batch: BatchConfig = option(BatchConfig(), "the shape of a batch")
    ranking: RankingConfig = option(RankingConfig(), "the lists of ranking tasks")
    retrieval: RetrievalOptions = option(RetrievalOptions(), "the lists of retrieval tasks")
    own: OwnOptions = option(OwnOptions(), 'your own files, the task "own"')
    text: TextOptions = option(TextOptions(), 'unlabeled text to pretrain on, the task "text"')
    prepared: str = option(
        "", "folder written by `gemma-encoder prepare`; by default raw data are read"
    )
    max_train_examples: int = option(
        0, "use only the first N training records; 0: all", former="max_train"
    )
    max_eval_examples: int = option(
        0, "use only the first N records of the other splits; 0: all", former="max_eval"
    )
    losses: Mapping[str, str] = option(
        {name: kinds.get(name).default_loss for name in kinds.names()},
        "name of the loss by kind of task",
    )
    loss_options: LossOptionsConfig = option(LossOptionsConfig(), "options by name of the loss")
    optimizer: OptimizerConfig = option(
        OptimizerConfig(), "the optimizer and its learning-rate schedule"
    )
    train_for: Length = option("3 epochs", 'length of training in "steps", "epochs" or "examples"')
    warmup: Length = option("10 percent", "length of the learning-rate warmup")
    log_every: Length = changeable("20 steps", "interval between log lines")
    evaluate_every: Length = changeable(
        "100 percent", "interval between evaluations; the last step is always evaluated"
    )
    checkpoint_every: Length = changeable(
        "100 percent", "interval between checkpoints; the last step is always saved"
    )
    keep_checkpoints: int = changeable(2, "number of newest checkpoints to keep, besides the best")
    best_metric: str = changeable(
        "", 'metric that selects the best checkpoint, as "task/metric"; by default the first'
    )
    early_stopping: EarlyStoppingConfig = changeable(
        EarlyStoppingConfig(), "early stopping by best_metric"
    )
    profile: tuple[int, ...] = changeable((), "(first, last) step to profile")
    evaluate_split: str = option("validation", "split to evaluate on")
    compilation_cache: str = changeable(
        "auto", 'folder to cache compiled programs in; "auto": the user\'s cache; "": none'
    )
    mesh: tuple[int, int, int] = changeable(
        (-1, 1, 1), "sizes of the mesh axes data, fsdp, tensor; -1: all remaining devices"
    )
    modules: tuple[str, ...] = changeable(
        (),
        "modules to import first; they may register custom tasks, poolers, losses, hooks, ...",
    )
    hooks: tuple[str, ...] = changeable((), "names of registered hooks to run")

    def __post_init__(self):
        for field in ("seed", "max_train_examples", "max_eval_examples"):
            if not 0 <= getattr(self, field) < 2**31:
                raise InputError(
                    f"{field} must be at least 0 and below 2^31, got {getattr(self, field)}"
                )
        options.check_at_least("", self, ("keep_checkpoints",), 1)
        for name, weight in self.task_weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"task_weights.{name} must be at least 0, got {weight}")
        for name in self.losses:
            if name not in kinds.names():
                raise unknown("kind in losses:", name, kinds.names())
        for name in LENGTHS:
            Duration.parse(getattr(self, name), name)
        options.check_finite_numbers(dataclasses.asdict(self))

    @classmethod
    def from_config_dict(cls, config: "ConfigDict | TrainConfig") -> "TrainConfig":
        """Returns the typed config, after importing its `modules`, which may register names.

        Raises:
            InputError: a field is unknown, a value has the wrong type, or a module cannot be
                imported.
        """
        values = options.with_current_names(cls, config.to_dict(), warn_of_former_name)
        import_modules(options.convert(tuple[str, ...], values.get("modules", ()), "modules"))
        return options.from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the nested dict that a run stores in config.json."""
        return options.to_mapping(self)


MAY_CHANGE = tuple(
    field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("may_change")
)


@functools.cache  # a config is read several times, the warning once
def warn_of_former_name(former: str, current: str) -> None:
    """Warns that a field was set by its former name, which the next version will reject."""
    logging.warning(
        "config field %s is now %s; the next version will not accept the former name",
        former,
        current,
    )


def default_config() -> ConfigDict:
    """Returns the config with all defaults, for an experiment's file to modify."""
    return ConfigDict(dataclasses.asdict(TrainConfig()))


def config_help(config: TrainConfig | None = None) -> list[str]:
    """Returns a line per field: name, type, value in `config` (by default the default), help."""
    return [str(field) for field in options.field_help(config or TrainConfig())]


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that register tasks, losses, hooks and the like.

    Modules are searched on Python's path, then in the current folder.

    Raises:
        InputError: a module cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            with runtime.without_start_up_notes():
                importlib.import_module(name)
        except InputError:
            raise
        except ModuleNotFoundError as error:
            raise InputError(
                f"modules: {name!r} cannot be imported: {one_line(error)}; install it, or put it "
                "in the current folder or on PYTHONPATH"
            ) from error
        except (Exception, SystemExit) as error:
            raise InputError(
                f"modules: {name!r} cannot be imported ({location(error)}): {described(error)}"
            ) from error
