"""Declaration of a study, as in `experiments/ablations/`: tasks, rows, configs and commands.

A row is the recipe of a task and a scale with one factor changed. Any row is a plain run:

    gemma-encoder train --workdir=… \
      --config=ablations/STUDY:task=sst2,row=ROW,seed=1[,scale=gemma2_2b][,smoke]
"""

import dataclasses
import hashlib
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from gemma_encoder.experiments import glue, msmarco, superglue
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.template import PROTECTED_SHARE
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training import recipe
from gemma_encoder.training.config import MAY_CHANGE

GLUE = tuple(glue.TINY)
SUPERGLUE = tuple(f"superglue_{name}" for name in superglue.TINY)
# msmarco reads any data in MS MARCO's layout in MSMARCO_DIR, such as Cranfield.
TASKS = (*GLUE, *SUPERGLUE, "msmarco")

MINI = "mini"
# The small pretrained decoder of the scale `mini`: a relative path in every checkout, so that
# configs of equal runs are equal; outside a checkout, that of the installed package.
DECODER = "experiments/decoders/mini"
if not pathlib.Path(DECODER).exists():
    DECODER = str(pathlib.Path(__file__).parents[1] / "decoders" / "mini")
MINI_SIZE = "gemma3_mini"  # the decoder's size, for rows from random weights
REAL = tuple(name for name in GEMMA_CONFIGS if not name.endswith(("tiny", "mini")))
SCALES = (MINI, *REAL)

MAPPINGS = ("task_weights", "model.transformer")  # config fields with arbitrary keys

Changes = Mapping[str, Any]  # value by config field, e.g. {"model.attention": "causal"}


@dataclasses.dataclass(frozen=True)
class MiniRecipe:
    """Recipe of a task at the scale `mini`.

    One run should take about a minute on two slow cores, at about 7,000 tokens per second.

    Attributes:
        train_for: duration of training.
        learning_rate: peak learning rate.
        length: row length and maximum text length, in tokens.
        rows: rows of a batch; a model this small gains from many small steps.
        max_train_examples: number of training records, 0 for all; the first ones, so that they are
            the same for every row and seed.
    """

    train_for: str
    learning_rate: float
    length: int
    rows: int
    max_train_examples: int = 0


MINI_RECIPES = {
    # 2.9 texts per row: 223,000 tokens in total; 0.4 % of texts are truncated.
    "sst2": MiniRecipe("1 epochs", 1e-3, length=64, rows=8, max_train_examples=10_000),
    # 2.7 texts per row: 514,000 tokens.
    "stsb": MiniRecipe("2 epochs", 1e-3, length=128, rows=8),
    # Cranfield, lists of 8; a row has a query and the beginning of an abstract: 230,000 tokens, and
    # 720,000 to evaluate. In six epochs with one seed, the listwise loss decreases from 2.08 to
    # 1.66, but MRR@10 is 0.110, that of a random order.
    "msmarco": MiniRecipe("2 epochs", 1e-3, length=96, rows=16),
}

# Number of training records: those of TFDS; for MS MARCO, the judged queries.
TRAIN_RECORDS = {
    "cola": 8_551,
    "sst2": 67_349,
    "mrpc": 3_668,
    "qqp": 363_846,
    "stsb": 5_749,
    "mnli": 392_702,
    "qnli": 104_743,
    "rte": 2_490,
    "wnli": 635,
    "superglue_boolq": 9_427,
    "superglue_cb": 250,
    "superglue_copa": 400,
    "superglue_multirc": 27_243,
    "superglue_record": 100_730,
    "superglue_rte": 2_490,
    "superglue_wic": 5_428,
    "superglue_wsc": 554,
    "msmarco": 502_939,
}
CRANFIELD_QUERIES = 150  # the data in MSMARCO_DIR at the scale `mini`


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a study.

    Attributes:
        name: unique in its study.
        changes: values by config field; or a function that computes them from the unchanged config
            and the task.
        scales: scales that have the row; () for all.
    """

    name: str
    changes: Changes | Callable[[ConfigDict, str], Changes] = dataclasses.field(
        default_factory=dict
    )
    scales: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """A question and the runs that answer it.

    Attributes:
        name: name of its module.
        question: one sentence.
        tasks: names in `TASKS`, the main one first.
        baseline: row that the others are compared with; "" if rows are sizes, which are not
            compared.
        rows: all rows, the baseline included.
    """

    name: str
    question: str
    tasks: tuple[str, ...]
    baseline: str
    rows: tuple[Variant, ...]

    def __post_init__(self):
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names) or (self.baseline and self.baseline not in names):
            raise InputError(
                f"study {self.name!r}: rows must have different names and include the baseline "
                f"{self.baseline!r}; got {names}"
            )
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("task", task, TASKS)

    def rows_at(self, scale: str) -> tuple[Variant, ...]:
        """Returns the rows of a scale, the baseline first."""
        rows = [row for row in self.rows if not row.scales or scale in row.scales]
        return tuple(sorted(rows, key=lambda row: row.name != self.baseline))

    def row(self, name: str) -> Variant:
        """Returns a row by name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise unknown(f"row of study {self.name!r}", name, [row.name for row in self.rows])

    def config(
        self,
        task: str,
        row: str,
        seed: int,
        scale: str,
        smoke: bool = False,
        override: Callable[[ConfigDict], ConfigDict] = lambda config: config,
    ) -> ConfigDict:
        """Returns the config of one run.

        The recipe is reduced to a smoke test, overridden by the sweep, then changed by the row.

        Args:
            task, row, scale: names.
            seed: seed of random weights, data order and dropout.
            smoke: reduce the run to seconds.
            override: changes by the sweep, for all rows.
        """
        variant = self.row(row)
        if task not in self.tasks:
            raise unknown(f"task of study {self.name!r}", task, self.tasks)
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        if variant.scales and scale not in variant.scales:
            raise InputError(
                f"row {row!r} of study {self.name!r} is for the scale "
                f"{' or '.join(variant.scales)}, not {scale}"
            )
        config = base(task, scale)
        config = override(recipe.smoke(config) if smoke else config)
        changes = variant.changes
        if callable(changes):
            changes = changes(config, task)
        for field, value in changes.items():
            set_field(config, field, value)
        config.seed = seed
        return config

    def get_config(self, arg: str = "") -> ConfigDict:
        """Returns the config of `--config=ablations/STUDY:ARG`; see the module's docstring."""
        _, options, smoke = recipe.parse_arg(arg, options=("task", "row", "seed", "scale"))
        row = options.get("row", self.baseline or self.rows[0].name)
        scale = options.get("scale", (self.row(row).scales or SCALES)[0])
        seed = options.get("seed", "0")
        if not seed.isdigit():
            raise InputError(f"seed={seed} is not a whole number")
        return self.config(options.get("task", self.tasks[0]), row, int(seed), scale, smoke)

    def argument(self, task: str, row: str, seed: int, scale: str, smoke: bool = False) -> str:
        """Returns the value of `--config` for a run."""
        words = [f"task={task}", f"row={row}", f"seed={seed}", f"scale={scale}"]
        words += ["smoke"] if smoke else []
        return f"ablations/{self.name}:{','.join(words)}"


def base(task: str, scale: str) -> ConfigDict:
    """Returns the recipe of a task: bidirectional, mean pooling, feed-forward dropout 0.1, packed.

    Real sizes use the recipes of `experiments/glue.py`, `superglue.py` or `msmarco.py`, with the
    weights in `model.pretrained`. The scale `mini` uses their recipe of the size `tiny` with the
    small pretrained decoder, in float32. Runs are evaluated once, at the end.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    size = "tiny" if scale == MINI else scale
    if task == "msmarco":
        config = msmarco.get_config(f"size={size}")
    elif task in SUPERGLUE:
        config = superglue.get_config(f"{task.removeprefix('superglue_')},size={size}")
    else:
        config = glue.get_config(f"{task},size={size}")
    config.evaluate_every = "100 percent"  # results are of the last step, not of the best one
    if scale != MINI:
        return config
    config.model.size = "pretrained"
    config.model.pretrained = DECODER
    config.tokenizer = "auto"
    config.model.remat = "dots"  # on a CPU, recomputing activations is cheaper than storing them
    if mini := MINI_RECIPES.get(task):
        config.train_for = mini.train_for
        config.max_train_examples = mini.max_train_examples
        config.optimizer.learning_rate = mini.learning_rate
        config.max_length = config.batch.row_length = mini.length
        config.batch.rows = mini.rows
    return config


def random_weights(config: ConfigDict, task: str) -> Changes:
    """Returns the changes that train the same size from random weights, with the same tokenizer."""
    del task
    if config.model.size == "pretrained":
        return {
            "model.size": MINI_SIZE,
            "model.pretrained": "",
            "tokenizer": config.model.pretrained,
        }
    return {"model.pretrained": ""}


def num_training_records(config: ConfigDict, task: str) -> int:
    """Returns the number of training records that a recipe uses."""
    if config.max_train_examples:
        return config.max_train_examples
    is_cranfield = task == "msmarco" and config.model.size == "pretrained"
    return CRANFIELD_QUERIES if is_cranfield else TRAIN_RECORDS[task]


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    """Sets a field by its path, e.g. "model.pooling.name"; raises InputError if it is unknown."""
    *parents, name = field.split(".")
    node = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or name not in node:
        raise unknown("config field", field, flat_fields(config))
    node[name] = value


def flat_fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns values by field path; a field of `MAPPINGS` is one value, omitted if empty."""
    result = {}
    for name, value in config.items():
        field = f"{prefix}{name}"
        if field in MAPPINGS:
            result |= {field: value.to_dict()} if value else {}
        elif isinstance(value, ConfigDict):
            result |= flat_fields(value, f"{field}.")
        else:
            result[field] = value
    return result


def changed_fields(
    before: ConfigDict, after: ConfigDict, ignore: Sequence[str] = ("seed", "compilation_cache")
) -> dict[str, Any]:
    """Returns the fields whose values differ, with the values of `after`."""
    stored = flat_fields(before)
    return {
        field: value
        for field, value in flat_fields(after).items()
        if field not in ignore and stored.get(field) != value
    }


def rerun_command(
    study: Study, task: str, row: str, scale: str, smoke: bool, config: ConfigDict
) -> str:
    """Returns the command that repeats a run: its row, and further changes by the sweep."""
    argument = study.argument(task, row, config.seed, scale, smoke)
    overridden = changed_fields(study.get_config(argument.partition(":")[2]), config)
    words = [
        f"--config={argument}",
        *(f"--config.{field}={value}" for field, value in overridden.items()),
    ]
    workdir = f"runs/{study.name}/{row}/{task}/seed_{config.seed}"
    return shlex.join(["gemma-encoder", "train", *words, f"--workdir={workdir}"])


DIGESTED_AS = {
    "max_train_examples": "max_train",
    "max_eval_examples": "max_eval",
    "model.head_hidden_dims": "model.head_hidden",
    "own.truncation": "own.cut",
}
ADDED = {"own.protected_share": PROTECTED_SHARE}  # fields that earlier versions did not have


def digest(config: ConfigDict) -> str:
    """Returns a digest of the fields that determine a run's results.

    Fields that may change when a run is resumed (`MAY_CHANGE`) are ignored. Renamed fields count
    under their former names, so that results of earlier versions stay valid.
    """
    fields = {
        DIGESTED_AS.get(field, field): value
        for field, value in flat_fields(config).items()
        if field.split(".")[0] not in MAY_CHANGE and ADDED.get(field) != value
    }
    return hashlib.sha256(to_json(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
