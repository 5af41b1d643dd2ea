"""`fine_tune`: trains on texts and labels, or by a config, and returns a Predictor.

    import gemma_encoder as ge

    predictor = ge.fine_tune("classification", train=frame, workdir="runs/tone")
    predictor.predict(["a fine film"])

The run is that of `gemma-encoder train`: same config, workdir and checkpoints.
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

FOLDER = "data"  # folder in a workdir for rows that were passed in memory


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

    Shows a progress bar on a terminal and in a notebook. Rows that are passed in memory are
    written to `WORKDIR/data/`, so that the same call resumes an interrupted run.

    Args:
        what: a kind of task ("classification", "regression", "ranking", "multi_label", "ordinal";
            with `train` also "retrieval"), optionally with arguments of the config `own`, such as
            "classification,size=gemma3_270m"; or a custom `Task`, whose template's fields are
            columns of the data; or a config: its name ("glue:sst2"), its file, or a ConfigDict.
        train: a path (JSONL, JSON, CSV, TSV, Parquet), a pattern such as "part-*.csv", a list of
            both, a DataFrame, a dictionary of columns, or an iterable of records. The column
            "label" is the label, the other columns form the text; see `OwnOptions` to change that
            with `overrides` such as {"own.label": "stars"}. None if the config names its data.
        validation: data to evaluate on; by default a tenth of `train` is held out.
        test: data of the split "test", for a later evaluation.
        workdir: folder of the run: checkpoints, metrics.jsonl, predictions.
        overrides: fields of the config by path, such as {"train_for": "20 steps", "seed": 1}.
        hooks: hooks to call during training; see `training.hooks`.

    Returns:
        The fine-tuned encoder; `predictor.spec.record["metrics"]` holds the evaluations.

    Raises:
        InputError: an argument or the data cannot be used; nothing of an earlier run is lost.
        SystemExit: the process was preempted (SIGTERM) and saved a checkpoint.
    """
    runtime.require_training()
    runtime.quiet()
    overrides = overrides or {}
    _check_arguments(overrides, workdir)
    modules = convert(tuple[str, ...], overrides.get("modules", ()), "modules")
    import_modules(modules)  # they may register the kind of task
    name, config, fields = _resolve_config(what, has_data=train is not None)
    fields |= configs.by_path(config, overrides)
    files = _data_fields({"train": train, "validation": validation, "test": test}, workdir)
    duplicates = sorted(files.keys() & fields.keys())
    if duplicates:
        raise InputError(
            f"overrides: {duplicates[0]} is given as an argument, too; leave one of them out"
        )
    fields |= files
    configs.override(config, fields)
    _check_files_are_used(config, files)
    from gemma_encoder.training import loop

    result = loop.train(config, workdir, _command(name, fields, workdir), hooks)
    if result.preempted:
        raise SystemExit(runtime.EXIT_PREEMPTED)
    return Predictor.load(result.checkpoint)


def _check_arguments(overrides: Any, workdir: Any) -> None:
    def is_path(field: Any) -> bool:
        return isinstance(field, str) and all(field.split("."))

    if not isinstance(overrides, Mapping) or not all(map(is_path, overrides)):
        raise InputError("overrides must be a dictionary from a field's path to its value")
    if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise InputError(f"workdir must be the path of a folder, got {workdir!r}")


def _check_files_are_used(config: ml_collections.ConfigDict, files: Mapping[str, str]) -> None:
    """Raises InputError if data are given, but the config does not train on them."""
    if files and config.own.name not in config.tasks:
        tasks = ", ".join(map(str, config.tasks)) or "no task"
        arguments = ", ".join(field.removeprefix("own.") for field in files)
        raise InputError(
            f"the config trains on {tasks}, not on the given data, which are the task "
            f"{config.own.name!r}; leave out {arguments}, or name a kind of task"
        )


def _resolve_config(
    source: str | Task | ml_collections.ConfigDict, has_data: bool
) -> tuple[str, ml_collections.ConfigDict, dict[str, Any]]:
    """Returns the config's name (or ""), the config, and the fields that a task overrides."""
    if isinstance(source, Task):
        fields = _task_fields(source)
        name = f"own:{source.kind}"
        return name, configs.load_config(name), fields
    if isinstance(source, str):
        word = source.split(",")[0].split(":")[0]
        name = source
        if word in table_kinds() and (has_data or word not in configs.names()):
            name = f"own:{source}"
        elif word not in configs.names() and not word.endswith(".py"):
            raise unknown("kind or config", word, [*table_kinds(), *configs.names()])
        return name, configs.load_config(name), {}
    if isinstance(source, ml_collections.ConfigDict):
        return "", source.copy_and_resolve_references(), {}
    raise InputError(f"expected a kind, a Task or a config, got {type(source).__name__}")


def _task_fields(task: Task) -> dict[str, Any]:
    """Converts a task to fields of the config."""
    if task.kind.name not in table_kinds():
        raise InputError(
            f"task {task.name!r}: the labels of a {task.kind} task do not fit in a table; "
            f"expected one of {', '.join(table_kinds())}"
        )
    if task.kind.embeds:
        raise InputError(
            f"task {task.name!r}: name the kind, {str(task.kind)!r}, in place of a task; overrides "
            "set retrieval.query_template and retrieval.document_template"
        )
    supported = Task(
        task.name, task.kind, task.template, task.metrics, task.classes, task.label_range
    )
    if supported != task.uncalibrated():
        raise InputError(
            f"task {task.name!r}: fine_tune supports a task's name, kind, template, metrics, "
            "classes and label_range; leave out head, chance and role_templates"
        )
    query_and_document = task.is_list and set(task.template.fields) == {"query", "document"}
    return {
        "tasks": (task.name,),
        "own.name": task.name,
        "own.kind": task.kind.name,
        "own.fields": () if query_and_document else task.template.fields,
        "own.template": task.template.text,
        "own.truncation": task.template.truncation,
        "own.protected_share": task.template.protected_share,
        "own.metrics": task.metrics,
        "own.classes": task.classes,
        "own.label_range": task.label_range if task.kind.has_range else (),
    }


def _data_fields(splits: Mapping[str, "Data | None"], workdir: epath.PathLike) -> dict[str, Any]:
    """Returns the paths of the data by config field; writes rows in memory to the workdir."""
    result = {}
    texts = {}
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
            f"workdir {folder} is not a local folder, so that rows in memory cannot be written to "
            "it; give the path of a file with the rows"
        )
    has_run = bool(native.checkpoint_steps(folder))
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
        and all(isinstance(item, str | os.PathLike) for item in data)
    )


def _command(name: str, fields: Mapping[str, Any], workdir: epath.PathLike) -> str:
    """Returns the equivalent command line; "" if the config has no name."""
    if not name:
        return ""
    changes = (f"--config.{field}={value}" for field, value in fields.items())
    words = ["gemma-encoder", "train", f"--config={name}", *changes, f"--workdir={workdir}"]
    return shlex.join(words)
