"""Options of the user's own files: `config.own`."""

import ast
import contextlib
import dataclasses
import pathlib
import re

from gemma_encoder.data.files.paths import named_files
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import option


def table_kinds() -> tuple[str, ...]:
    """Kinds of task whose labels a table can hold."""
    return tuple(name for name in kinds.names() if kinds.get(name).label_column)


Paths = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """`config.own`: the user's files, and what their columns mean."""

    train: Paths = option(
        "", "path of the training file; a pattern such as train-*.parquet, or a list, for several"
    )
    validation: Paths = option(
        "", "of the validation file; without it, a share of the training file is held out"
    )
    test: Paths = option("", "of the test file")
    name: str = option("own", "of the task, in metrics and in names of files")
    kind: str = option("classification", "kind of task, one that a table's labels can hold")
    fields: tuple[str, ...] = option(
        (),
        "columns that make the text, for ranking the query first; by default all but label and ids",
    )
    label: str = option(
        "label", "column of the class, the target, or (ranking) the grade, 0 for not relevant"
    )
    separator: str = option(
        ",", "between the classes of a row (multi_label) where the label is text; lists need none"
    )
    classes: tuple[str, ...] = option(
        (),
        "names in label order (ordinal: lowest first); by default the training file's, sorted. "
        "Labels are names, or numbers counted from 0",
    )
    label_range: tuple[float, ...] = option(
        (), "lowest and highest target (regression); by default those of the files"
    )
    template: str = option(
        "",
        "the text, with a column as {column}; "
        "what is no letter, digit or _ in a column's name becomes _",
    )
    truncation: tuple[str, ...] = option(
        (),
        "columns that may be truncated, the first one first; "
        "by default all, the last one first; for ranking never the query",
        former="cut",
    )
    query_id: str = option(
        "", 'column (ranking); by default "query_id" where it exists, else the query itself'
    )
    document_id: str = option(
        "", 'column (ranking); by default "document_id" where it exists, else the row'
    )
    metrics: tuple[str, ...] = option((), "by default those of the kind")
    held_out: float = option(
        0.1,
        "share of training records (queries, for ranking) that is validation where no file is "
        "named; the same for every seed",
    )

    def check(self) -> None:
        """Raises InputError where the options name no file, or contradict each other."""
        if not self.train:
            raise InputError(
                "own.train is not set; it names .jsonl, .json, .csv, .tsv or .parquet files, "
                "e.g. --config.own.train=train.csv"
            )
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"own.name is made of letters, digits, '_', '-' and '.', got {self.name!r}"
            )
        if self.kind not in table_kinds():
            raise unknown("own.kind", self.kind, table_kinds())
        if not 0 < self.held_out < 1:
            raise InputError(f"own.held_out must be a share between 0 and 1, got {self.held_out}")
        kind = kinds.get(self.kind)
        if self.classes and (not kind.has_classes or len(set(self.classes)) < len(self.classes)):
            raise InputError(
                "own.classes are the different class names of a task with classes, got "
                f"{self.classes} for {self.kind}"
            )
        if self.label_range and (not kind.has_range or len(self.label_range) != 2):
            raise InputError(
                "own.label_range is (lowest, highest) of a task with a range, got "
                f"{self.label_range} for {self.kind}"
            )
        if not self.separator:
            raise InputError("own.separator must be at least one character, e.g. ','")

    def paths(self) -> dict[str, list[pathlib.Path]]:
        """The named files by split; raises InputError where one is absent."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            split: named_files(_listed(paths), f"own.{split}")
            for split, paths in named.items()
            if paths
        }


def _listed(paths: Paths) -> Paths:
    """A list that the command line gave as text, as a list."""
    if isinstance(paths, str) and paths.startswith(("(", "[")):
        with contextlib.suppress(ValueError, SyntaxError):
            listed = ast.literal_eval(paths)
            if isinstance(listed, list | tuple) and all(isinstance(one, str) for one in listed):
                return tuple(listed)
    return paths
