"""Submissions to the GLUE and SuperGLUE leaderboards: zip files, written, read and checked.

    gemma-encoder submit make --benchmark=glue --output=glue.zip WORKDIR [WORKDIR …]
    gemma-encoder submit check glue.zip

Predictions of the test splits are made by `gemma-encoder evaluate --config.evaluate_split=test`, in
one workdir or several.
"""

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.data import registry
from gemma_encoder.evaluation.leaderboards import BENCHMARKS, HEADER, IDS, File, Line
from gemma_encoder.evaluation.metrics import choose
from gemma_encoder.evaluation.prediction_files import (
    ADVICE,
    FOLDER,
    check_prediction_files,
    prediction_file,
)
from gemma_encoder.inputs.errors import InputError, in_one_line, reason, shortened, unknown
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.task import Example, ExampleTable
from gemma_encoder.inputs.untrusted import printable


def make_submission(benchmark: str, workdirs: Sequence[epath.PathLike]) -> bytes:
    """Builds a submission from prediction files; `check_submission` tests if it is complete.

    Args:
        benchmark: "glue" or "superglue".
        workdirs: workdirs of the runs that predicted the test splits; each task is predicted in
            exactly one of them.

    Returns:
        The content of a zip file.

    Raises:
        InputError: predictions are missing, ambiguous or malformed.
    """
    if benchmark not in BENCHMARKS:
        raise unknown("benchmark", benchmark, BENCHMARKS)
    paths = {file: _prediction_paths(file, workdirs) for file in BENCHMARKS[benchmark]}
    missing = [f"{file.task}.{file.split}" for file in paths if not paths[file]]
    if missing:
        searched = ", ".join(map(str, workdirs))
        raise InputError(
            f"no predictions of {', '.join(missing)} in {searched}; make them with "
            "gemma-encoder evaluate, the run's config and --config.evaluate_split=test"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, (path, *duplicates) in paths.items():
            if duplicates:
                raise InputError(
                    f"{file.task}.{file.split} was predicted in two workdirs: {path} and "
                    f"{duplicates[0]}; name one of them"
                )
            lines = _read_predictions(path)
            with in_one_line(f"{path} does not hold predictions of {file.task}", ADVICE):
                content = _write(file, lines)
            archive.writestr(zipfile.ZipInfo(file.name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _prediction_paths(file: File, workdirs: Sequence[epath.PathLike]) -> list[epath.Path]:
    paths = []
    for workdir in workdirs:
        path = prediction_file(epath.Path(workdir) / FOLDER, file.task, file.split)
        check_prediction_files(path.parent, [path.name])  # notices that it was deleted, too
        if path.exists():
            paths.append(path)
    return paths


def _read_predictions(path: epath.Path) -> list[Line]:
    lines = []
    content = path.read_bytes().removesuffix(b"\n")
    for line_number, text in enumerate(content.split(b"\n") if content else (), 1):
        try:
            line = from_json(text)
        except ValueError as error:
            raise InputError(
                f"{path}:{line_number}: not a JSON object ({reason(error)}); {ADVICE}"
            ) from error
        if not isinstance(line, dict) or not {"idx", "prediction"} <= line.keys():
            raise InputError(f"{path}:{line_number}: lacks 'idx' or 'prediction'; {ADVICE}")
        lines.append(line)
    if not lines:
        raise InputError(f"{path} is empty; {ADVICE}")
    return lines


def _split_lines(text: str) -> list[str]:
    """Splits at newlines only; `str.splitlines` also splits at Unicode line breaks inside texts."""
    if not text:
        return []
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _write(file: File, lines: Sequence[Line]) -> str:
    task = registry.get(file.task).task
    if task.is_list:
        lines = _best_options(lines)
    labels = [(line["idx"], file.label.write(task, line)) for line in lines]
    if file.name.endswith(".tsv"):
        rows = [HEADER, *(f"{idx}\t{label}" for idx, label in sorted(labels))]
        return "".join(f"{row}\n" for row in rows)
    if isinstance(labels[0][0], dict):
        objects = _nest(labels)
    else:
        objects = [{"idx": idx, "label": label} for idx, label in sorted(labels)]
    return "".join(to_json(entry) + "\n" for entry in objects)


def _best_options(lines: Sequence[Line]) -> list[Line]:
    """Returns the line of each question's best-scored option."""
    table = ExampleTable()
    for line in lines:
        table.add(Example({}, line["label"], line["query"], line["document"]))
    scores = np.array([line["prediction"] for line in lines])
    return [lines[example] for example in choose(table, scores).values()]


def _nest(labels: Sequence[tuple[Mapping[str, int], Any]]) -> list[dict[str, Any]]:
    """Nests MultiRC's labels: answers in questions, questions in paragraphs."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for (paragraph, question, answer), label in sorted(
        (tuple(idx[name] for name in IDS), label) for idx, label in labels
    ):
        questions = paragraphs.setdefault(paragraph, {})
        questions.setdefault(question, []).append({"idx": answer, "label": label})
    entries = []
    for paragraph, questions in paragraphs.items():
        nested = [{"idx": question, "answers": answers} for question, answers in questions.items()]
        entries.append({"idx": paragraph, "passage": {"questions": nested}})
    return entries


# What `zipfile` and its decompressors raise for damaged, encrypted or unknown content.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
LARGEST_FILE = 1 << 24  # bytes; the largest real one, of QQP, has 5 MB
LARGEST_LINE = 1 << 20  # bytes
LARGEST_ARCHIVE = 1 << 25  # bytes; GLUE's, without compression, has 10 MB
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)  # of little memory


def _open(content: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except _DAMAGE as error:
        raise InputError(f"it is not a zip file, or damaged: {reason(error)}") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a file of the archive; raises InputError if it is damaged or too large."""
    if archive.getinfo(name).compress_type not in METHODS:
        raise InputError(f"{name} is compressed by another method than deflate; zip it again")
    try:
        with archive.open(name) as file:
            content = file.read(LARGEST_FILE + 1)
    except _DAMAGE as error:
        raise InputError(f"{name} is damaged: {reason(error)}") from error
    if len(content) > LARGEST_FILE:
        raise InputError(f"{name} has more than {LARGEST_FILE >> 20} MiB, more than any submission")
    return content


def read_archive(path: epath.Path) -> bytes:
    """Reads the file of a submission; raises InputError if it does not exist or is too large."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    with in_one_line(f"{path} cannot be read"), path.open("rb") as file:
        content = file.read(LARGEST_ARCHIVE + 1)
    if len(content) > LARGEST_ARCHIVE:
        raise InputError(f"{path} has more than {LARGEST_ARCHIVE >> 20} MiB, unlike a submission")
    return content


def read_submission(content: bytes, benchmark: str) -> dict[str, dict[Any, Any]]:
    """Reads the labels of every file of a submission.

    Returns:
        By file name, labels by example index; in MultiRC by (paragraph, question, answer).

    Raises:
        InputError: the content is not a zip file, or files are missing, unexpected or malformed;
            the message has the first problem of each file.
    """
    files = {file.name: file for file in BENCHMARKS[benchmark]}
    archive = _open(content)
    listed = archive.namelist()
    present = set(listed)
    faults = [f"{name} is missing" for name in files if name not in present]
    faults += [f"{name} appears twice" for name in files if listed.count(name) > 1]
    faults += [
        f"{printable(shortened(name), '')} is unexpected; "
        f"expected top-level files named {', '.join(files)}"
        for name in sorted(present - files.keys())[:1]
    ]
    labels = {}
    for name in (name for name in files if name in present):
        try:
            labels[name] = _parse(files[name], _read_member(archive, name))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return labels


def _parse(file: File, content: bytes) -> dict[Any, Any]:
    is_table = file.name.endswith(".tsv")
    lines = enumerate(_decoded_lines(content, file.name), 1)
    if is_table:
        _, header = next(lines, (1, ""))
        if header != HEADER:
            raise InputError(
                f"{file.name} line 1: expected the header {HEADER!r}, got {header[:80]!r}"
            )
    task = registry.get(file.task).task
    labels: dict[Any, Any] = {}
    for line_number, line in lines:
        where = f"{file.name} line {line_number}"
        if is_table:
            entries = _parse_row(line, where)
        else:
            entries = _parse_object(line, where, nested=file.task == "superglue_multirc")
        for index, label in entries:
            if index in labels:
                raise InputError(f"{where}: index {index} appears a second time")
            if not file.label.valid(task, label):
                expected = file.label.expected(task)
                raise InputError(
                    f"{where}: label {repr(label)[:80]} of index {index}: expected {expected}"
                )
            labels[index] = label
        if len(labels) > 2 * file.count:
            raise InputError(f"{file.name} holds more than twice the {file.count} examples")
    return labels


def _decoded_lines(content: bytes, name: str) -> Iterator[str]:
    """Yields lines without line breaks, one at a time: a small archive may hold many millions."""
    for line in io.BytesIO(content):
        if len(line) > LARGEST_LINE:
            raise InputError(f"{name} has a line of {len(line)} bytes, more than any submission")
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not valid UTF-8") from error


def _parse_row(line: str, where: str) -> list[tuple[int, str]]:
    index, tab, label = line.partition("\t")
    is_index = index.isascii() and index.isdigit() and len(index) < 19
    if not tab or "\t" in label or not is_index:
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
        entry = from_json(line)
        if nested:
            labels = [
                ((entry["idx"], question["idx"], answer["idx"]), answer["label"])
                for question in entry["passage"]["questions"]
                for answer in question["answers"]
            ]
        else:
            labels = [(entry["idx"], entry["label"])]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: expected an object {shape}, got {line[:80]!r}") from error
    for index, _ in labels:
        if not all(type(part) is int and part >= 0 for part in (index if nested else [index])):
            raise InputError(f"{where}: idx must be a whole number from 0, got {index!r}")
    return labels


def check_submission(
    content: bytes, benchmark: str, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Checks that a submission is complete and valid.

    Args:
        content: the zip file.
        benchmark: "glue" or "superglue".
        sizes: expected number of predictions by file name; by default the sizes of the real test
            sets.

    Returns:
        The number of predictions of each file.

    Raises:
        InputError: the submission is incomplete or invalid; lists all faults in one line.
    """
    if sizes is None:
        sizes = {file.name: file.count for file in BENCHMARKS[benchmark]}
    faults = []
    counts = {}
    for name, labels in read_submission(content, benchmark).items():
        expected = sizes[name]
        counts[name] = len(labels)
        if len(labels) != expected:
            faults.append(f"{name} holds {len(labels)} predictions, expected {expected}")
            continue
        # GLUE indices are row numbers of the test file; SuperGLUE has its own indices.
        missing = set(range(expected)) - labels.keys()
        if benchmark == "glue" and missing:
            faults.append(f"{name}: index {min(missing)} is missing; expected 0 to {expected - 1}")
    if faults:
        raise InputError("; ".join(faults))
    return counts


def benchmark_of(content: bytes) -> str:
    """Returns the benchmark of a submission, judging by its file names."""
    names = set(_open(content).namelist())
    matching = {
        benchmark: names & {file.name for file in files} for benchmark, files in BENCHMARKS.items()
    }
    best = max(matching, key=lambda benchmark: len(matching[benchmark]))
    if not matching[best]:
        raise InputError(
            f"it holds no file of {' or '.join(BENCHMARKS)}; expected top-level files "
            f"such as {BENCHMARKS[best][0].name}"
        )
    return best
