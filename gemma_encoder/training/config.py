"""The config of a run: its fields, with the type, the default and a line of help of each.

These dataclasses are the one definition. `default_config` makes of them the `ConfigDict` that an
experiment's file and the command line change; `TrainConfig.from_config_dict` reads that back, and
all code behind it works on the typed config. Importing this module loads neither JAX nor
TensorFlow, so that help and refusals are fast.
"""

import dataclasses
import importlib
import math
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from gemma_encoder import runtime
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.text import TextOptions
from gemma_encoder.inputs import kinds, options
from gemma_encoder.inputs.descriptions import former_names
from gemma_encoder.inputs.errors import InputError, described, location, one_line, unknown
from gemma_encoder.inputs.options import option
from gemma_encoder.model.config import LoraConfig, PoolingConfig, TransformerConfig
from gemma_encoder.training.durations import Duration
from gemma_encoder.training.loss_options import LossOptionsConfig
from gemma_encoder.training.optimizer_config import OptimizerConfig

LENGTHS = ("train_for", "warmup", "log_every", "evaluate_every", "checkpoint_every")
Length = str | int  # of training: text as `durations.Duration` reads it, or a number of steps


def changeable(default: Any, text: str) -> Any:
    """An option that may change between two starts of one run."""
    return option(default, text, may_change=True)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """How often each task is drawn."""

    mixing: str = option("proportional", '"equal", "proportional" to records, or "temperature"')
    temperature: float = option(2.0, "of temperature mixing: 1 is proportional, larger more equal")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder, and the weights that it starts from."""

    size: str = option("tiny", 'a size by name, or "pretrained": what the checkpoint says')
    pretrained: str = option("", "checkpoint to start from: a folder, or a name as GEMMA2_2B_PT")
    warm_start: str = option("", "workdir to start from: backbone, pooler and the heads that fit")
    attention: str = option("bidirectional", 'the mask: "bidirectional" or "causal"')
    pooling: PoolingConfig = option(PoolingConfig(), "how the states of a text become one vector")
    head_hidden_dims: tuple[int, ...] = option(
        (), "widths of the hidden layers of the heads", former="head_hidden"
    )
    attention_dropout: float = option(0.0, "dropout on attention probabilities")
    feed_forward_dropout: float = option(0.1, "dropout on the output of feed-forward layers")
    compute_dtype: str = option("bfloat16", 'of activations: "bfloat16" or "float32"')
    remat: str = option("none", 'recomputed in backward: "none", "full", "dots" or "offload"')
    attention_implementation: str = option(
        "auto", '"auto", "xla", "splash" (TPU), "cudnn" or "tokamax" (NVIDIA GPUs)'
    )
    lora: LoraConfig = option(LoraConfig(), "low-rank adapters instead of all the backbone")
    transformer: Mapping[str, Any] = option(
        {}, "fields of TransformerConfig that replace those of the size, e.g. {'num_layers': 2}"
    )

    def __post_init__(self):
        fields = options.field_values(TransformerConfig, self.transformer, "model.transformer")
        object.__setattr__(self, "transformer", fields)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of a batch."""

    rows: int = option(16, "rows of a global batch")
    row_length: int = option(128, "tokens of a row, a multiple of 128; short rows cost less")
    segments: int = option(12, "most texts that share a row; 1 turns packing off")
    examples_per_step: int = option(
        0, "constant divisor of the loss; 0: the texts (a list counts once) of an average batch"
    )
    padding: str = option("right", 'the side of a row that is padded: "right" or "left"')
    micro_batches: int = option(1, "parts of a batch that are worked on in turn, to save memory")
    readers: int = option(1, "parallel data readers, a multiple of the number of hosts")


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """The lists of ranking tasks."""

    list_size: int = option(8, "documents of a training list")
    negative_ranks: tuple[int, int] = option(
        (1, 1000), "(first, last) ranks of the first stage from which negatives are sampled"
    )
    run: str = option("", "path of the first stage's run; by default beside the data")


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stops a run whose `best_metric` no longer improves."""

    patience: int = option(0, "evaluations without improvement after which to stop; 0 for never")
    min_delta: float = option(0.0, "least change of the metric that counts as improvement")

    def __post_init__(self):
        for field in ("patience", "min_delta"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(
                    f"early_stopping.{field} must be at least 0, got {getattr(self, field)}"
                )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole config. Changeable fields may differ between two starts of one run."""

    seed: int = option(0, "of random weights, the order of the data, and dropout")
    tasks: tuple[str, ...] = option(("glue_sst2",), 'tasks, or mixtures as "glue", by name')
    mixture: MixtureConfig = option(MixtureConfig(), "how often each task is drawn")
    task_weights: Mapping[str, float] = option({}, "loss weight by task; 1 where none is named")
    model: ModelConfig = option(ModelConfig(), "the encoder and the weights that it starts from")
    tokenizer: str = option(
        "small", '"small", "gemma2", "gemma3", a SentencePiece file, "auto": that of the weights'
    )
    max_length: int = option(128, "tokens of a text, bos and eos included; longer texts are cut")
    batch: BatchConfig = option(BatchConfig(), "the shape of a batch")
    ranking: RankingConfig = option(RankingConfig(), "the lists of ranking tasks")
    own: OwnOptions = option(OwnOptions(), 'your own files, the task "own"')
    text: TextOptions = option(TextOptions(), 'unlabeled text to pretrain on, the task "text"')
    prepared: str = option("", "folder that `gemma-encoder prepare` filled; by default raw data")
    max_train_examples: int = option(
        0, "use only the first so many training records; 0 for all", former="max_train"
    )
    max_eval_examples: int = option(
        0, "use only the first so many records of other splits; 0 for all", former="max_eval"
    )
    losses: Mapping[str, str] = option(
        {name: kinds.get(name).default_loss for name in kinds.names()},
        "the loss of each kind of task",
    )
    loss_options: LossOptionsConfig = option(LossOptionsConfig(), "options by the loss's name")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer and its schedule")
    train_for: Length = option("3 epochs", 'length of training, in "steps", "epochs", "examples"')
    warmup: Length = option("10 percent", "part of it in which the learning rate rises")
    log_every: Length = changeable("20 steps", "how often to log")
    evaluate_every: Length = changeable("100 percent", "how often to evaluate; also at the end")
    checkpoint_every: Length = changeable("100 percent", "how often to save; also at the end")
    keep_checkpoints: int = changeable(2, "newest checkpoints to keep, beside the best one")
    best_metric: str = changeable("", 'what tells the best, as "task/metric"; by default the first')
    early_stopping: EarlyStoppingConfig = changeable(EarlyStoppingConfig(), "stop by best_metric")
    profile: tuple[int, ...] = changeable((), "(first, last) step to profile")
    evaluate_split: str = option("validation", "the split to evaluate on")
    compilation_cache: str = changeable(
        "auto", 'folder of compiled programs; "auto": the user\'s cache; "": none'
    )
    mesh: tuple[int, int, int] = changeable(
        (-1, 1, 1), "sizes of the axes data, fsdp, tensor; -1: devices left over"
    )
    modules: tuple[str, ...] = changeable(
        (),
        "modules to import first; they may register tasks, poolers, losses, hooks … of your own",
    )
    hooks: tuple[str, ...] = changeable((), "registered hooks to run, by name")

    def __post_init__(self):
        for field in ("seed", "max_train_examples", "max_eval_examples"):
            if not 0 <= getattr(self, field) < 2**31:
                raise InputError(
                    f"{field} must be at least 0 and below 2^31, got {getattr(self, field)}"
                )
        for name, weight in self.task_weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"task_weights.{name} must be at least 0, got {weight}")
        for name in self.losses:
            if name not in kinds.names():
                raise unknown("kind in losses:", name, kinds.names())
        for name in LENGTHS:
            Duration.parse(getattr(self, name), name)

    @classmethod
    def from_config_dict(cls, config: "ConfigDict | TrainConfig") -> "TrainConfig":
        """The typed config, after the import of its `modules`, so that names they register hold.

        Raises:
            InputError: an unknown field, a value of another type, a module that cannot be imported.
        """
        values = options.with_current_names(cls, config.to_dict(), warn_of_former_name)
        import_modules(options.convert(tuple[str, ...], values.get("modules", ()), "modules"))
        return options.from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready nested dict that a run keeps in config.json."""
        return options.to_mapping(self)


MAY_CHANGE = tuple(
    field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("may_change")
)


def warn_of_former_name(former: str, current: str) -> None:
    """Logs that a field was given under its former name, which the next version refuses."""
    logging.warning(
        "config field %s is now %s; the former name is accepted by this version only",
        former,
        current,
    )


def _accepting_former_names(cls: type) -> type[ConfigDict]:
    """The class of ConfigDicts whose fields can also be set and read by their former names."""
    former = former_names(cls)

    class Group(ConfigDict):
        def __setitem__(self, key: str, value: Any) -> None:
            if key in former:
                warn_of_former_name(key, former[key])
            super().__setitem__(former.get(key, key), value)

        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(former.get(key, key))

    return Group if former else ConfigDict


GROUPS = {
    cls: _accepting_former_names(cls)
    for cls in (TrainConfig, *typing.get_type_hints(TrainConfig).values())
    if dataclasses.is_dataclass(cls)
}


def default_config() -> ConfigDict:
    """Every field of a config with its default, to be changed by an experiment's file."""
    return _config_dict(TrainConfig())


def _config_dict(config: Any) -> ConfigDict:
    """The fields of a dataclass; groups of fields become ConfigDicts of their own."""
    result = GROUPS.get(type(config), ConfigDict)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        result[field.name] = _config_dict(value) if dataclasses.is_dataclass(value) else value
    return result


def config_help(config: TrainConfig | None = None) -> list[str]:
    """A line for each field: name, type, value in `config` (by default the default) and help."""
    return [str(field) for field in options.field_help(config or TrainConfig())]


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that register things by name; raises InputError where one cannot be.

    They are looked for where Python looks, and then in the current folder.
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
                f"modules: {name!r} cannot be imported: {one_line(error)}; it must be installed, "
                "in the current folder, or in one that PYTHONPATH names"
            ) from error
        except (Exception, SystemExit) as error:
            raise InputError(
                f"modules: {name!r} cannot be imported ({location(error)}): {described(error)}"
            ) from error
