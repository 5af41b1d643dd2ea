"""The files that the GLUE and SuperGLUE leaderboards take, and how each writes a label."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemma_encoder.inputs.task import Task

Line = Mapping[str, Any]  # one line of a prediction file

HEADER = "index\tprediction"  # of a .tsv file
IDS = ("paragraph", "question", "answer")  # of MultiRC, whose labels are nested


@dataclasses.dataclass(frozen=True)
class Label:
    """How a benchmark writes a prediction.

    Attributes:
        write: the label, from a line of a prediction file.
        valid: whether a label that was read may stand there.
        expected: what may, in words.
    """

    write: Callable[[Task, Line], Any]
    valid: Callable[[Task, Any], bool]
    expected: Callable[[Task], str]


def _words(form: Callable[[str], str] = str) -> Label:
    def words(task: Task) -> list[str]:
        return [form(name) for name in task.classes]

    return Label(
        lambda task, line: words(task)[line["prediction"]],
        lambda task, value: value in words(task),
        lambda task: f"one of {', '.join(words(task))}",
    )


def _is_score(task: Task, value: Any) -> bool:
    try:
        return task.label_range[0] <= float(value) <= task.label_range[1]
    except ValueError:
        return False


def _is_bit(task: Task, value: Any) -> bool:
    return type(value) is int and value in (0, 1)


CLASS = _words()
LOWER_CLASS = _words(str.lower)
CLASS_INDEX = Label(
    lambda task, line: str(line["prediction"]),
    lambda task, value: value in ("0", "1"),
    lambda task: "0 or 1",
)
SCORE = Label(
    lambda task, line: (
        f"{min(max(line['prediction'], task.label_range[0]), task.label_range[1]):.3f}"
    ),
    _is_score,
    lambda task: "a number from {:g} to {:g}".format(*task.label_range),
)
ANSWER = Label(lambda task, line: line["prediction"], _is_bit, lambda task: "0 or 1")
OPTION_INDEX = Label(lambda task, line: int(line["document"]), _is_bit, lambda task: "0 or 1")
OPTION_TEXT = Label(
    lambda task, line: line["option"],
    lambda task, value: isinstance(value, str) and bool(value.strip()),
    lambda task: "an entity of the passage",
)


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a submission.

    Attributes:
        name: as the leaderboard wants it.
        task: whose predictions it holds.
        label: how they are written.
        count: how many the test set has.
        split: of the task.
    """

    name: str
    task: str
    label: Label
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
    # Letter case as in the benchmark's own toolkit, jiant 1: WSC alone writes True and False.
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
