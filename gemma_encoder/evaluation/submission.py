"""The zip files that the GLUE and SuperGLUE leaderboards take: written from predictions of the test splits, read back and checked.

    gemma-encoder submit make --benchmark=glue --output=glue.zip WORKDIR [WORKDIR …]
    gemma-encoder submit check glue.zip

The predictions are those of `gemma-encoder evaluate --config.evaluate_split=test`, from one workdir or several.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.data import registry
from gemma_encoder.evaluation.leaderboards import BENCHMARKS, HEADER, IDS, File, Line
from gemma_encoder.evaluation.metrics import choose
from gemma_encoder.evaluation.predictions import prediction_file
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Example, ExampleTable


def make_submission(benchmark: str, workdirs: Sequence[epath.PathLike]) -> bytes:
    """A submission, as a zip file, from the prediction files of some workdirs; `check` says whether it is complete.

    Args:
        benchmark: "glue" or "superglue".
        workdirs: of the runs that predicted the test splits; each task's predictions lie in one of them.

    Raises:
        InputError: predictions are missing, ambiguous or malformed.
    """
    if benchmark not in BENCHMARKS:
        raise unknown("benchmark", benchmark, BENCHMARKS)
    places = {file: _find(file, workdirs) for file in BENCHMARKS[benchmark]}
    missing = [f"{file.task}.{file.split}" for file, found in places.items() if not found]
    if missing:
        raise InputError(
            f"no predictions of {', '.join(missing)} in {', '.join(map(str, workdirs))}; make them by "
            "gemma-encoder evaluate with the run's config and --config.evaluate_split=test"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, (path, *others) in places.items():
            if others:
                raise InputError(
                    f"{file.task}.{file.split} was predicted in two workdirs: {path} and {others[0]}; name one of them"
                )
            content = _write(file, _read_predictions(path))
            archive.writestr(zipfile.ZipInfo(file.name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _find(file: File, workdirs: Sequence[epath.PathLike]) -> list[epath.Path]:
    paths = [
        prediction_file(epath.Path(workdir) / "predictions", file.task, file.split)
        for workdir in workdirs
    ]
    return [path for path in paths if path.exists()]


def _read_predictions(path: epath.Path) -> list[Line]:
    lines = []
    for number, text in enumerate(_lines(path.read_text()), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not a JSON object ({error.msg}); predict again"
            ) from error
        if not isinstance(line, dict) or not {"idx", "prediction"} <= line.keys():
            raise InputError(f"{path}:{number}: lacks 'idx' or 'prediction'; predict again")
        lines.append(line)
    if not lines:
        raise InputError(f"{path} is empty; predict again")
    return lines


def _lines(text: str) -> list[str]:
    """Lines as files have them: some characters that Unicode calls line breaks may stand inside a text."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _write(file: File, lines: Sequence[Line]) -> str:
    task = registry.get(file.task).task
    if task.is_list:
        table = ExampleTable()
        for line in lines:
            table.add(Example({}, line["label"], line["query"], line["document"]))
        lines = [
            lines[example]
            for example in choose(table, np.array([line["prediction"] for line in lines])).values()
        ]
    labels = [(line["idx"], file.label.write(task, line)) for line in lines]
    if file.name.endswith(".tsv"):
        return "".join(
            f"{row}\n" for row in [HEADER, *(f"{idx}\t{label}" for idx, label in sorted(labels))]
        )
    objects = (
        _nest(labels)
        if isinstance(labels[0][0], dict)
        else [{"idx": idx, "label": label} for idx, label in sorted(labels)]
    )
    return "".join(json.dumps(entry) + "\n" for entry in objects)


def _nest(labels: Sequence[tuple[Mapping[str, int], Any]]) -> list[dict[str, Any]]:
    """MultiRC's labels: answers under their question, questions under their paragraph."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for (paragraph, question, answer), label in sorted(
        (tuple(idx[name] for name in IDS), label) for idx, label in labels
    ):
        paragraphs.setdefault(paragraph, {}).setdefault(question, []).append(
            {"idx": answer, "label": label}
        )
    return [
        {
            "idx": paragraph,
            "passage": {
                "questions": [
                    {"idx": question, "answers": answers} for question, answers in questions.items()
                ]
            },
        }
        for paragraph, questions in paragraphs.items()
    ]


def read_submission(content: bytes, benchmark: str) -> dict[str, dict[Any, Any]]:
    """The labels of every file of a submission by their index; MultiRC's by (paragraph, question, answer).

    Raises:
        InputError: it is no zip file, or a file in it is missing, not expected or malformed, with the first fault of each.
    """
    files = {file.name: file for file in BENCHMARKS[benchmark]}
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise InputError("the submission is not a zip file") from error
    listed = archive.namelist()
    present = set(listed)
    faults = [f"{name} is missing" for name in files if name not in present]
    faults += [f"{name} is there twice" for name in files if listed.count(name) > 1]
    faults += [
        f"{name} does not belong there; files lie at the top, under the names {', '.join(files)}"
        for name in sorted(present - files.keys())[:1]
    ]
    labels = {}
    for name in (name for name in files if name in present):
        try:
            labels[name] = _parse(files[name], archive.read(name))
        except InputError as error:
            faults.append(str(error))
        except zipfile.BadZipFile as error:
            faults.append(f"{name} is damaged: {error}")
    if faults:
        raise InputError("; ".join(faults))
    return labels


def _parse(file: File, content: bytes) -> dict[Any, Any]:
    try:
        lines = _lines(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not valid UTF-8") from error
    table = file.name.endswith(".tsv")
    if table and lines[:1] != [HEADER]:
        raise InputError(
            f"{file.name} line 1: expected the header {HEADER!r}, got {lines[0] if lines else ''!r}"
        )
    task, labels = registry.get(file.task).task, {}
    for number, line in enumerate(lines[1:] if table else lines, 2 if table else 1):
        where = f"{file.name} line {number}"
        for index, label in (
            _parse_row(line, where)
            if table
            else _parse_object(line, where, file.task == "superglue_multirc")
        ):
            if index in labels:
                raise InputError(f"{where}: index {index} appears a second time")
            if not file.label.valid(task, label):
                raise InputError(
                    f"{where}: label {label!r} of index {index}: expected {file.label.expected(task)}"
                )
            labels[index] = label
    return labels


def _parse_row(line: str, where: str) -> list[tuple[int, str]]:
    index, tab, label = line.partition("\t")
    if not tab or "\t" in label or not (index.isascii() and index.isdigit()):
        raise InputError(
            f"{where}: expected a whole number, a tab and the prediction, got {line[:80]!r}"
        )
    return [(int(index), label)]


def _parse_object(line: str, where: str, nested: bool) -> list[tuple[Any, Any]]:
    shape = (
        '{"idx", "passage": {"questions": [{"idx", "answers": [{"idx", "label"}]}]}}'
        if nested
        else '{"idx", "label"}'
    )
    try:
        entry = json.loads(line)
        if nested:
            found = [
                ((entry["idx"], question["idx"], answer["idx"]), answer["label"])
                for question in entry["passage"]["questions"]
                for answer in question["answers"]
            ]
        else:
            found = [(entry["idx"], entry["label"])]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{where}: expected an object {shape}, got {line[:80]!r}") from error
    for index, _ in found:
        if not all(type(part) is int and part >= 0 for part in (index if nested else [index])):
            raise InputError(f"{where}: idx must be a whole number from 0, got {index!r}")
    return found


def check_submission(
    content: bytes, benchmark: str, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many predictions each file of a submission holds; raises InputError, with all faults in one line, unless it is complete and valid.

    Args:
        content: the zip file.
        benchmark: "glue" or "superglue".
        sizes: predictions that each file must hold, by its name; by default the real test sets'.
    """
    faults, counts = [], {}
    for name, labels in read_submission(content, benchmark).items():
        count = (
            next(file.count for file in BENCHMARKS[benchmark] if file.name == name)
            if sizes is None
            else sizes[name]
        )
        counts[name] = len(labels)
        if len(labels) != count:
            faults.append(f"{name} holds {len(labels)} predictions, expected {count}")
        elif benchmark == "glue" and labels.keys() != set(
            range(count)
        ):  # rows of the test file; SuperGLUE numbers its own
            faults.append(
                f"{name}: index {min(set(range(count)) - labels.keys())} is missing; expected 0 to {count - 1}"
            )
    if faults:
        raise InputError("; ".join(faults))
    return counts


def benchmark_of(content: bytes) -> str:
    """The benchmark that a submission is for, by the names of its files."""
    try:
        names = set(zipfile.ZipFile(io.BytesIO(content)).namelist())
    except zipfile.BadZipFile as error:
        raise InputError("the submission is not a zip file") from error
    best = max(
        BENCHMARKS, key=lambda benchmark: len(names & {file.name for file in BENCHMARKS[benchmark]})
    )
    if not names & {file.name for file in BENCHMARKS[best]}:
        raise InputError(
            f"the submission holds no file of {' or '.join(BENCHMARKS)}; files lie at the top, e.g. {BENCHMARKS[best][0].name}"
        )
    return best
