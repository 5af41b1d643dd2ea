"""The user's own files, by config alone: `config.own`, task `own`.

    --config=experiments/own.py:classification --config.own.train=train.csv --config.own.validation=dev.csv

Files are JSONL, CSV, TSV or Parquet, see `tables`; each row is one text, one pair of texts, or one document of a query (ranking). Every row is
checked before training starts. What the config leaves open is read off the training file, and said.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data import tables
from gemma_encoder.data.source import DataOptions, NumberedSource, Source, sample_list
from gemma_encoder.data.tables import Table
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import from_mapping, option
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "regression": ("spearman", "pearson"),
    "ranking": ("mrr@10", "ndcg@10"),
}
NO_FIELDS = ("id", "idx", "index")  # columns that are no text of the example, unless they are named
MOST_CLASSES = 1000  # that are inferred: beyond, the label is most likely no class
QUERY_ID, DOCUMENT_ID = "query_id", "document_id"


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """`config.own`: the user's files, and what their columns mean."""

    train: str = option("", "path of the training file")
    validation: str = option(
        "", "path of the validation file; without it, a share of the training file is held out"
    )
    test: str = option("", "path of the test file")
    kind: str = option("classification", '"classification", "regression" or "ranking"')
    fields: tuple[str, ...] = option(
        (),
        "columns that make the text, for ranking the query first; by default all but label and ids",
    )
    label: str = option(
        "label", "column of the class, the target, or (ranking) the grade, 0 for not relevant"
    )
    classes: tuple[str, ...] = option(
        (),
        "names in label order; by default those of the training file, sorted. "
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
    cut: tuple[str, ...] = option(
        (),
        "columns that may be shortened, the first one first; "
        "by default all, the last one first; for ranking never the query",
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
                "own.train is not set; it names a .jsonl, .csv, .tsv or .parquet file, "
                "e.g. --config.own.train=train.csv"
            )
        if self.kind not in METRICS:
            raise unknown("own.kind", self.kind, METRICS)
        if not 0 < self.held_out < 1:
            raise InputError(f"own.held_out must be a share between 0 and 1, got {self.held_out}")
        if self.classes and (
            self.kind != "classification" or len(set(self.classes)) < len(self.classes)
        ):
            raise InputError(
                "own.classes are the different class names of a classification task, "
                f"got {self.classes} for {self.kind}"
            )
        if self.label_range and (self.kind != "regression" or len(self.label_range) != 2):
            raise InputError(
                "own.label_range is (lowest, highest) of a regression task, "
                f"got {self.label_range} for {self.kind}"
            )

    def paths(self) -> dict[str, pathlib.Path]:
        """The named files by split."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: pathlib.Path(path).expanduser() for split, path in named.items() if path}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of the files mean what.

    Attributes:
        fields: by field of the template, the column.
        label: the column of the label.
        query_id, document_id: columns, "" where there is none.
    """

    fields: Mapping[str, str]
    label: str
    query_id: str = ""
    document_id: str = ""

    @classmethod
    def of(cls, options: OwnOptions, path: pathlib.Path, present: Sequence[str]) -> "Columns":
        """As the options say, or as the training file's columns suggest."""

        def existing(name: str, field: str) -> str:
            if name not in present:
                raise InputError(
                    f"{path} has no column {name!r}, which own.{field} names; it has {', '.join(map(repr, present))}"
                )
            return name

        label = existing(options.label, "label")
        ids = {}
        for field in (QUERY_ID, DOCUMENT_ID) if options.kind == "ranking" else ():
            named = getattr(options, field)
            ids[field] = existing(named, field) if named else field if field in present else ""
        if options.fields:
            chosen = [existing(name, "fields") for name in options.fields]
        elif options.kind == "ranking" and {"query", "document"} <= set(present):
            chosen = ["query", "document"]
        else:
            chosen = [name for name in present if name not in (label, *ids.values(), *NO_FIELDS)]
        if len(chosen) < 2 if options.kind == "ranking" else not chosen:
            needed = "a query and a document" if options.kind == "ranking" else "a text"
            raise InputError(
                f"{path} has the columns {', '.join(map(repr, present))}; own.fields should name {needed} among them"
            )
        fields = {_identifier(name): name for name in chosen}
        if len(fields) < len(chosen):
            raise InputError(
                f"own.fields: {', '.join(map(repr, chosen))} are too alike as names of a template, {', '.join(map(_identifier, chosen))}"
            )
        return cls(fields, label, **ids)


class Rows:
    """The rows of one file as examples: texts, labels and, for ranking, which query each belongs to.

    Args:
        options: what the config says.
        columns: what they mean.
        path: the file.
        labelled: whether labels must be there; a test file need not have any.
    """

    def __init__(
        self, options: OwnOptions, columns: Columns, path: pathlib.Path, *, labelled: bool
    ):
        present, _ = tables.rows(path)
        wanted = [
            *columns.fields.values(),
            columns.query_id,
            columns.document_id,
            *([columns.label] if labelled else []),
        ]
        missing = [name for name in wanted if name and name not in present]
        if missing:
            raise InputError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, present))}"
            )
        labelled = columns.label in present
        classes = options.kind == "classification" and labelled
        texts = [
            *columns.fields,
            *([QUERY_ID] if columns.query_id else []),
            *([DOCUMENT_ID] if columns.document_id else []),
            *(["label"] if classes else []),
        ]
        # Fields may have any name, so those of the ids and of the label are told apart by place.
        self._fields = {field: f"field {field}" for field in columns.fields}
        names = [self._fields.get(name, name) for name in texts[: len(columns.fields)]] + texts[
            len(columns.fields) :
        ]

        def convert(values: Mapping[str, Any], where: str) -> list[Any]:
            found: list[Any] = [_text(values, name, where) for name in columns.fields.values()]
            found += [
                _name(values, name, where)
                for name in (columns.query_id, columns.document_id)
                if name
            ]
            if classes:
                found.append(_name(values, columns.label, where))
            else:
                found.append(
                    _number(
                        values,
                        columns.label,
                        where,
                        least=0.0 if options.kind == "ranking" else -math.inf,
                    )
                    if labelled
                    else -1.0
                )
            return found

        self.path, self.labelled, self.kind = path, labelled, options.kind
        self.has_query_id, self.has_document_id = bool(columns.query_id), bool(columns.document_id)
        numbers = [] if classes else ["label"]
        self.table = Table(
            path, names, numbers, convert, (options.kind, dataclasses.astuple(columns), labelled)
        )

    def fields(self, row: int) -> dict[str, str]:
        """The text's fields."""
        return {field: self.table[column, row] for field, column in self._fields.items()}

    def class_names(self) -> list[str]:
        """The labels that occur, sorted: as numbers if all are."""
        names = self.table.codes("label")[0]
        if len(names) > MOST_CLASSES:
            raise InputError(
                f"{self.path} has {len(names)} different labels; name own.classes, or choose another own.kind or own.label"
            )
        return (
            sorted(names, key=int)
            if all(re.fullmatch(r"\d{1,9}", name) for name in names)
            else sorted(names)
        )

    def labels(self, task: Task) -> np.ndarray:
        """[N] as `Example.label` wants them; raises InputError naming the first row whose label the task does not know."""
        if not self.labelled:
            return np.full(len(self.table), -1.0)
        if task.kind != "classification":
            values = self.table.numbers("label")
            for row in (
                np.flatnonzero((values < task.label_range[0]) | (values > task.label_range[1]))[:1]
                if task.kind == "regression"
                else ()
            ):
                task.check_label(values[row], self.table.where(int(row)))
            return values
        names, codes = self.table.codes("label")
        known = {name: number for number, name in enumerate(task.classes)}
        if not known.keys() & set(names):
            known = {str(number): number for number in range(len(task.classes))}
        for code, name in enumerate(names):
            if name not in known:
                row = int(np.flatnonzero(codes == code)[0])
                raise InputError(f"{self.table.where(row)}: {unknown('class', name, task.classes)}")
        return np.array([known[name] for name in names], float)[codes]

    def queries(self) -> tuple[list[str], np.ndarray]:
        """Ids of the queries, and which one each row belongs to; raises InputError for a document or a query that comes twice."""
        first_field = next(iter(self._fields.values()))
        texts, text_codes = self.table.codes(first_field)
        names, codes = (
            self.table.codes(QUERY_ID)
            if self.has_query_id
            else ([f"query{number}" for number in range(1, len(texts) + 1)], text_codes)
        )
        if self.has_query_id:
            first = np.zeros(len(names), np.int64)
            first[codes[::-1]] = np.arange(len(codes))[::-1]
            for row in np.flatnonzero(text_codes != text_codes[first[codes]])[:1]:
                earlier = self.table.where(int(first[codes[row]]))
                raise InputError(
                    f"{self.table.where(int(row))}: query {names[codes[row]]!r} has another text than at {earlier}"
                )
        if self.has_document_id:
            _, documents = self.table.codes(DOCUMENT_ID)
            order = np.lexsort((documents, codes))
            again = order[1:][
                (codes[order][1:] == codes[order][:-1])
                & (documents[order][1:] == documents[order][:-1])
            ]
            if len(again):
                row = int(again.min())
                raise InputError(
                    f"{self.table.where(row)}: document {self.document_id(row)!r} comes a second time for query {names[codes[row]]!r}"
                )
        return names, codes

    def document_id(self, row: int) -> str:
        """What a row's document is called."""
        return (
            self.table[DOCUMENT_ID, row] if self.has_document_id else f"row{self.table['row', row]}"
        )


class OwnSource(NumberedSource):
    """Rows, or the queries that rows belong to, as records.

    Args:
        task: what is learnt.
        options: what the config says about sources.
        files: the rows of each split; "validation" may be missing.
        held_out: the share of training records that stands in for it.
    """

    def __init__(
        self, task: Task, options: DataOptions, files: Mapping[str, Rows], held_out: float
    ):
        super().__init__(task, options)
        self._files = dict(files)
        self._labels = {split: rows.labels(task) for split, rows in files.items()}
        # Of each split: the ids of its queries, where the rows of each record begin, and those rows.
        self._records = {split: self._group(rows) for split, rows in files.items()}
        self._chosen = {
            split: np.arange(len(records[1]) - 1) for split, records in self._records.items()
        }
        if "validation" not in files:
            self._hold_out(held_out)
        self.splits = tuple(self._files)
        if task.kind == "ranking":
            self._chosen["train"] = self._trainable()
        for split in self.splits:
            self._chosen[split] = self._chosen[split][: options.limit(split) or None]

    def _group(self, rows: Rows) -> tuple[list[str], np.ndarray, np.ndarray]:
        if self.task.kind != "ranking":
            return [], np.arange(len(rows.table) + 1), np.arange(len(rows.table))
        names, codes = rows.queries()
        order = np.argsort(codes, kind="stable")
        return names, np.searchsorted(codes[order], np.arange(len(names) + 1)), order

    def _hold_out(self, share: float) -> None:
        count = len(self._chosen["train"])
        held = round(count * share)
        if not 0 < held < count:
            raise InputError(
                f"{self._files['train'].path}: {count} records are too few to hold out {share:.0%} for validation; name own.validation"
            )
        mixed = np.random.default_rng(0).permutation(count)
        for name in ("files", "labels", "records"):
            parts = getattr(self, f"_{name}")
            parts["validation"] = parts["train"]
        self._chosen["validation"], self._chosen["train"] = (
            np.sort(mixed[:held]),
            np.sort(mixed[held:]),
        )
        logging.warning(
            "own: %d of %d %s of %s are held out for validation; own.validation names a file of your own",
            held,
            count,
            "queries" if self.task.kind == "ranking" else "records",
            self._files["train"].path,
        )

    def _trainable(self) -> np.ndarray:
        """The training queries that have a positive and a negative."""
        _, starts, rows = self._records["train"]
        counted = np.concatenate([[0], np.cumsum(self._labels["train"][rows] > 0)])
        positives = counted[starts[1:]] - counted[starts[:-1]]
        chosen = self._chosen["train"]
        kept = chosen[(positives[chosen] > 0) & (positives[chosen] < np.diff(starts)[chosen])]
        if len(kept) < len(chosen):
            logging.warning(
                "own: %d of %d train queries have no positive or no negative and are skipped",
                len(chosen) - len(kept),
                len(chosen),
            )
        if not len(kept):
            raise InputError(f"{self._files['train'].path}: no query has a positive and a negative")
        return kept

    def check(self) -> None:
        """Everything was checked when the files were read."""

    def count(self, split: str) -> int:
        """How many records a split has."""
        return len(self._chosen[split])

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Nothing where grades are unknown; else the labels of the examples are all there is."""
        return None if self._files[split].labelled else {}

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The row; or a query's rows, in training a positive and sampled negatives."""
        number = int(self._chosen[split][int(record["number"])])
        names, starts, order = self._records[split]
        rows, labels, file = (
            order[starts[number] : starts[number + 1]],
            self._labels[split],
            self._files[split],
        )
        if self.task.kind != "ranking":
            return [Example(file.fields(row), float(labels[row])) for row in rows]
        if rng is not None:
            rows = sample_list(
                rows[labels[rows] > 0], rows[labels[rows] <= 0], self.options.list_size, rng
            )
        return [
            Example(file.fields(row), float(labels[row]), names[number], file.document_id(row))
            for row in rows
        ]


def _make(options: DataOptions) -> Source:
    own = from_mapping(OwnOptions, options.own, "own")
    own.check()
    paths = own.paths()
    present, _ = tables.rows(paths["train"])
    columns = Columns.of(own, paths["train"], present)
    files = {
        split: Rows(own, columns, path, labelled=split != "test") for split, path in paths.items()
    }
    task = _task(own, columns, files)
    logging.info("own: %s", task)
    return OwnSource(task, options, files, own.held_out)


def _task(own: OwnOptions, columns: Columns, files: Mapping[str, Rows]) -> Task:
    """The task, with what the options leave open read off the files, and said."""
    fields, said = tuple(columns.fields), []
    text = own.template
    if not text:
        named = (
            zip(("Query", "Document"), fields, strict=False)
            if own.kind == "ranking" and len(fields) == 2
            else ((field, field) for field in fields)
        )
        text = (
            f"{{{fields[0]}}}"
            if len(fields) == 1
            else " ".join(f"{name}: {{{field}}}" for name, field in named)
        )
        said.append(f"template {text!r}")
    cut = tuple(_identifier(name) for name in own.cut) or (
        tuple(reversed(fields[1:])) if own.kind == "ranking" else ()
    )
    template = Template(text)
    strange = [field for field in template.fields if field not in fields]
    if strange:
        raise InputError(
            f"own.template {text!r} names {strange[0]!r}, which is not among the fields {', '.join(fields)}; own.fields says which columns those are"
        )
    template = Template(text, tuple(field for field in cut if field in template.fields))
    classes, label_range = own.classes, own.label_range
    if own.kind == "classification" and not classes:
        classes = tuple(files["train"].class_names())
        said.append(f"classes {', '.join(classes)}")
        if len(classes) < 2:
            raise InputError(
                f"{files['train'].path}: all labels are {classes[0]!r}; a classification task needs at least two classes"
            )
    if own.kind == "regression" and not label_range:
        values = np.concatenate(
            [rows.table.numbers("label") for rows in files.values() if rows.labelled]
        )
        label_range = (float(values.min()), float(values.max()))
        said.append(f"label_range {label_range}")
        if label_range[0] == label_range[1]:
            raise InputError(
                f"{files['train'].path}: all targets are {label_range[0]:g}; name own.label_range"
            )
    if said:
        logging.warning("own: read off %s: %s", files["train"].path, "; ".join(said))
    return Task(
        "own",
        own.kind,
        template,
        own.metrics or METRICS[own.kind],
        classes,
        label_range or (0.0, 1.0),
    )


def _identifier(column: str) -> str:
    """A column's name as a template can hold it."""
    name = re.sub(r"\W", "_", column)
    return name if name.isidentifier() else f"_{name}"


def _text(values: Mapping[str, Any], column: str, where: str) -> str:
    value = _present(values, column, where)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} should hold text, got {type(value).__name__} {str(value)[:40]!r}"
        )
    if not value.strip():
        raise InputError(f"{where}: column {column!r} is empty")
    return value


def _name(values: Mapping[str, Any], column: str, where: str) -> str:
    """A class or an id: text, a whole number, or true and false."""
    value = _present(values, column, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise InputError(
            f"{where}: column {column!r} should hold text or a whole number, got {type(value).__name__} {str(value)[:40]!r}"
        )
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if not name:
        raise InputError(f"{where}: column {column!r} is empty")
    return name


def _number(values: Mapping[str, Any], column: str, where: str, least: float) -> float:
    value = _present(values, column, where)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least or isinstance(value, bool):
        bound = f" of at least {least:g}" if least > -math.inf else ""
        raise InputError(f"{where}: column {column!r} should hold a number{bound}, got {value!r}")
    return number


def _present(values: Mapping[str, Any], column: str, where: str) -> Any:
    if values.get(column) is None:
        raise InputError(
            f"{where}: column {column!r} is {'null' if column in values else 'missing; there are ' + ', '.join(map(repr, values))}"
        )
    return values[column]


TASKS: dict[str, Callable[[DataOptions], Source]] = {"own": _make}
