"""Targets of fuzzing: files of every kind, and the door through which each is read."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import gemma_encoder as ge
from gemma_encoder.evaluation import leaderboards
from tests.fuzz import doors, originals
from tests.fuzz.cases import Reading, Target, is_same

MEMBERS = tuple(file.name for files in leaderboards.BENCHMARKS.values() for file in files)
ADVICE = "whole checkpoint before it|has no checkpoint; give the workdir"
# People may edit these; nothing says what was in them.
LOGS = ("config.json", "metrics.jsonl")


def targets(root: pathlib.Path) -> list[Target]:
    """Returns the targets over the originals that were made in a folder."""
    return [*_targets_of_models(root), *_targets_of_predictions(root), *_targets_of_data(root)]


def _targets_of_models(root: pathlib.Path) -> list[Target]:
    """Returns those of checkpoints, runs and exports."""

    @functools.cache
    def older(door: Callable[[pathlib.Path], Any]) -> Any:
        return door(root / "older")

    def falls_back(door: Callable[[pathlib.Path], Any]) -> Callable[[Reading], bool]:
        """Accepts the run's first checkpoint once nothing is left of its second."""
        return lambda reading: _is_gone(reading) and is_same(reading.answer, older(door))

    evaluate = functools.partial(doors.evaluate, originals.config())
    resume = functools.partial(doors.resume, originals.config())
    load, transformer = doors.load_predictor, doors.load_transformer
    return [
        Target("checkpoint", "checkpoint", load, 6),
        Target("workdir", "run", load, 6, falls_back(load), advice=ADVICE),
        Target("checkpoint as backbone", "checkpoint", transformer, 2),
        Target("checkpoint, inspected", "checkpoint", doors.inspect, 2),
        Target("checkpoint without digests", "run_without_digests", load, 3, is_checked=False),
        Target("training, resumed", "run", resume, 1),
        Target("evaluation", "run", evaluate, 1, falls_back(evaluate)),
        Target("export", "export", load, 6),
        Target("export as backbone", "export", transformer, 2),
        Target("export without digests", "export_without_digests", load, 3, is_checked=False),
        Target("gemma", "gemma", transformer, 3),
        Target("gemma without digests", "gemma_without_digests", transformer, 2, is_checked=False),
    ]


def _targets_of_predictions(root: pathlib.Path) -> list[Target]:
    """Returns those of predictions, reports and submissions."""

    @functools.cache
    def predictor() -> ge.Predictor:
        return ge.Predictor.load(root / "run")

    def partial(suffix: str) -> Callable[[pathlib.Path], Any]:
        def read(copy: pathlib.Path) -> Any:
            task = predictor().tasks["toy_sentiment"]
            return doors.predict_file(predictor(), task, root / "texts.txt", copy / f"out.{suffix}")

        return read

    made = functools.partial(doors.make_submission, "glue")
    check = doors.check_submission
    return [
        Target("prediction, jsonl", "part_jsonl", partial("jsonl"), 4),
        Target("prediction, csv", "part_csv", partial("csv"), 3),
        Target("prediction, parquet", "part_parquet", partial("parquet"), 3),
        Target("report", "run", doors.render_report, 3, _is_about_less),
        Target("metrics", "run", doors.read_log, 1, _lines_are_there),
        Target("submission, made", "predictions", made, 4, names=MEMBERS),
        Target("submission, glue", "submission_glue", check, 4, names=MEMBERS),
        Target("submission, superglue", "submission_superglue", check, 4, names=MEMBERS),
    ]


def _targets_of_data(root: pathlib.Path) -> list[Target]:
    """Returns those of prepared tasks and of the cache."""
    prepared = functools.partial(doors.read_prepared, tokenizer=ge.Tokenizer.load("small"))
    cached = functools.partial(doors.read_caches, root / "sources")
    return [
        Target("prepared", "prepared", prepared, 4),
        Target(
            "prepared without digests", "prepared_without_digests", prepared, 2, is_checked=False
        ),
        Target("cache", "cache", cached, 4),
    ]


def _is_gone(reading: Reading) -> bool:
    """Returns True if the newest checkpoint is gone or empty, or a warning says it is not used."""
    newest = reading.copy / "checkpoints" / str(originals.STEPS[-1])
    return not any(path.is_file() for path in newest.rglob("*")) or str(newest) in reading.log


def _is_about_less(reading: Reading) -> bool:
    """Returns True if a report lacks what is gone, or shows a file that people may edit."""
    return (
        (reading.file.name in LOGS and reading.file.parent == reading.copy)
        or _is_gone(reading)
        or not any((reading.copy / "predictions").glob("*"))
    )


def _lines_are_there(reading: Reading) -> bool:
    """Returns True if every whole line of the damaged log was read."""
    path = reading.copy / "metrics.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    expected = {json.dumps(line) for line in reading.expected}
    whole = [
        line
        for line in content.decode("utf-8", "replace").split("\n")
        if any(line == other for other in expected)
    ]
    read = [json.dumps(line) for line in reading.answer]
    return all(line in read for line in whole)
