"""`fine_tune`: from texts and labels, or a config, to a Predictor, in one call.

    import gemma_encoder as ge

    predictor = ge.fine_tune("classification", train=frame, workdir="runs/tone")
    predictor.predict(["a fine film"])

It is the run that `gemma-encoder train` makes: the same config, workdir and checkpoints.
"""

import os
import pathlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from etils import epath

from gemma_encoder import configs, runtime
from gemma_encoder.data.tasks.own_options import table_kinds
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import convert
from gemma_encoder.inputs.task import Task
from gemma_encoder.row_files import to_jsonl, write_rows
from gemma_encoder.training.config import import_modules
from gemma_encoder.weights import native

if TYPE_CHECKING:
    import pandas

    from gemma_encoder.training.hooks import Hook

    Path = epath.PathLike
    Data = Path | Sequence[Path] | pandas.DataFrame | Mapping[str, Sequence] | Iterable[Mapping]

FOLDER = "data"  # of a workdir, for what was handed over in memory


def fine_tune(
    what: str | Task | ml_collections.ConfigDict,
    train: "Data | None" = None,
    validation: "Data | None" = None,
    test: "Data | None" = None,
    *,
    workdir: epath.PathLike,
    overrides: Mapping[str, Any] | None = None,
    hooks: Sequence["Hook"] = (),
) -> Predictor:
    """Fine-tunes an encoder, or resumes the run in `workdir`, and loads the newest checkpoint.

    Shows a progress bar on a terminal and in a notebook. Keeps rows in memory in `WORKDIR/data/`,
    so that the same call resumes an interrupted run.

    Args:
        what: a kind of task ("classification", "regression", "ranking", "multi_label", "ordinal"),
            with the arguments of the config `own` where there are any, such as
            "classification,size=gemma3_270m"; or a `Task` of your own, whose template's fields are
            columns of the data; or a config, by name ("glue:sst2"), by file or as it is.
        train: a path (JSONL, JSON, CSV, TSV, Parquet), a pattern such as "part-*.csv", a list of
            both, a DataFrame, a dictionary of columns, or an iterable of records. The column "label" holds the label, the others make the text;
            `OwnOptions` says more, and `overrides` such as {"own.label": "stars"} change it.
            None where the config names its data.
        validation: what to evaluate on; by default a tenth of `train` is held out.
        test: the split "test", for later.
        workdir: folder of the run: checkpoints, metrics.jsonl, predictions.
        overrides: fields of the config by path, such as {"train_for": "20 steps", "seed": 1}.
        hooks: called at the run's cadences; see `training.hooks`.

    Returns:
        The fine-tuned encoder; `predictor.bundle.record["metrics"]` holds the evaluations.

    Raises:
        InputError: something of it cannot be used; nothing of an earlier run is lost.
        SystemExit: the process was told to stop (SIGTERM), with a checkpoint saved.
    """
    runtime.require_training()
    runtime.quiet()
    overrides = overrides or {}
    _check_arguments(overrides, workdir)
    modules = convert(tuple[str, ...], overrides.get("modules", ()), "modules")
    import_modules(modules)  # they may register the kind
    name, config, fields = _resolved(what)
    fields |= configs.by_path(config, overrides)
    files = _files({"train": train, "validation": validation, "test": test}, workdir)
    if taken := sorted(files.keys() & fields.keys()):
        raise InputError(f"overrides: {taken[0]} is given as an argument, too; leave one out")
    fields |= files
    configs.override(config, fields)
    _check_files_are_used(config, files)
    from gemma_encoder.training import loop

    outcome = loop.train(config, workdir, _command(name, fields, workdir), hooks)
    if outcome.preempted:
        raise SystemExit(runtime.EXIT_PREEMPTED)
    return Predictor.load(outcome.checkpoint)


def _check_arguments(overrides: Any, workdir: Any) -> None:
    def is_path(field: Any) -> bool:
        return isinstance(field, str) and all(field.split("."))

    if not isinstance(overrides, Mapping) or not all(map(is_path, overrides)):
        raise InputError("overrides is a dictionary from a field's path to its value")
    if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise InputError(f"workdir is the path of a folder, got {workdir!r}")


def _check_files_are_used(config: ml_collections.ConfigDict, files: Mapping[str, str]) -> None:
    if files and config.own.name not in config.tasks:
        raise InputError(
            f"the config trains on {', '.join(map(str, config.tasks)) or 'no task'}, not on data "
            f"of your own, which is the task {config.own.name!r}; leave out "
            f"{', '.join(field.removeprefix('own.') for field in files)}, or name a kind of task"
        )


def _resolved(
    what: str | Task | ml_collections.ConfigDict,
) -> tuple[str, ml_collections.ConfigDict, dict[str, Any]]:
    """The config's name ("" without one), the config, and the fields that a task changes."""
    if isinstance(what, Task):
        name, fields = f"own:{what.kind}", _fields(what)
        return name, configs.load_config(name), fields
    if isinstance(what, str):
        word = what.split(",")[0].split(":")[0]
        if word in table_kinds():
            what = f"own:{what}"
        elif word not in configs.names() and not word.endswith(".py"):
            raise unknown("kind or config", word, [*table_kinds(), *configs.names()])
        name = what
        return name, configs.load_config(name), {}
    if isinstance(what, ml_collections.ConfigDict):
        return "", what.copy_and_resolve_references(), {}
    raise InputError(f"expected a kind, a Task or a config, got {type(what).__name__}")


def _fields(task: Task) -> dict[str, Any]:
    """A task as fields of the config."""
    if task.kind.name not in table_kinds():
        raise InputError(
            f"task {task.name!r}: the labels of a {task.kind} task are none that a table holds; "
            f"those of {', '.join(table_kinds())} are"
        )
    plain = Task(task.name, task.kind, task.template, task.metrics, task.classes, task.label_range)
    if plain != task:
        raise InputError(
            f"task {task.name!r}: fine_tune uses a task's name, kind, template, metrics, classes "
            "and label_range; leave out head, chance and role_templates"
        )
    query_and_document = task.is_list and set(task.template.fields) == {"query", "document"}
    return {
        "tasks": (task.name,),
        "own.name": task.name,
        "own.kind": task.kind.name,
        "own.fields": () if query_and_document else task.template.fields,
        "own.template": task.template.text,
        "own.truncation": task.template.truncation,
        "own.metrics": task.metrics,
        "own.classes": task.classes,
        "own.label_range": task.label_range if task.kind.has_range else (),
    }


def _files(splits: Mapping[str, "Data | None"], workdir: epath.PathLike) -> dict[str, Any]:
    """Paths by field of the config; rows in memory are written to the workdir."""
    result, texts = {}, {}
    for split, data in splits.items():
        if isinstance(data, str | os.PathLike):
            result[f"own.{split}"] = os.fspath(data)
        elif _are_paths(data):
            result[f"own.{split}"] = tuple(map(os.fspath, data))
        elif data is not None:
            texts[split] = to_jsonl(data, split)
    if not texts:
        return result
    folder = native.absolute(workdir)
    if "://" in str(folder):
        raise InputError(
            f"workdir {folder} is not a local folder, which rows in memory are kept in; give the "
            "path of a file"
        )
    has_run = (folder / "config.json").exists()
    for split, text in texts.items():
        path = pathlib.Path(folder) / FOLDER / f"{split}.jsonl"
        result[f"own.{split}"] = str(path)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if has_run:
            raise InputError(
                f"{folder} holds a run on other {split} data; choose another workdir, or delete it"
            )
        write_rows(path, text)
    return result


def _are_paths(data: Any) -> bool:
    return (
        isinstance(data, list | tuple)
        and bool(data)
        and all(isinstance(one, str | os.PathLike) for one in data)
    )


def _command(name: str, fields: Mapping[str, Any], workdir: epath.PathLike) -> str:
    """What does the same on the command line; "" where the config has no name."""
    if not name:
        return ""
    changes = (f"--config.{field}={value}" for field, value in fields.items())
    words = ["gemma-encoder", "train", f"--config={name}", *changes, f"--workdir={workdir}"]
    return shlex.join(words)
