"""Reads what runs leave in their workdirs."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs import options
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.metrics_log import read_metrics


@dataclasses.dataclass
class RunFiles:
    """What a workdir holds.

    Attributes:
        name: unique among the runs of the report.
        workdir: where it lies.
        config: nested.
        lines: of `metrics.jsonl`.
        tasks: those that it was trained on, by name; none where it has no checkpoint yet.
        command: how it was started, if that was recorded.
    """

    name: str
    workdir: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    tasks: dict[str, Task]
    command: str

    @classmethod
    def load(cls, workdir: pathlib.Path, name: str) -> "Run":
        """Reads a workdir; raises InputError where it is none."""
        if not (workdir / "config.json").is_file():
            what = "holds no config.json" if workdir.is_dir() else "does not exist"
            raise InputError(f"{workdir} {what}; give the workdir of a run")
        config = read_json_object(workdir / "config.json")
        config = options.with_current_names(TrainConfig, config)
        found = sorted(
            workdir.glob("checkpoints/*/inference/inference.json"),
            key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else -1,
        )
        description = read_json_object(found[-1]) if found else {}
        tasks = {task.name: task for task in map(Task.from_dict, description.get("tasks", ()))}
        lines = read_metrics(workdir)
        if not lines:
            raise InputError(f"{workdir} has no line in metrics.jsonl yet; train first")
        return cls(
            name, workdir, config, lines, tasks, description.get("record", {}).get("command", "")
        )

    def latest(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The newest line of each task and split."""
        return {(line["task"], line["split"]): line for line in self.lines if "task" in line}

    def parts(self, task: str, split: str) -> dict[str, str]:
        """The splits that were predicted of what a line calls `split`, by what tells their metrics apart; as in `Source.evaluation_splits`."""
        folder, found = self.workdir / "predictions", {}
        for path in sorted(
            [*folder.glob(f"{task}.{split}*.jsonl"), *folder.glob(f"{task}.{split}*.trec")]
        ):
            name = path.name.removeprefix(f"{task}.").rsplit(".", 1)[0]
            if name == split or (name.startswith(f"{split}_") and "." not in name):
                found[name.removeprefix(split).removeprefix("_")] = name
        return found


def unique_names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names, with as much of the path before them as tells them apart."""
    paths = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise InputError("a workdir is named twice")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file; raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); it is damaged or was copied in part"
        ) from None


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where it is not there."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            raise InputError(
                f"{path}:{number}: not a JSON object; run gemma-encoder evaluate again"
            ) from None
    return lines


def read_trec_run(path: pathlib.Path) -> ranking.Run:
    """A run in TREC's format."""
    run: ranking.Run = {}
    for line in path.read_text().splitlines():
        query, _, document, _, score, _ = line.split(" ")
        run.setdefault(query, []).append((document, float(score)))
    return run


def read_trec_qrels(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Relevance judgments in TREC's format: grades by query and document."""
    qrels: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        query, _, document, grade = line.split(" ")
        qrels.setdefault(query, {})[document] = float(grade)
    return qrels
