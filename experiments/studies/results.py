"""Result files of finished runs, `RESULTS/STUDY/ROW/TASK/seed_N.json`.

A result has all that tables need, so that the run's workdir may be deleted. The reason of a failed
run is in `seed_N.failed.json`. The result of a run that equals a run of another study refers to it
(`same_as`). Scales other than `mini` have a folder of their own: `RESULTS/gemma2_2b/STUDY/…`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.experiments.studies.study import MINI
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.whole_files import write_whole

CANDIDATES = 100  # first-stage documents per query whose scores are stored for interpolation
FIELDS = {  # fields of every result, with their types
    **dict.fromkeys(
        (
            "study",
            "row",
            "task",
            "scale",
            "digest",
            "command",
            "kind",
            "main_metric",
            "machine",
            "date",
        ),
        str,
    ),
    **dict.fromkeys(("changes", "metrics", "outcomes", "versions"), dict),
    **dict.fromkeys(("seed", "steps", "train_records", "parameters"), int),
    **dict.fromkeys(("training_seconds", "seconds"), (int, float)),
}


@dataclasses.dataclass(frozen=True)
class RunKey:
    """Identifies a run.

    Attributes:
        study, row, task, scale: names.
        seed: seed of the run.
    """

    study: str
    row: str
    task: str
    scale: str
    seed: int

    def file(self, folder: pathlib.Path, failed: bool = False) -> pathlib.Path:
        """Returns the path of the run's result or failure."""
        parent = folder if self.scale == MINI else folder / self.scale
        suffix = ".failed.json" if failed else ".json"
        return parent / self.study / self.row / self.task / f"seed_{self.seed}{suffix}"


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of a folder.

    Attributes:
        done: contents of results, shared ones included.
        failed: reasons of failed runs.
    """

    done: Mapping[RunKey, Mapping[str, Any]]
    failed: Mapping[RunKey, str]


def outcomes(predictions: Sequence[Predictions], main: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the data for the paired bootstrap of each evaluated split, by its main metric.

    Args:
        predictions: predictions of each split.
        main: name of each split's main metric among the run's metrics.
    """
    return {name: _outcome(split) for name, split in zip(main, predictions, strict=True)}


def _outcome(predictions: Predictions) -> dict[str, Any]:
    task = predictions.task
    table = predictions.table
    kind = task.kind
    if kind.ranks:
        return _ranking_outcome(predictions)
    if kind.is_list:
        main = task.metrics[0]
        metric = metrics.METRICS[kind.name][main]
        return {
            "values": {main: _values_by_question(metric, predictions)},
            "options": [len(group) for group in table.groups().values()],
        }
    if kind.has_range:
        return {
            "labels": [round(float(label), 5) for label in table.labels],
            "predictions": [round(float(value), 5) for value in predictions.outputs],
        }
    result = {
        "labels": [int(label) for label in table.labels],
        "predictions": kind.decide(task, predictions.outputs).tolist(),
    }
    if any(table.query_ids):  # answers of a question or sentences of a pair are resampled together
        group_index = {name: index for index, name in enumerate(table.groups())}
        result["groups"] = [group_index[name] for name in table.query_ids]
    return result


def _values_by_question(metric: metrics.Metric, predictions: Predictions) -> list[float]:
    table = predictions.table
    labels = np.array(table.labels)
    values = []
    for group in table.groups().values():
        question = ExampleTable(
            query_ids=[table.query_ids[i] for i in group],
            infos=[table.infos[i] for i in group],
        )
        values.append(round(metric(labels[group], predictions.outputs[group], question), 6))
    return values


def _ranking_outcome(predictions: Predictions) -> dict[str, Any]:
    """Returns metrics of every judged query, and scores and grades of its first candidates.

    Metrics are those of the run and of the first stage; candidates are in first-stage order.
    """
    qrels = predictions.relevance_grades()
    table = predictions.table
    groups = table.groups()
    result: dict[str, Any] = {
        "queries": list(qrels),
        "values": _values_by_query(predictions, qrels, predictions.run()),
    }
    if first_stage := predictions.first_stage_run():
        result["first_stage"] = _values_by_query(predictions, qrels, first_stage)
    candidates = [groups.get(query, [])[:CANDIDATES] for query in qrels]
    result["scores"] = [
        [round(float(predictions.outputs[i]), 5) for i in group] for group in candidates
    ]
    result["grades"] = [
        [int(qrels[query].get(table.document_ids[i], 0)) for i in group]
        for query, group in zip(qrels, candidates, strict=True)
    ]
    return result


def _values_by_query(
    predictions: Predictions, qrels: Mapping[str, Mapping[str, float]], run: ranking.Run
) -> dict[str, list[float]]:
    values = {name: ranking.by_query(name, qrels, run) for name in predictions.task.metrics}
    return {
        name: [round(by_query[query], 6) for query in qrels] for name, by_query in values.items()
    }


def write_result(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(content, separators=(",", ":")) + "\n")


def read_results(folder: pathlib.Path) -> Results:
    """Reads all results of a folder; raises InputError for an invalid file."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder of results; make one with gemma-encoder sweep "
            f"--results={folder}"
        )
    done = {}
    failed = {}
    shared = {}
    for path in sorted(folder.rglob("seed_*.json")):
        content = _load(path)
        key = _run_key(path, content)
        expected = key.file(folder, failed="error" in content)
        if path != expected:
            raise InputError(f"{path} has the result of {key}, which belongs in {expected}")
        if "error" in content:
            failed[key] = str(content["error"])
        elif "same_as" in content:
            shared[key] = content
        else:
            done[key] = _checked(path, content)
    by_path = {key.file(folder): content for key, content in done.items()}
    for key, content in shared.items():
        source = folder / str(content["same_as"])
        if source not in by_path:
            raise InputError(f"{key.file(folder)} refers to {source}, which is not a result")
        done[key] = {**by_path[source], **content}
        by_path[key.file(folder)] = done[key]
    return Results(done, {key: error for key, error in failed.items() if key not in done})


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a result: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a result: not a JSON object")
    return content


def _run_key(path: pathlib.Path, content: Mapping[str, Any]) -> RunKey:
    fields = {field.name: field.type for field in dataclasses.fields(RunKey)}
    _check_fields(path, content, fields)
    return RunKey(**{name: content[name] for name in fields})


def _check_fields(
    path: pathlib.Path, content: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is not a result: its field {name!r} is {content.get(name)!r}")


def _checked(path: pathlib.Path, content: dict[str, Any]) -> dict[str, Any]:
    _check_fields(path, content, FIELDS)
    main = content["main_metric"]
    if main not in content["metrics"] or main not in content["outcomes"]:
        raise InputError(f"{path} is not a result: it lacks its main metric {main!r}")
    for outcome in content["outcomes"].values():
        columns = [
            outcome.get(name) for name in ("labels", "predictions", "groups") if name in outcome
        ]
        if not (columns or "values" in outcome) or len({len(column) for column in columns}) > 1:
            raise InputError(
                f"{path} is not a result: its outcomes are not one label and one prediction of "
                "each example"
            )
    return content
