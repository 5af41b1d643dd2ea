"""Predictions of an unfinished run, from which the same command resumes."""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_encoder import terminal
from gemma_encoder.continued_files import ContinuedFile
from gemma_encoder.data.files.texts import InputText
from gemma_encoder.evaluation.certainty import is_abstention
from gemma_encoder.evaluation.columns import PROBABILITIES, flatten_columns
from gemma_encoder.evaluation.tables import to_line, write_csv, write_parquet
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.task import Task


class PartialOutput:
    """Predictions of an unfinished run as JSON lines, and how many texts they are of.

    Args:
        output: the final file.
        settings: the run's settings; a run resumes only with the same ones.

    Attributes:
        abstentions: predictions that are null because of their probability.
    """

    def __init__(self, output: pathlib.Path, settings: dict[str, Any]):
        self.abstentions = 0
        self._input = settings["input"]
        self._file = ContinuedFile(output, settings, f"--output={output}")
        self._digest = hashlib.blake2b()  # of the texts that are predicted
        self._num_texts = 0

    def __enter__(self) -> "PartialOutput":
        self._file.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._file.__exit__(*error)

    def resume(self, texts: Iterator[InputText]) -> int:
        """Skips the texts that are already predicted and returns their number.

        Raises:
            InputError: the partial output is of another command or of other texts, or is damaged.
        """
        if progress := self._file.read():
            path = self._file.path
            for text in itertools.islice(texts, progress["rows"]):
                self._count(text)
            if (self._num_texts, self._digest.hexdigest()) != (progress["rows"], progress["texts"]):
                raise InputError(
                    f"{path} was made from other texts than {self._input} has now; remove it and "
                    f"{self._file.state_path.name}, or name another --output"
                )
            self.abstentions = progress["abstentions"]
            terminal.print_one_line(f"resuming after {self._num_texts} texts of {path}")
        self._file.begin()
        return self._num_texts

    def _count(self, text: InputText) -> None:
        self._digest.update(to_json([text.fields, text.extra], default=str).encode())
        self._num_texts += 1

    def write(self, line: Mapping[str, Any], text: InputText) -> None:
        """Appends the line of a text."""
        self.abstentions += is_abstention(line)
        self._file.write(to_line(line, text.name))

    def commit(self, chunk: Sequence[InputText]) -> None:
        """Flushes the lines of a chunk to disk, then records it as done."""
        for text in chunk:
            self._count(text)
        self._file.commit(
            {
                "rows": self._num_texts,
                "texts": self._digest.hexdigest(),
                "abstentions": self.abstentions,
            }
        )

    def finish(self, task: Task, chunk: int) -> None:
        """Converts the lines to the output file, `chunk` at a time; removes the partial files."""
        suffix = self._file.output.suffix
        if suffix == ".jsonl":
            self._file.finish()
            return
        write_tables = write_csv if suffix == ".csv" else write_parquet

        def convert(lines: pathlib.Path, table: pathlib.Path) -> None:
            write_tables(table, lambda: _tables(lines, task, chunk))

        self._file.finish(convert)


def _tables(path: pathlib.Path, task: Task, chunk: int) -> Iterator[dict[str, list]]:
    """Yields the lines of a file as columns, a chunk at a time."""
    with path.open(encoding="utf-8") as file:
        while lines := list(itertools.islice(file, chunk)):
            records = [from_json(line) for line in lines]
            table = columns_of(records)
            if task.kind.has_classes:
                probabilities = table[PROBABILITIES]
                table[PROBABILITIES] = {
                    name: [values[name] for values in probabilities] for name in task.classes
                }
                table = flatten_columns(table)
            yield table


def columns_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Converts records with the same keys to columns."""
    return {name: [record[name] for record in records] for name in records[0]}
