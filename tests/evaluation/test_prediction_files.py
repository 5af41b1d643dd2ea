"""Damage of the files of `predictions/` is noticed by every reader, and repaired by evaluating."""

import json
import shutil

import numpy as np
import pytest

from gemma_encoder import digests, whole_files
from gemma_encoder.evaluation import details
from gemma_encoder.evaluation.prediction_files import (
    check_prediction_files,
    write_prediction_files,
)
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.evaluation.submission import make_submission
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.report.runs import RunFiles

TASKS = (
    Task("mood", "classification", Template("{text}"), metrics=("accuracy",), classes=("a", "b")),
    Task("search", "ranking", Template("{query} {document}"), metrics=("mrr@10",)),
)


def write_run(workdir):
    """Writes a workdir with predictions of a classification and of a ranking task."""
    lines = []
    for task in TASKS:
        table = ExampleTable()
        for index in range(6):
            fields = dict.fromkeys(task.template.fields, f"text {index}")
            query = f"q{index // 3}" if task.kind.ranks else ""
            table.add(Example(fields, float(index % 2), query, f"d{index}" if query else ""))
        outputs = np.linspace(0.1, 0.9, 6)
        if not task.kind.ranks:
            outputs = np.stack([outputs, 1 - outputs], axis=1)
        predictions = Predictions(task, "validation", outputs, table, first_stage=True)
        predictions.write(workdir / "predictions")
        values = {"step": 1, **predictions.metrics()}
        details.write_details(workdir / "predictions", task.name, "validation", values)
        lines.append({"step": 1, "split": "validation", "task": task.name, **values})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "config.json").write_text("{}")
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


NAMES = sorted(
    ["mood.validation.jsonl", "mood.validation.mistakes.jsonl", "mood.validation.metrics.json"]
    + [f"search.validation.{end}" for end in ("trec", "tsv", "qrels", "first_stage.trec")]
    + ["search.validation.queries.jsonl", "search.validation.metrics.json", digests.NAME]
)


def test_every_file_has_a_digest(run):
    assert sorted(path.name for path in (run / "predictions").iterdir()) == NAMES
    listed = json.loads((run / "predictions" / digests.NAME).read_text())["files"]
    assert sorted([*listed, digests.NAME]) == NAMES
    RunFiles.load(run, "run")


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed_by_the_report(run, tmp_path, name, how):
    workdir = shutil.copytree(run, tmp_path / "run")
    path = workdir / "predictions" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "delete":
        path.unlink()
    else:
        flipped = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] + (flipped if how == "flip" else b""))
    if (name, how) == (digests.NAME, "delete"):
        RunFiles.load(workdir, "run")  # as a folder of a former version
        return
    with pytest.raises(InputError, match=rf"{name} is .*; run gemma-encoder evaluate") as caught:
        RunFiles.load(workdir, "run")
    assert "\n" not in str(caught.value)
    write_run(workdir)  # the advice is followed
    RunFiles.load(workdir, "run")


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_damage_is_noticed_by_submissions(tmp_path, how):
    folder = tmp_path / "predictions"
    write_prediction_files(folder, {"glue_cola.test.jsonl": ['{"idx": 0, "prediction": 1}\n']})
    path = folder / "glue_cola.test.jsonl"
    if how == "flip":
        path.write_text('{"idx": 0, "prediction": 0}\n')
    else:
        path.unlink()
    message = r"glue_cola.test.jsonl is .*; run gemma-encoder evaluate again"
    with pytest.raises(InputError, match=message):
        make_submission("glue", [tmp_path])


def test_damage_is_noticed_by_readers_of_details(run, tmp_path):
    folder = shutil.copytree(run / "predictions", tmp_path / "predictions")
    assert details.read_details(folder, "mood", "validation", 1)["step"] == 1
    path = folder / "mood.validation.metrics.json"
    path.write_text(path.read_text().replace(' "step": 1', ' "step": 2'))
    with pytest.raises(InputError, match=r"mood.validation.metrics.json is damaged.*evaluate"):
        details.read_details(folder, "mood", "validation", 2)


@pytest.mark.parametrize("call", range(6))
def test_a_kill_in_between_leaves_nothing_damaged(tmp_path, monkeypatch, call):
    write_prediction_files(tmp_path, {"a": ["old\n"], "b": ["old\n"]})
    calls = iter(range(9))
    replace = whole_files.os.replace

    def killed(*paths):
        if next(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "replace", killed)
        try:
            write_prediction_files(tmp_path, {"a": ["new\n"], "b": ["new\n"], "c": ["new\n"]})
        except KeyboardInterrupt:
            assert call < 5
    check_prediction_files(tmp_path)
    assert (tmp_path / "a").read_text() in ("old\n", "new\n")


def test_a_run_that_writes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    """The digests were read before the files were replaced."""
    write_prediction_files(tmp_path, {"a": ["old\n"]})
    read = digests._read

    def slow(folder):
        stale = read(folder)
        with monkeypatch.context() as patch:
            patch.setattr(digests, "_read", read)
            write_prediction_files(tmp_path, {"a": ["new, and longer\n"]})
        monkeypatch.setattr(digests, "_read", read)
        return stale

    monkeypatch.setattr(digests, "_read", slow)
    check_prediction_files(tmp_path)


def test_lines_are_not_held_in_memory(tmp_path):
    """Sixteen megabytes are written by lines that are made one by one."""
    import tracemalloc

    tracemalloc.start()
    write_prediction_files(tmp_path, {"a": (f"{index:01023d}\n" for index in range(1 << 14))})
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert (tmp_path / "a").stat().st_size == 1 << 24
