"""Submission files of the GLUE and SuperGLUE leaderboards, and their label formats."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemma_encoder.inputs.task import Task

Line = Mapping[str, Any]  # one line of a prediction file

HEADER = "index\tprediction"  # of a .tsv file
IDS = ("paragraph", "question", "answer")  # of MultiRC, whose labels are nested


@dataclasses.dataclass(frozen=True)
class LabelFormat:
    """Format of a submission file's labels.

    Attributes:
        write: converts a line of a prediction file to a label.
        valid: tells if a label that was read is valid.
        expected: describes the valid labels, for error messages.
    """

    write: Callable[[Task, Line], Any]
    valid: Callable[[Task, Any], bool]
    expected: Callable[[Task], str]


def _class_names(spell: Callable[[str], str] = str) -> LabelFormat:
    def names(task: Task) -> list[str]:
        return [spell(name) for name in task.classes]

    return LabelFormat(
        lambda task, line: names(task)[line["prediction"]],
        lambda task, value: value in names(task),
        lambda task: f"one of {', '.join(names(task))}",
    )


def _write_score(task: Task, line: Line) -> str:
    low, high = task.label_range
    return f"{min(max(line['prediction'], low), high):.3f}"


def _is_score(task: Task, value: Any) -> bool:
    low, high = task.label_range
    try:
        return low <= float(value) <= high
    except ValueError:
        return False


def _is_bit(task: Task, value: Any) -> bool:
    return type(value) is int and value in (0, 1)


CLASS = _class_names()
LOWER_CLASS = _class_names(str.lower)
CLASS_INDEX = LabelFormat(
    lambda task, line: str(line["prediction"]),
    lambda task, value: value in ("0", "1"),
    lambda task: "0 or 1",
)
SCORE = LabelFormat(
    _write_score,
    _is_score,
    lambda task: "a number from {:g} to {:g}".format(*task.label_range),
)
ANSWER = LabelFormat(lambda task, line: line["prediction"], _is_bit, lambda task: "0 or 1")
OPTION_INDEX = LabelFormat(lambda task, line: int(line["document"]), _is_bit, lambda task: "0 or 1")
OPTION_TEXT = LabelFormat(
    lambda task, line: line["option"],
    lambda task, value: isinstance(value, str) and bool(value.strip()),
    lambda task: "an entity of the passage",
)


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a submission.

    Attributes:
        name: file name, as the leaderboard requires.
        task: name of the predicted task.
        label: format of the labels.
        count: number of test examples.
        split: split of the task.
    """

    name: str
    task: str
    label: LabelFormat
    count: int
    split: str = "test"


BENCHMARKS: Mapping[str, tuple[File, ...]] = {
    "glue": (
        File("CoLA.tsv", "glue_cola", CLASS_INDEX, 1063),
        File("SST-2.tsv", "glue_sst2", CLASS_INDEX, 1821),
        File("MRPC.tsv", "glue_mrpc", CLASS_INDEX, 1725),
        File("STS-B.tsv", "glue_stsb", SCORE, 1379),
        File("MNLI-m.tsv", "glue_mnli", CLASS, 9796, "test_matched"),
        File("MNLI-mm.tsv", "glue_mnli", CLASS, 9847, "test_mismatched"),
        File("QNLI.tsv", "glue_qnli", CLASS, 5463),
        File("QQP.tsv", "glue_qqp", CLASS_INDEX, 390965),
        File("RTE.tsv", "glue_rte", CLASS, 3000),
        File("WNLI.tsv", "glue_wnli", CLASS_INDEX, 146),
        File("AX.tsv", "glue_ax", CLASS, 1104),
    ),
    # Letter case as in the benchmark's own toolkit, jiant 1: only WSC writes True and False.
    "superglue": (
        File("BoolQ.jsonl", "superglue_boolq", LOWER_CLASS, 3245),
        File("CB.jsonl", "superglue_cb", CLASS, 250),
        File("COPA.jsonl", "superglue_copa", OPTION_INDEX, 500),
        File("MultiRC.jsonl", "superglue_multirc", ANSWER, 9693),
        File("ReCoRD.jsonl", "superglue_record", OPTION_TEXT, 10000),
        File("RTE.jsonl", "superglue_rte", CLASS, 3000),
        File("WiC.jsonl", "superglue_wic", LOWER_CLASS, 1400),
        File("WSC.jsonl", "superglue_wsc", CLASS, 146),
        File("AX-b.jsonl", "superglue_axb", CLASS, 1104),
        File("AX-g.jsonl", "superglue_axg", CLASS, 356),
    ),
}
