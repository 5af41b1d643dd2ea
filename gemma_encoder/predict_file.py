"""Predicts the texts of a file and writes predictions to another, in constant memory.

Predictions are written to OUTPUT.part as JSON lines, and progress to OUTPUT.part.json. Once all are
written, they are converted to OUTPUT. Rerun an interrupted command to resume it, provided that the
input still begins with the same rows.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from gemma_encoder import terminal
from gemma_encoder.data.files.texts import InputText, check_texts, is_blank, read_texts
from gemma_encoder.evaluation.certainty import PLAIN, Certainty, is_abstention
from gemma_encoder.evaluation.columns import (
    check_column_names,
    null_record,
    prediction_records,
)
from gemma_encoder.evaluation.tables import ParquetTypes, to_line
from gemma_encoder.identity import identify
from gemma_encoder.inference import Predictor, refuse_vectors
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.task import Task
from gemma_encoder.partial_output import PartialOutput, columns_of
from gemma_encoder.progress import progress

TEXTS_PER_CHUNK = 4096  # texts in memory at a time
SUFFIXES = (".jsonl", ".csv", ".parquet")
BLANK = ("error", "null")


def predict_file(
    predictor: Predictor,
    task: Task,
    source: pathlib.Path,
    output: pathlib.Path | None = None,
    columns: Sequence[str] = (),
    keep: Sequence[str] = (),
    blank: str = "error",
    certainty: Certainty = PLAIN,
) -> int:
    """Predicts every text of a file, in order. The whole file is checked before the first.

    Args:
        predictor: the predictor.
        task: one of its tasks.
        source: .txt (one text per line, none blank), or .jsonl, .json, .csv, .tsv, .parquet with a
            column for each of the task's fields; text formats also as .gz or .zst.
        output: .jsonl, .csv or .parquet; None prints JSON lines.
        columns: the columns of the task's fields, in their order, if they have other names.
        keep: further columns to repeat in the output.
        blank: "error", or "null" to predict null for texts of which a field is blank or null.
        certainty: abstentions and conformal columns.

    Returns:
        The number of texts.

    Raises:
        InputError: the file cannot be read, lacks a column, a row is not a valid text, or `keep`
            names a column of the output, or one that the output's format cannot hold. Predictions
            of earlier chunks stay in OUTPUT.part.
    """
    refuse_vectors(task)
    _check_output(task, keep, source, output, certainty)
    texts, checked = (read_texts(source, task, columns, keep) for _ in range(2))
    num_blank = _check(source, _check_repeated(checked, keep, output), task, blank)
    predict = functools.partial(_predict_chunks, predictor, task, texts, certainty)
    if output is None:
        printed = _Printed()
        done = sum(len(chunk) for chunk in predict(printed.write))
        abstentions = printed.abstentions
    else:
        settings = {
            "task": task.name,
            "checkpoint": identify(predictor, task),
            "input": os.path.abspath(source),
            "columns": list(columns),
            "keep": list(keep),
            **dataclasses.asdict(certainty),
        }
        with PartialOutput(output, settings) as part:
            done = part.resume(texts)
            for chunk in predict(part.write, done):
                part.commit(chunk)
                done += len(chunk)
            part.finish(task, TEXTS_PER_CHUNK)
        abstentions = part.abstentions
    _report_blank(num_blank, done)
    _report_abstentions(task, certainty, abstentions, done)
    return done


def _check_output(
    task: Task,
    keep: Sequence[str],
    source: pathlib.Path,
    output: pathlib.Path | None,
    certainty: Certainty,
) -> None:
    """Raises InputError if there is no such output, or it would overwrite a column to keep."""
    if output is not None and output.suffix not in SUFFIXES:
        raise InputError(f"--output={output}: expected a file that ends in {', '.join(SUFFIXES)}")
    if output is not None and output.is_dir():
        raise InputError(f"--output={output} is a folder; name a file")
    if output is not None and output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output={output} is the input, which it would replace; name another")
    certainty.check(task)
    is_table = output is not None and output.suffix != ".jsonl"
    message = f"--keep={{0}}: that column of {source}".format
    for form in ("records", "table") if is_table else ("records",):
        check_column_names(task, keep, form, message, certainty)


def _check_repeated(
    texts: Iterator[InputText], keep: Sequence[str], output: pathlib.Path | None
) -> Iterator[InputText]:
    """Yields the texts; raises InputError if the output cannot hold a column to repeat."""
    if not keep:
        yield from texts
        return
    types = ParquetTypes() if output is not None and output.suffix == ".parquet" else None
    while chunk := list(itertools.islice(texts, TEXTS_PER_CHUNK)):
        lines = [to_line(text.extra, text.name) for text in chunk]
        if types is not None:
            types.add(columns_of(list(map(from_json, lines))))
        yield from chunk
    if types is not None:
        types.check()


def _check(source: pathlib.Path, texts: Iterator[InputText], task: Task, blank: str) -> int:
    """Checks the whole file and returns the number of blank texts."""
    if blank not in BLANK:
        raise unknown("value of --blank", blank, BLANK)
    with progress("checking", 0) as advance:
        count, num_blank = check_texts(texts, task, blank == "null", advance)
    if not count:
        raise InputError(f"{source} has no text")
    return num_blank


def _report_blank(num_blank: int, count: int) -> None:
    if num_blank:
        logging.warning("%d of %d texts are blank; their predictions are null", num_blank, count)


def _report_abstentions(task: Task, certainty: Certainty, count: int, total: int) -> None:
    """Reports the number of abstentions, and whether their probabilities are calibrated."""
    if certainty.abstain_below is None:
        return
    logging.warning(
        "%d of %d predictions are null: their probability is below %g",
        count,
        total,
        certainty.abstain_below,
    )
    if not task.calibration.is_fitted:
        logging.warning(
            "task %r is not calibrated: its probabilities are often too high; run gemma-encoder "
            "evaluate --calibrate",
            task.name,
        )


class _Printed:
    """Predictions on stdout, with the number of abstentions."""

    abstentions = 0

    def write(self, line: Mapping[str, Any], text: InputText) -> None:
        self.abstentions += is_abstention(line)
        terminal.print_json(to_line(line, text.name).decode())


def _predict_chunks(
    predictor: Predictor,
    task: Task,
    texts: Iterator[InputText],
    certainty: Certainty,
    write: Callable[[Mapping[str, Any], InputText], None],
    done: int = 0,
) -> Iterator[list[InputText]]:
    """Predicts texts, calls `write` with each output line, and yields each written chunk.

    Args:
        predictor: the predictor.
        task: one of its tasks.
        texts: the texts.
        certainty: abstentions and conformal columns.
        write: takes a line and its text.
        done: number of texts before the first, for the progress bar.
    """
    with progress("predicting", done) as advance:
        while chunk := list(itertools.islice(texts, TEXTS_PER_CHUNK)):
            records = _records(predictor, task, chunk, certainty)
            for text, record in zip(chunk, records, strict=True):
                write({**text.extra, **record}, text)
            yield chunk
            advance(len(chunk))


def _records(
    predictor: Predictor, task: Task, chunk: Sequence[InputText], certainty: Certainty
) -> Iterator[dict[str, Any]]:
    """Yields the prediction of each text, with null for blank ones, which `_check` accepted."""
    filled = [text for text in chunk if not is_blank(task, text)]
    records: Iterator[dict[str, Any]] = iter(())
    if filled:
        outputs = predictor.predict(
            [text.fields for text in filled],
            task.name,
            progress=False,
            names=[text.name for text in filled],
        )
        records = prediction_records(task, outputs, certainty)
    null = null_record(task, certainty)
    for text in chunk:
        yield null if is_blank(task, text) else next(records)
