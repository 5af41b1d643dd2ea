"""Options of the task `own`: `config.own`."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterable

from gemma_encoder.data.files.paths import named_files
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import canonical_name
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.literals import parse_literal
from gemma_encoder.inputs.options import option
from gemma_encoder.inputs.template import PROTECTED_SHARE, Template, identifier


def table_kinds() -> tuple[str, ...]:
    """Returns the kinds of task whose labels fit in a column of a table."""
    return tuple(name for name in kinds.names() if kinds.get(name).label_column)


Paths = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """`config.own`: the user's files, and the meaning of their columns."""

    train: Paths = option(
        "", "path of the training file; a pattern such as train-*.parquet, or a list, for several"
    )
    validation: Paths = option(
        "", "path of the validation file; by default a fraction of the training file is held out"
    )
    test: Paths = option("", "path of the test file")
    name: str = option("own", "name of the task in metrics and file names")
    kind: str = option("classification", "kind of task, one whose labels fit in a column")
    fields: tuple[str, ...] = option(
        (),
        "columns of the text, for ranking and retrieval the query first; by default all but label "
        "and ids",
    )
    label: str = option(
        "label", "column of the class, the target, or (ranking) the grade, 0 for not relevant"
    )
    separator: str = option(
        ",", "separator between the classes of a row (multi_label) in text labels; unused in lists"
    )
    classes: tuple[str, ...] = option(
        (),
        "class names in label order (ordinal: lowest first); by default those of the training "
        "file, sorted. Labels are names, or indices from 0",
    )
    label_range: tuple[float, ...] = option(
        (), "lowest and highest target (regression); by default those of the training file"
    )
    template: str = option(
        "",
        "the text, with columns as {column}; characters of column names other than letters, digits "
        "and _ are replaced by _",
    )
    truncation: tuple[str, ...] = option(
        (),
        "columns that are truncated first, in this order; by default all, the last one first; for "
        "ranking all but the query",
        former="cut",
    )
    protected_share: float = option(
        PROTECTED_SHARE,
        "share of max_length up to which the remaining columns (ranking: the query) are not "
        "truncated",
    )
    query_id: str = option(
        "",
        'column (ranking, retrieval); by default "query_id" if it exists, else the text of the '
        "query",
    )
    document_id: str = option(
        "", 'column (ranking, retrieval); by default "document_id" if it exists, else the row'
    )
    positive: str = option(
        "",
        "column (retrieval) of a relevant text, or of a list; by default "
        '"positive" or "positives" if it exists',
    )
    negative: str = option(
        "",
        "column (retrieval) of a hard negative, or of a list; by default "
        '"negative" or "negatives" if it exists',
    )
    score: str = option(
        "",
        "column (retrieval) of a teacher's score, or of the list of those of the positives, then "
        'of the negatives; by default "score" or "scores" if it exists',
    )
    metrics: tuple[str, ...] = option((), "metrics; by default those of the kind")
    held_out: float = option(
        0.1,
        "fraction of training records (queries, for ranking) held out if there is no validation "
        "file, by class and with equal texts together; the same records for every seed",
    )

    def check(self) -> None:
        """Raises InputError if no file is named, or options are invalid or inconsistent."""
        if not self.train:
            raise InputError(
                "own.train is not set; set it to .jsonl, .json, .csv, .tsv or .parquet files, "
                "e.g. --config.own.train=train.csv"
            )
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"own.name must consist of letters, digits, '_', '-' and '.', got {self.name!r}"
            )
        if self.kind not in table_kinds():
            raise unknown("own.kind", self.kind, table_kinds())
        if not 0 < self.held_out < 1:
            raise InputError(f"own.held_out must be between 0 and 1, got {self.held_out}")
        if not 0 < self.protected_share <= 1:
            raise InputError(
                f"own.protected_share must be above 0 and at most 1, got {self.protected_share}"
            )
        kind = kinds.get(self.kind)
        num_distinct = len(set(map(canonical_name, self.classes)))
        if self.classes and (not kind.has_classes or num_distinct < len(self.classes)):
            raise InputError(
                "own.classes must be distinct names, for a kind of task with classes, got "
                f"{self.classes} for {self.kind}"
            )
        if self.label_range and (not kind.has_range or len(self.label_range) != 2):
            raise InputError(
                "own.label_range must be (lowest, highest), for a kind of task with a range, got "
                f"{self.label_range} for {self.kind}"
            )
        for name in ("positive", "negative", "score"):
            if getattr(self, name) and not kind.embeds:
                raise InputError(f"own.{name} is for own.kind=retrieval, got {self.kind}")
        if kind.embeds and self.template:
            raise InputError(
                "own.template is not for retrieval; set retrieval.query_template and "
                "retrieval.document_template"
            )
        if not self.separator:
            raise InputError("own.separator must be at least one character, e.g. ','")

    def columns_of_template(self, names: Iterable[str]) -> list[str]:
        """Returns the columns among `names` that `template` uses."""
        fields = Template(self.template).fields if self.template else ()
        return [name for name in names if identifier(name) in fields]

    def paths(self) -> dict[str, list[pathlib.Path]]:
        """Returns the files by split; raises InputError if one is missing."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            split: named_files(_listed(paths), f"own.{split}")
            for split, paths in named.items()
            if paths
        }


def _listed(paths: Paths) -> Paths:
    """Parses a list that was given as text on the command line."""
    if isinstance(paths, str) and paths.startswith(("(", "[")):
        with contextlib.suppress(ValueError):
            listed = parse_literal(paths)
            if isinstance(listed, list | tuple) and all(isinstance(path, str) for path in listed):
                return tuple(listed)
    return paths
