"""A file of texts in, a file of predictions out: any number of them, a few thousand in memory at a time.

Predictions are written to OUTPUT.part, one JSON object a line, and OUTPUT.part.json says how far they go; once all are there, they
become OUTPUT. A run that was cut off goes on where it stopped when the same command is given again, provided that the input still
begins with the same rows.
"""

import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm

from gemma_encoder.data.files.lines import numbered, without_compression
from gemma_encoder.data.files.rows import read_rows as read_rows
from gemma_encoder.data.files.rows import where as row_name
from gemma_encoder.evaluation.columns import PROBABILITIES, flatten_columns, prediction_records
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.text_encoder import PATIENCE

CHUNK = 4096  # texts that are held at a time
SUFFIXES = (".jsonl", ".csv", ".parquet")


class InputText(NamedTuple):
    """One text of the input."""

    name: str  # in messages, e.g. "texts.csv:7"
    fields: Mapping[str, Any]
    kept: Mapping[str, Any]  # the columns that the output repeats


def predict_file(
    predictor: Predictor,
    task: Task,
    source: pathlib.Path,
    output: pathlib.Path | None = None,
    columns: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> int:
    """Predicts every text of a file, in order.

    Args:
        predictor: does it.
        task: for which.
        source: .txt (a text a line), or .jsonl, .csv, .tsv, .parquet with a column for each of the task's fields; text also as .gz.
        output: .jsonl, .csv or .parquet; None for JSON lines on the terminal.
        columns: where the task's fields, in their order, have other names.
        keep: further columns to repeat in the output.

    Returns:
        The number of texts.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds something that is no text. What was predicted stays.
    """
    rows = _rows(source, task, columns, keep)
    if output is None:
        return sum(
            len(chunk)
            for chunk in _predicted(
                predictor,
                task,
                rows,
                lambda line, _: print(json.dumps(line, ensure_ascii=False)),
                0,
            )
        )
    if output.suffix not in SUFFIXES:
        raise InputError(f"--output={output}: expected a file that ends in {', '.join(SUFFIXES)}")
    part = _Part(
        output,
        {
            "step": predictor.spec.step,
            "task": task.name,
            "input": str(source),
            "columns": list(columns),
            "keep": list(keep),
        },
    )
    with part:
        done = part.resume(rows)
        for chunk in _predicted(predictor, task, rows, part.write, done):
            part.advance(chunk)
            done += len(chunk)
    if not done:
        raise InputError(f"{source} holds no text")
    part.finish(task)
    return done


def _rows(
    source: pathlib.Path, task: Task, columns: Sequence[str], keep: Sequence[str]
) -> Iterator[InputText]:
    """The texts of a file; its columns are checked before the first is read."""
    fields = task.template.fields
    if pathlib.Path(without_compression(source.name)).suffix == ".txt":
        if not source.is_file():
            raise InputError(f"{source} is not a file")
        if len(fields) != 1 or columns or keep:
            raise InputError(
                f"{source}: a .txt file has one text a line and no columns; for {', '.join([*fields, *keep])} give a .csv, .jsonl or .parquet file"
            )
        return (
            InputText(f"{source}:{number}", {fields[0]: line.rstrip("\r\n")}, {})
            for number, line in numbered(source)
        )
    if columns and len(columns) != len(fields):
        raise InputError(
            f"--columns names {len(columns)} columns; task {task.name!r} needs {len(fields)}, for its fields {', '.join(fields)}"
        )
    taken = dict(zip(fields, columns or fields, strict=True))
    names, records = read_rows(source)
    for name in (*taken.values(), *keep):
        if name not in names:
            raise InputError(
                f"{source} has no column {name!r}; its columns: {', '.join(names)}. Task {task.name!r} needs {', '.join(fields)}; --columns says where they are"
            )

    def convert() -> Iterator[InputText]:
        for number, values in records:
            where = row_name(source, number)
            missing = [name for name in keep if name not in values]
            if missing:
                raise InputError(f"{where}: there is no {missing[0]!r}")
            yield InputText(
                where,
                {field: values[name] for field, name in taken.items() if name in values},
                {name: values[name] for name in keep},
            )

    return convert()


def _predicted(
    predictor: Predictor, task: Task, rows: Iterator[InputText], write, done: int
) -> Iterator[list[InputText]]:
    """Predicts chunk by chunk and hands each line to `write`; yields each chunk once it is written."""
    with tqdm.tqdm(
        desc="predicting",
        initial=done,
        unit=" texts",
        delay=PATIENCE,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        while chunk := list(itertools.islice(rows, CHUNK)):
            outputs = predictor.predict(
                [row.fields for row in chunk],
                task.name,
                progress=False,
                names=[row.name for row in chunk],
            )
            for row, record in zip(chunk, prediction_records(task, outputs), strict=True):
                write({**row.kept, **record}, row)
            yield chunk
            bar.update(len(chunk))


class _Part:
    """The lines that are already predicted, and how far they go.

    Args:
        output: what they will become.
        settings: what must be the same for a later run to go on.
    """

    def __init__(self, output: pathlib.Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings
        self.path, self.state = (
            output.with_name(output.name + ".part"),
            output.with_name(output.name + ".part.json"),
        )
        self._digest, self._rows = hashlib.blake2b(), 0

    def __enter__(self) -> "_Part":
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise InputError(
                f"--output={self.output} cannot be written: {error.strerror}"
            ) from None
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def resume(self, rows: Iterator[InputText]) -> int:
        """Skips the rows that are predicted already, and returns how many they are."""
        state: dict[str, Any] = {}
        if self.state.exists():
            state = json.loads(self.state.read_text())
            changed = [
                f"{name}: {state[name]!r} -> {value!r}"
                for name, value in self.settings.items()
                if state[name] != value
            ]
            if changed:
                raise InputError(
                    f"{self.path} was left by another command ({'; '.join(changed)}); remove it, or name another --output"
                )
            for row in itertools.islice(rows, state["rows"]):
                self._add(row)
            if (self._rows, self._digest.hexdigest()) != (state["rows"], state["digest"]):
                raise InputError(
                    f"{self.path} was made from other texts than those that {self.settings['input']} holds now; remove it, or name another --output"
                )
            print(f"going on after {self._rows} texts of {self.path}", file=sys.stderr)
        self._file.truncate(state.get("bytes", 0))
        return self._rows

    def _add(self, row: InputText) -> None:
        self._digest.update(json.dumps([row.fields, row.kept], default=str).encode())
        self._rows += 1

    def write(self, line: Mapping[str, Any], row: InputText) -> None:
        """Adds a line."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except TypeError as error:
            raise InputError(f"{row.name}: a column of --keep cannot be written: {error}") from None

    def advance(self, chunk: Sequence[InputText]) -> None:
        """Says that the lines of a chunk are there."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            for row in chunk:
                self._add(row)
            state = self.settings | {
                "rows": self._rows,
                "bytes": self._file.tell(),
                "digest": self._digest.hexdigest(),
            }
            temporary = self.state.with_name(self.state.name + ".tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(self.state)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; what is there stays, the same command goes on"
            ) from None

    def finish(self, task: Task) -> None:
        """Makes the output of the lines."""
        if self.output.suffix != ".jsonl":
            whole = self.output.with_name(self.output.name + ".tmp")
            (_write_csv if self.output.suffix == ".csv" else _write_parquet)(
                whole, self._tables(task)
            )
            whole.replace(self.output)
            self.path.unlink()
        else:
            self.path.replace(self.output)
        self.state.unlink()

    def _tables(self, task: Task) -> Iterator[dict[str, list]]:
        """The lines as columns, some at a time."""
        with self.path.open(encoding="utf-8") as file:
            while texts := list(itertools.islice(file, CHUNK)):
                lines = [json.loads(text) for text in texts]
                table = {name: [line[name] for line in lines] for name in lines[0]}
                if task.kind.has_classes:
                    by_class = table[PROBABILITIES]
                    table[PROBABILITIES] = {
                        name: [values[name] for values in by_class] for name in task.classes
                    }
                    table = flatten_columns(table)
                yield table


def _write_csv(path: pathlib.Path, parts: Iterator[dict[str, list]]) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for index, table in enumerate(parts):
            if not index:
                writer.writerow(table)
            cells = ([_cell(value) for value in column] for column in table.values())
            writer.writerows(zip(*cells, strict=True))


def _cell(value: Any) -> Any:
    """A list as JSON, which own data read back."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _write_parquet(path: pathlib.Path, parts: Iterator[dict[str, list]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    writer = None
    try:
        for part in parts:
            table = pa.table(part)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise InputError(
            f"a column of --keep has values of several types, which Parquet cannot hold ({str(error).splitlines()[0]}); use .jsonl"
        ) from None
    finally:
        if writer is not None:
            writer.close()
