"""Predictions of an unfinished run, from which the same command resumes."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_encoder.data.files.texts import InputText
from gemma_encoder.evaluation.certainty import is_abstention
from gemma_encoder.evaluation.columns import PROBABILITIES, flatten_columns
from gemma_encoder.evaluation.tables import to_line, write_csv, write_parquet
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.task import Task
from gemma_encoder.whole_files import claim, write_whole


class PartialOutput:
    """Predictions of an unfinished run, and the state from which it resumes.

    One process at a time writes them.

    The state has the settings, the number of texts, a digest of them and the size of OUTPUT.part
    at the last commit. Bytes after that size are discarded.

    Args:
        output: the final file.
        settings: the run's settings; a run resumes only with the same ones.
    """

    def __init__(self, output: pathlib.Path, settings: dict[str, Any]):
        self.output = output
        self.settings = settings
        self.path = output.with_name(f"{output.name}.part")
        self.state_path = output.with_name(f"{output.name}.part.json")
        self.abstentions = 0
        self._digest = hashlib.blake2b()
        self._num_texts = 0

    def __enter__(self) -> "PartialOutput":
        subject = f"--output={self.output}"
        lock = self.output.with_name(f"{self.output.name}.lock")
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim(lock, subject, "wait for it, or name another --output"))
            try:
                self._file = stack.enter_context(self.path.open("ab"))
            except OSError as error:
                raise InputError(f"{subject} cannot be written: {error.strerror}") from None
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._resources.close()

    def resume(self, texts: Iterator[InputText]) -> int:
        """Skips the texts that are already predicted and returns their number.

        Raises:
            InputError: the partial output is of another command or of other texts.
        """
        size = 0
        if self.state_path.exists():
            state = self._read_state()
            self._check_settings(state)
            for text in itertools.islice(texts, state["rows"]):
                self._count(text)
            if (self._num_texts, self._digest.hexdigest()) != (state["rows"], state["digest"]):
                raise InputError(
                    f"{self.path} was made from other texts than {self.settings['input']} has now; "
                    f"remove it and {self.state_path.name}, or name another --output"
                )
            size = state["bytes"]
            self.abstentions = state.get("abstentions", 0)
            print(f"resuming after {self._num_texts} texts of {self.path}", file=sys.stderr)
        self._file.truncate(size)
        return self._num_texts

    def _read_state(self) -> dict[str, Any]:
        """Reads the state; raises InputError if it, or the lines that it counts, are damaged."""
        try:
            state = json.loads(self.state_path.read_text())
            is_whole = self.path.stat().st_size >= state["bytes"]
        except (ValueError, TypeError, KeyError):
            is_whole = False
        if not is_whole:
            raise InputError(
                f"{self.path} and {self.state_path.name} do not match, since one of them was "
                "changed or deleted; remove both, and all texts are predicted again"
            )
        return state

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        changed = [
            f"{name}: {state.get(name)!r} -> {value!r}"
            for name, value in self.settings.items()
            if state.get(name) != value
        ]
        if changed:
            raise InputError(
                f"{self.path} was left by another command ({'; '.join(changed)}); remove it and "
                f"{self.state_path.name}, or name another --output"
            )

    def _count(self, text: InputText) -> None:
        self._digest.update(to_json([text.fields, text.extra], default=str).encode())
        self._num_texts += 1

    def write(self, line: Mapping[str, Any], text: InputText) -> None:
        """Appends the line of a text."""
        self.abstentions += is_abstention(line)
        self._file.write(to_line(line, text.name))

    def commit(self, chunk: Sequence[InputText]) -> None:
        """Flushes the lines of a chunk to disk, then records it as done."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            for text in chunk:
                self._count(text)
            state = self.settings | {
                "rows": self._num_texts,
                "bytes": self._file.tell(),
                "digest": self._digest.hexdigest(),
                "abstentions": self.abstentions,
            }
            write_whole(self.state_path, to_json(state))
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; earlier predictions are saved, "
                "rerun the command to resume"
            ) from None

    def finish(self, task: Task, chunk: int) -> None:
        """Converts the lines to the output file, `chunk` at a time; removes the partial files."""
        self._file.close()
        if self.output.suffix == ".jsonl":
            self.path.replace(self.output)
        else:
            temporary = self.output.with_name(self.output.name + ".tmp")
            write_tables = write_csv if self.output.suffix == ".csv" else write_parquet
            write_tables(temporary, lambda: self._tables(task, chunk))
            temporary.replace(self.output)
            self.path.unlink()
        self.state_path.unlink()

    def _tables(self, task: Task, chunk: int) -> Iterator[dict[str, list]]:
        """Yields the lines as columns, a chunk at a time."""
        with self.path.open(encoding="utf-8") as file:
            while lines := list(itertools.islice(file, chunk)):
                records = [json.loads(line) for line in lines]
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
