"""A finished run as one compact file, `RESULTS/STUDY/ROW/TASK/seed_N.json`: all that tables need, so that workdirs may go.

Beside it may lie `seed_N.failed.json`: why a run failed, in one line. A run that is the same as another study's points to it (`same_as`).
The scale `mini` lies there itself; other scales in a folder of their name: `RESULTS/gemma2_2b/STUDY/…`.
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
from gemma_encoder.inputs.task import ExampleTable

CANDIDATES = 100  # of a query, whose scores are kept for interpolation: the first stage's best
FIELDS = {  # what every result holds, and of which kind
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
    """Which run it is.

    Attributes:
        study, row, task, scale: by name.
        seed: its seed.
    """

    study: str
    row: str
    task: str
    scale: str
    seed: int

    def file(self, folder: pathlib.Path, failed: bool = False) -> pathlib.Path:
        """Where its result lies, or what is said of its failure."""
        above = folder if self.scale == MINI else folder / self.scale
        return (
            above
            / self.study
            / self.row
            / self.task
            / f"seed_{self.seed}{'.failed' if failed else ''}.json"
        )


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a folder holds.

    Attributes:
        done: the results, those that were shared too.
        failed: what failed, and why.
    """

    done: Mapping[RunKey, Mapping[str, Any]]
    failed: Mapping[RunKey, str]


def outcomes(predictions: Sequence[Predictions], main: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the paired bootstrap needs of each split that was evaluated, by the name of its main metric.

    Args:
        predictions: of each split.
        main: the name of the main metric on each, as it stands among a run's metrics.
    """
    return {name: _outcome(found) for name, found in zip(main, predictions, strict=True)}


def _outcome(found: Predictions) -> dict[str, Any]:
    task, table = found.task, found.table
    kind = task.kind
    if kind.ranks:
        return _ranking(found)
    if kind.is_list:
        return {
            "values": {
                name: _each_question(metrics.METRICS[kind.name][name], found)
                for name in task.metrics[:1]
            },
            "options": _sizes(table),
        }
    if kind.has_range:
        return {
            "labels": [round(float(label), 5) for label in table.labels],
            "predictions": [round(float(value), 5) for value in found.outputs],
        }
    result = {
        "labels": [int(label) for label in table.labels],
        "predictions": kind.decide(task, found.outputs).tolist(),
    }
    if any(table.query_ids):  # answers to one question, halves of one pair: they are drawn together
        numbers = {name: number for number, name in enumerate(table.groups())}
        result["groups"] = [numbers[name] for name in table.query_ids]
    return result


def _sizes(table: ExampleTable) -> list[int]:
    return [len(group) for group in table.groups().values()]


def _each_question(metric: metrics.Metric, found: Predictions) -> list[float]:
    """A metric of every question by itself."""
    labels, values = np.array(found.table.labels), []
    for group in found.table.groups().values():
        part = ExampleTable(
            query_ids=[found.table.query_ids[i] for i in group],
            infos=[found.table.infos[i] for i in group],
        )
        values.append(round(metric(labels[group], found.outputs[group], part), 6))
    return values


def _ranking(found: Predictions) -> dict[str, Any]:
    """The metrics of every judged query, of the run and of the first stage; scores and grades of the first candidates, in its order."""
    judged, table = found.relevance_grades(), found.table
    groups = table.groups()
    result: dict[str, Any] = {
        "queries": list(judged),
        "values": _each_query(found, judged, found.run()),
    }
    order = -np.arange(len(table.query_ids), dtype=np.float32)
    if found.first_stage:
        result["first_stage"] = _each_query(
            found, judged, ranking.make_run(table.query_ids, table.document_ids, order)
        )
    kept = [groups.get(query, [])[:CANDIDATES] for query in judged]
    result["scores"] = [[round(float(found.outputs[i]), 5) for i in group] for group in kept]
    result["grades"] = [
        [int(judged[query].get(table.document_ids[i], 0)) for i in group]
        for query, group in zip(judged, kept, strict=True)
    ]
    return result


def _each_query(
    found: Predictions, judged: Mapping[str, Mapping[str, float]], run: ranking.Run
) -> dict[str, list[float]]:
    values = {name: ranking.by_query(name, judged, run) for name in found.task.metrics}
    return {
        name: [round(by_query[query], 6) for query in judged] for name, by_query in values.items()
    }


def write_result(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    partial.replace(path)


def read_results(folder: pathlib.Path) -> Results:
    """Everything in a folder of results; raises InputError for a file that is none."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder of results; make one with gemma-encoder sweep --results={folder}"
        )
    done, failed, shared = {}, {}, {}
    for path in sorted(folder.rglob("seed_*.json")):
        content = _load(path)
        place = _run_key(path, content)
        if place.file(folder, failed="error" in content) != path:
            raise InputError(f"{path} says it is {place}; it does not belong there")
        if "error" in content:
            failed[place] = str(content["error"])
        elif "same_as" in content:
            shared[place] = content
        else:
            done[place] = _checked(path, content)
    for place, content in shared.items():
        source = folder / str(content["same_as"])
        found = next(
            (value for other, value in list(done.items()) if other.file(folder) == source), None
        )
        if found is None:
            raise InputError(
                f"{place.file(folder)} says it is the same as {source}, which is no result"
            )
        done[place] = {**found, **content}
    return Results(done, {place: error for place, error in failed.items() if place not in done})


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no result: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no result: not a JSON object")
    return content


def _run_key(path: pathlib.Path, content: Mapping[str, Any]) -> RunKey:
    fields = {field.name: field.type for field in dataclasses.fields(RunKey)}
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is no result: its field {name!r} is {content.get(name)!r}")
    return RunKey(**{name: content[name] for name in fields})


def _checked(path: pathlib.Path, content: dict[str, Any]) -> dict[str, Any]:
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is no result: its field {name!r} is {content.get(name)!r}")
    main = content["main_metric"]
    if main not in content["metrics"] or main not in content["outcomes"]:
        raise InputError(f"{path} is no result: it lacks its main metric {main!r}")
    for outcome in content["outcomes"].values():
        columns = [
            outcome.get(name) for name in ("labels", "predictions", "groups") if name in outcome
        ]
        if not (columns or "values" in outcome) or len({len(column) for column in columns}) > 1:
            raise InputError(
                f"{path} is no result: its outcomes are not one label and one prediction of each example"
            )
    return content
