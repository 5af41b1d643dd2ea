"""What the studies of `experiments/ablations/` share: what a study declares, the recipe that its rows change, and the command of a row.

A row is the recipe of a task and a scale with one factor changed. Any row is a plain run:

    gemma-encoder train --config=ablations/STUDY:task=sst2,row=ROW,seed=1[,scale=gemma2_2b][,smoke] --workdir=…
"""

import dataclasses
import hashlib
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from gemma_encoder.experiments import glue, msmarco, superglue
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training import recipe
from gemma_encoder.training.config import MAY_CHANGE

GLUE = tuple(glue.TINY)
SUPERGLUE = tuple(f"superglue_{name}" for name in superglue.TINY)
TASKS = (
    *GLUE,
    *SUPERGLUE,
    "msmarco",
)  # msmarco reads whatever MSMARCO_DIR names, Cranfield in the same layout too

MINI = "mini"
# The small pretrained decoder of the scale `mini`: by the same name in every checkout, so that
# configs of one run are equal; elsewhere it is the package's own.
DECODER = "experiments/decoders/mini"
if not pathlib.Path(DECODER).exists():
    DECODER = str(pathlib.Path(__file__).parents[1] / "decoders" / "mini")
MINI_SIZE = "gemma3_mini"  # its size by name, for rows from random weights
REAL = tuple(name for name in GEMMA_CONFIGS if not name.endswith(("tiny", "mini")))
SCALES = (MINI, *REAL)

MAPPINGS = ("task_weights", "model.transformer")  # fields that map arbitrary names to values

Changes = Mapping[str, Any]  # value by config field, e.g. {"model.attention": "causal"}


@dataclasses.dataclass(frozen=True)
class MiniRecipe:
    """What the scale `mini` needs to know of a task. One run should take about a minute on two slow cores, at some 7,000 tokens a second.

    Attributes:
        train_for: how long.
        learning_rate: the highest.
        length: tokens of a row, and of a text at most.
        rows: of a batch; a model this small gains from many small steps.
        max_train_examples: records of the training split that are used, the first ones, so that they are the same for every row and seed.
    """

    train_for: str
    learning_rate: float
    length: int
    rows: int
    max_train_examples: int = 0


MINI_RECIPES = {
    "sst2": MiniRecipe(
        "1 epochs", 1e-3, length=64, rows=8, max_train_examples=10_000
    ),  # 2.9 texts a row: 223,000 tokens in all; 0.4 % of texts are cut
    "stsb": MiniRecipe("2 epochs", 1e-3, length=128, rows=8),  # 2.7 texts a row: 514,000 tokens
    # Cranfield, lists of 8, a row holds a query and the beginning of an abstract: 230,000 tokens; to evaluate, 720,000 forward. Six epochs, one
    # seed: the loss of the lists falls from 2.08 to 1.66, MRR@10 is 0.110, a random order's.
    "msmarco": MiniRecipe("2 epochs", 1e-3, length=96, rows=16),
}

# Training records, for shares of them: TFDS's own counts; of MS MARCO the queries with a judgement.
TRAIN_RECORDS = {
    **{
        "cola": 8_551,
        "sst2": 67_349,
        "mrpc": 3_668,
        "qqp": 363_846,
        "stsb": 5_749,
        "mnli": 392_702,
        "qnli": 104_743,
        "rte": 2_490,
        "wnli": 635,
    },
    **{
        "superglue_boolq": 9_427,
        "superglue_cb": 250,
        "superglue_copa": 400,
        "superglue_multirc": 27_243,
        "superglue_record": 100_730,
    },
    **{"superglue_rte": 2_490, "superglue_wic": 5_428, "superglue_wsc": 554, "msmarco": 502_939},
}
CRANFIELD_QUERIES = 150  # what MSMARCO_DIR names at the scale `mini`


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        name: unique in its study.
        changes: fields with their values; or what makes them of the config that they change and the task, where they hang on it.
        scales: where it makes sense; () for everywhere.
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
        name: that of its file.
        question: one sentence.
        tasks: names in `TASKS`, the main one first.
        baseline: the row that the others are compared with; "" where rows are sizes, which are not compared.
        rows: all of them, the baseline among them.
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
                f"study {self.name!r}: rows must have different names and hold the baseline {self.baseline!r}; got {names}"
            )
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("task", task, TASKS)

    def rows_at(self, scale: str) -> tuple[Variant, ...]:
        """The rows that make sense at a scale, the baseline first."""
        return tuple(
            sorted(
                (row for row in self.rows if not row.scales or scale in row.scales),
                key=lambda row: row.name != self.baseline,
            )
        )

    def row(self, name: str) -> Variant:
        """A row by name."""
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
        """The config of one run: the recipe, cut down if `smoke`, overridden for a whole sweep, then changed as the row says.

        Args:
            task, row, scale: by name.
            seed: of the weights that are random, the order of the data and dropout.
            smoke: cut it down to seconds.
            override: what a sweep changes in all its rows.
        """
        found = self.row(row)
        if task not in self.tasks:
            raise unknown(f"task of study {self.name!r}", task, self.tasks)
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        if found.scales and scale not in found.scales:
            raise InputError(
                f"row {row!r} of study {self.name!r} is for the scale {' or '.join(found.scales)}, not {scale}"
            )
        config = base(task, scale)
        config = override(recipe.smoke(config) if smoke else config)
        changes = found.changes(config, task) if callable(found.changes) else found.changes
        for field, value in changes.items():
            set_field(config, field, value)
        config.seed = seed
        return config

    def get_config(self, arg: str = "") -> ConfigDict:
        """The config that `--config=ablations/STUDY:ARG` names; see the top of this file."""
        _, options, smoke = recipe.parse_arg(arg, options=("task", "row", "seed", "scale"))
        row = options.get("row", self.baseline or self.rows[0].name)
        scale = options.get("scale", (self.row(row).scales or SCALES)[0])
        seed = options.get("seed", "0")
        if not seed.isdigit():
            raise InputError(f"seed={seed} is no whole number")
        return self.config(options.get("task", self.tasks[0]), row, int(seed), scale, smoke)

    def argument(self, task: str, row: str, seed: int, scale: str, smoke: bool = False) -> str:
        """What `--config` has to say for `get_config` to give that run."""
        return f"ablations/{self.name}:task={task},row={row},seed={seed},scale={scale}{',smoke' if smoke else ''}"


def base(task: str, scale: str) -> ConfigDict:
    """The recipe of a task at a scale: bidirectional, mean pooling, feed-forward dropout 0.1, packed.

    Real sizes take that of `experiments/glue.py`, `superglue.py` or `msmarco.py`; their weights are named by `model.pretrained`.
    The scale `mini` takes their tiny one for the small pretrained decoder, in float32, and evaluates once, at the end.
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
    config.evaluate_every = (
        "100 percent"  # results are those of the last step, never of the best one
    )
    if scale != MINI:
        return config
    config.model.size, config.model.pretrained, config.tokenizer = "pretrained", DECODER, "auto"
    config.model.remat = "dots"  # on a CPU, what is not kept need not be written
    if mini := MINI_RECIPES.get(task):
        config.train_for, config.max_train_examples, config.optimizer.learning_rate = (
            mini.train_for,
            mini.max_train_examples,
            mini.learning_rate,
        )
        config.max_length = config.batch.row_length = mini.length
        config.batch.rows = mini.rows
    return config


def random_weights(config: ConfigDict, task: str) -> Changes:
    """What trains the same sizes from random weights, with the same tokenizer."""
    del task
    if config.model.size == "pretrained":
        return {
            "model.size": MINI_SIZE,
            "model.pretrained": "",
            "tokenizer": config.model.pretrained,
        }
    return {"model.pretrained": ""}


def num_training_records(config: ConfigDict, task: str) -> int:
    """The training records that a recipe uses."""
    cranfield = task == "msmarco" and config.model.size == "pretrained"
    return config.max_train_examples or (CRANFIELD_QUERIES if cranfield else TRAIN_RECORDS[task])


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    """Sets a field by its path, e.g. "model.pooling.name"; raises InputError where there is none."""
    *parents, name = field.split(".")
    node = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or name not in node:
        raise unknown("config field", field, flat_fields(config))
    node[name] = value


def flat_fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Value by field; a mapping of arbitrary names is one value, and left out where it is empty."""
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
    """The fields whose values differ, with those of `after`."""
    stored = flat_fields(before)
    return {
        field: value
        for field, value in flat_fields(after).items()
        if field not in ignore and stored.get(field) != value
    }


def rerun_command(
    study: Study, task: str, row: str, scale: str, smoke: bool, config: ConfigDict
) -> str:
    """The command that repeats a run: the row, and whatever else a sweep had changed."""
    argument = study.argument(task, row, config.seed, scale, smoke)
    rest = changed_fields(study.get_config(argument.partition(":")[2]), config)
    words = [
        f"--config={argument}",
        *(f"--config.{field}={value}" for field, value in rest.items()),
    ]
    workdir = f"runs/{study.name}/{row}/{task}/seed_{config.seed}"
    return shlex.join(["gemma-encoder", "train", *words, f"--workdir={workdir}"])


def digest(config: ConfigDict) -> str:
    """The same for two runs that learn the same: of all fields but those that may change between two starts of a run."""
    fields = {
        field: value
        for field, value in flat_fields(config).items()
        if field.split(".")[0] not in MAY_CHANGE
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
