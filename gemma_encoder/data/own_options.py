"""Options of the user's own files: `config.own`."""

import dataclasses
import pathlib

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown


def table_kinds() -> tuple[str, ...]:
    """Kinds of task whose labels a table can hold."""
    return tuple(name for name in kinds.names() if kinds.get(name).label_column)


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What `config.own` says.

    Attributes:
        train, validation, test: paths; without `validation`, a share of the training file is held out.
        kind: the name of a kind of task whose labels a table can hold, see `table_kinds`.
        fields: the columns that make the text, for ranking the query first; by default all but the label and the ids.
        separator: between the classes of one row (multi_label), where the label column holds text; lists need none.
        label: the column of the class, the target, or (ranking) the grade, 0 for not relevant.
        classes: names in label order; by default those of the training file, sorted. Labels are names, or numbers counted from 0.
        label_range: lowest and highest target (regression); by default those of the files.
        template: the text, with a column as {column}; what is no letter, digit or _ in a column's name becomes _.
        cut: the columns that may be shortened, the first one first; by default all, the last one first; for ranking never the query.
        query_id, document_id: columns (ranking); by default those names where they exist, else the query itself and the row.
        metrics: by default those of the kind.
        held_out: the share of training records (queries, for ranking) that is validation where no file is named. The same for every seed.
    """

    train: str = ""
    validation: str = ""
    test: str = ""
    kind: str = "classification"
    fields: tuple[str, ...] = ()
    label: str = "label"
    separator: str = ","
    classes: tuple[str, ...] = ()
    label_range: tuple[float, ...] = ()
    template: str = ""
    cut: tuple[str, ...] = ()
    query_id: str = ""
    document_id: str = ""
    metrics: tuple[str, ...] = ()
    held_out: float = 0.1

    def __post_init__(self):
        if not self.train:
            raise InputError(
                "own.train is not set; it names a .jsonl, .csv, .tsv or .parquet file, e.g. --config.own.train=train.csv"
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

    def paths(self) -> dict[str, pathlib.Path]:
        """The named files by split."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: pathlib.Path(path).expanduser() for split, path in named.items() if path}


DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(OwnOptions)
}  # of `config.own`
