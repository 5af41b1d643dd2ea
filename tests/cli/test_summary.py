"""The final summary: metrics beside chance, and a table of the classes."""

import re
import shlex

import numpy as np
import pytest
from etils import epath

from gemma_encoder.cli import summary
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.task import ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.training.loop import TrainingResult
from tests.evaluation.conftest import table, task
from tests.evaluation.test_vector_search import QUERIES, searched


def printed(tmp_path, of_task, outputs, labels, split="validation", **facts):
    (tmp_path / "predictions").mkdir()
    examples = labels if isinstance(labels, ExampleTable) else table(labels)
    predictions = Predictions(of_task, split, outputs, examples, **facts)
    suffix = split.removeprefix("validation")
    metrics = {f"{name}{suffix}": value for name, value in predictions.metrics().items()}
    result = TrainingResult(
        step=4,
        metrics={of_task.name: metrics},
        predictions={of_task.name: [predictions]},
        checkpoint=epath.Path(tmp_path / "checkpoints" / "4"),
        seconds=0.0,
    )
    return summary._summary(result, "validation").splitlines()


def bounds_out(row):
    """Returns a row of the table without its interval."""
    return re.sub(r"-?\d\.\d{3} to -?\d\.\d{3}", "", row)


def cells(lines, start):
    (line,) = [line for line in lines if line.startswith(start)]
    return line.split()


@pytest.mark.parametrize("split", ["validation", "validation_matched"])
def test_each_metric_has_its_own_chance(tmp_path, split):
    of_task = Task("mood", "classification", Template("{x}"), classes=("sad", "so so", "glad"))
    outputs = np.eye(3)[[0, 0, 1, 2]]
    lines = printed(tmp_path, of_task, outputs, [0, 0, 0, 2], split, constant=[0.8, 0.1, 0.1])
    suffix = split.removeprefix("validation")
    assert lines[1].split() == ["task", "metric", "validation", "95", "%", "interval", "chance"]
    assert [[*line.split()[1:3], line.split()[-1]] for line in lines[2:4]] == [
        [f"accuracy{suffix}", "0.750", "0.750"],
        [f"macro_f1{suffix}", "0.600", "0.429"],
    ]
    bounds = re.search(r"(0\.\d{3}) to (0\.\d{3})", lines[2])
    assert 0.2 < float(bounds[1]) < 0.75 < float(bounds[2]) < 1  # three of four
    assert cells(lines, "sad") == ["sad", "1.000", "0.667", "0.800", "3"]
    assert cells(lines, "so so") == ["so", "so", "0.000", "0.000", "0.000", "0"]
    columns = [line for line in lines if "precision" in line or line.startswith(("sad", "so so"))]
    assert len(columns) == 3 and len({len(line) for line in columns}) == 1


def test_errors_are_marked_and_beside_the_mean(tmp_path):
    of_task = task("regression", ("pearson", "mae", "r2"), label_range=(0.0, 5.0))
    lines = printed(tmp_path, of_task, np.array([1.0, 2, 4]), [1, 2, 3], constant=3.0)
    rows = [line for line in lines if line.startswith("t  ")]
    assert [bounds_out(row).split()[1:] for row in rows] == [
        ["pearson", "0.982", "0.000"],
        ["mae", "↓", "0.333", "1.000"],
        ["r2", "0.500", "-1.500"],
    ]
    assert len({len(row) for row in rows}) == 1
    assert not any("precision" in line for line in lines)


def test_the_next_command_can_be_pasted(tmp_path):
    folder = tmp_path / "a run's"
    folder.mkdir()
    mood = Task("mood", "classification", Template("{x}"), classes=("sad", "glad"))
    *_, line = printed(folder, mood, np.eye(2), [0, 1])
    arguments = ["predict", f"--workdir={folder}", "--task=mood"]
    assert shlex.split(line)[-4:-1] == arguments
    assert shlex.split(line)[-1] == f"--input={folder}/predictions/mood.examples.jsonl"


@pytest.mark.parametrize("first_stage", [True, False])
def test_ranking_has_a_random_order_and_a_first_stage(tmp_path, first_stage):
    of_task = task("ranking", ("mrr@10", "ndcg@10"))
    examples = table([0, 1], queries=["q", "q"], documents=["a", "b"])
    lines = printed(tmp_path, of_task, np.array([0, 1]), examples, first_stage=first_stage)
    names = ["task", "metric", "validation", "95", "%", "interval", "chance", "first", "stage"]
    assert lines[1].split() == names[: 9 if first_stage else 7]
    rows = [line for line in lines if line.startswith("t  ")]
    values = [["mrr@10", "1.000", "0.750", "0.500"], ["ndcg@10", "1.000", "0.815", "0.631"]]
    shown = [bounds_out(row).split()[1:] for row in rows]
    assert shown == [row[: 3 + first_stage] for row in values]
    assert len({len(line) for line in [lines[1], *rows]}) == 1
    assert any(line.startswith("first stage: ") for line in lines) == first_stage


def test_many_classes_are_cut_to_the_worst(tmp_path):
    names = tuple(f"class {index:03}" for index in range(100))
    of_task = Task("topic", "classification", Template("{x}"), classes=names)
    lines = printed(tmp_path, of_task, np.eye(100)[[0, 1, 2]], [0, 1, 99])
    assert len([line for line in lines if line.startswith("class ")]) == 20
    assert (
        "the 20 of lowest F1; 80 more classes in predictions/topic.validation.metrics.json" in lines
    )


def test_long_class_names_differ_in_the_table(tmp_path):
    names = tuple(f"a long name of which only the end tells, number {i}" for i in range(3))
    of_task = Task("mood", "classification", Template("{x}"), classes=names)
    lines = printed(tmp_path, of_task, np.eye(3)[[0, 1, 2]], [0, 1, 2])
    assert [line for line in lines if line.startswith("a long name") and "number 1 " in line]
    assert len({line.partition("  ")[0] for line in lines if line.startswith("a long")}) == 3


def test_a_search_shows_the_best_documents(tmp_path):
    predictions = searched()
    predictions.outputs[:2] = predictions.outputs[QUERIES : QUERIES + 2]
    predictions.qrels["q0"] = {"d0": 1}
    predictions.qrels["q1"] = {"d0": 1}
    del predictions.qrels["q2"]
    lines = printed(
        tmp_path, predictions.task, predictions.outputs, predictions.table, qrels=predictions.qrels
    )
    start = lines.index("find:")
    assert lines[start + 1 : start + 3] == [
        "  query 0  ->  text 0 (relevant)",
        "  query 1  ->  text 1 (not relevant)",
    ]
    assert re.fullmatch(r"  query 2  ->  text \d+", lines[start + 3])
    assert shlex.split(lines[-1])[-4:] == [
        "index",
        f"--model={tmp_path}",
        "--collection=collection.tsv",
        "--output=INDEX",
    ]
    assert not (tmp_path / "predictions" / "find.examples.jsonl").exists()
