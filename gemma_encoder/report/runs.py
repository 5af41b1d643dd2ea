"""Reads the files that training leaves in a workdir."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.data.files.lines import text_lines
from gemma_encoder.evaluation import ranking
from gemma_encoder.evaluation.details import read_details
from gemma_encoder.evaluation.prediction_files import ADVICE, FOLDER, check_prediction_files
from gemma_encoder.inputs import options
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.ids import decode_id
from gemma_encoder.inputs.json_text import from_json, read_object
from gemma_encoder.inputs.task import Task
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.weights import checkpoint_folders


@dataclasses.dataclass
class RunFiles:
    """Contents of a workdir.

    Attributes:
        name: name of the run, unique within the report.
        workdir: path of the workdir.
        config: nested fields of the config.
        lines: lines of `metrics.jsonl`.
        tasks: training tasks by name; empty if there is no checkpoint yet.
        command: command line of the run; empty if it was not recorded.
    """

    name: str
    workdir: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    tasks: dict[str, Task]
    command: str

    @classmethod
    def load(cls, workdir: pathlib.Path, name: str) -> "RunFiles":
        """Reads a workdir; raises InputError if it is not the workdir of a run."""
        if not (workdir / "config.json").is_file():
            reason = "has no config.json" if workdir.is_dir() else "does not exist"
            raise InputError(f"{workdir} {reason}; give the workdir of a run")
        config = read_object(workdir / "config.json")
        config = options.with_current_names(TrainConfig, config)
        tasks, command = _newest_checkpoint(workdir)
        lines = read_metrics(workdir)
        if not lines:
            raise InputError(f"{workdir} has no line in metrics.jsonl yet; train first")
        check_prediction_files(workdir / FOLDER)
        return cls(name, workdir, config, lines, tasks, command)

    def latest(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Returns the newest line of `metrics.jsonl` for each (task, split)."""
        return {(line["task"], line["split"]): line for line in self.lines if "task" in line}

    def parts(self, task: str, split: str) -> dict[str, str]:
        """Returns the full names of the predicted parts of a split, by the suffix of their metrics.

        A split without parts is its own only part, with the suffix "". The suffixes are those of
        `Source.evaluation_splits`: "validation_matched" is the part "matched" of "validation".
        """
        folder = self.workdir / FOLDER
        files = [*folder.glob(f"{task}.{split}*.jsonl"), *folder.glob(f"{task}.{split}*.trec")]
        parts = {}
        for path in sorted(files):
            name = path.name.removeprefix(f"{task}.").rsplit(".", 1)[0]
            if name == split or (name.startswith(f"{split}_") and "." not in name):
                parts[name.removeprefix(split).removeprefix("_")] = name
        return parts

    def details(self, task: str, split: str) -> dict[str, dict[str, Any]]:
        """Returns the details of the newest evaluation, by the full name of the split's parts."""
        step = self.latest().get((task, split), {}).get("step", -1)
        folder = self.workdir / FOLDER
        values = {
            full_split: read_details(folder, task, full_split, step)
            for full_split in self.parts(task, split).values()
        }
        return {full_split: value for full_split, value in values.items() if value}


def _newest_checkpoint(workdir: pathlib.Path) -> tuple[dict[str, Task], str]:
    """Returns the tasks of a run by name, and its command; nothing without a checkpoint."""
    if not checkpoint_folders.checkpoint_steps(workdir):
        return {}, ""
    checkpoint = checkpoint_folders.find(workdir)
    try:
        return _described_in(checkpoint)
    except InputError:
        if checkpoint_folders.find(workdir) == checkpoint:
            raise
        return _newest_checkpoint(workdir)  # a run has saved another one and deleted this one


def _described_in(checkpoint: epath.Path) -> tuple[dict[str, Task], str]:
    """Returns the tasks by name and the command that a checkpoint describes."""
    with checkpoint_folders.reading(checkpoint, [checkpoint_folders.DESCRIPTION]):
        description = checkpoint_folders.read_description(checkpoint)
        try:
            tasks = {task.name: task for task in map(Task.from_dict, description.get("tasks", ()))}
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from error
        return tasks, description.get("record", {}).get("command", "")


def unique_names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Returns the folder name of each workdir, with as many parent folders as make it unique."""
    paths = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise InputError("a workdir is given twice; name each workdir once")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file; returns an empty list if the file does not exist."""
    if not path.exists():
        return []
    lines = []
    for line_number, text in text_lines(path):
        if not text.strip():
            continue
        try:
            line = from_json(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise InputError(f"{path}:{line_number}: not a JSON object; {ADVICE}")
        lines.append(line)
    return lines


def read_probabilities(lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the probabilities of a prediction file's lines, [N, C]; C is 0 if there are none.

    They are rounded to six digits: a 0 stands for less than 5e-7, and has no finite log loss.
    """
    probabilities = np.array([line.get("probabilities", ()) for line in lines], float)
    return np.clip(probabilities, 5e-7, 1 - 5e-7)


def read_trec_run(path: pathlib.Path) -> ranking.Run:
    """Reads a run that `ranking.trec_lines` wrote: (document, score) pairs by query."""
    run: ranking.Run = {}
    for query, _, document, _, score, _ in _trec_lines(path, 6):
        run.setdefault(decode_id(query), []).append((decode_id(document), float(score)))
    return run


def read_trec_qrels(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Reads judgments that `ranking.qrels_lines` wrote: grades by query and document."""
    qrels: dict[str, dict[str, float]] = {}
    for query, _, document, grade in _trec_lines(path, 4):
        qrels.setdefault(decode_id(query), {})[decode_id(document)] = float(grade)
    return qrels


def _trec_lines(path: pathlib.Path, num_columns: int) -> Iterator[list[str]]:
    """Yields the columns of each line; raises InputError for a line with more or fewer."""
    for line_number, line in text_lines(path):
        values = line.split()
        if values and len(values) != num_columns:
            raise InputError(
                f"{path}:{line_number}: expected {num_columns} columns, got {len(values)}, maybe "
                f"by an id with blanks; {ADVICE}"
            )
        if values:
            yield values
