"""The user's own files, by config alone: `config.own`, task `own`.

    gemma-encoder train --config=own:classification --config.own.train=train.csv --workdir=DIR

Files are JSONL, JSON, CSV, TSV or Parquet, see `files.rows`, and `part-*.csv` names several; each
row is one text, one pair of texts, or one document of a query (ranking). Every row is checked
before training starts. What the config leaves open is read off the training file, and logged.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data.files import rows
from gemma_encoder.data.order import shuffled
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Groups
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_rows import Columns, Rows, identifier
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.options import from_mapping
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template


class OwnSource(Source):
    """Rows, or the queries that rows belong to, as records.

    Args:
        task: what is learnt.
        options: the part of the config that concerns sources.
        files: the rows of each split; "validation" may be missing.
        held_out: the share of training records that stands in for it.
    """

    def __init__(
        self, task: Task, options: DataOptions, files: Mapping[str, Rows], held_out: float
    ):
        super().__init__(task, options)
        self._files, self._held_out = dict(files), 0
        for file in files.values():
            file.check_labels(task)
        self._indices = {
            split: file.class_indices(task) if task.classes and file.labeled else {}
            for split, file in files.items()
        }
        self._queries = {
            split: Groups(*file.queries()) for split, file in files.items() if task.is_list
        }
        if "validation" not in files:
            self._hold_out(held_out)
        self.splits = tuple(split for split in Source.splits if split in self._files)
        self._trainable = self._with_both_labels() if task.is_list else None

    def _records(self, split: str) -> int:
        """Records of the files of a split, whatever is held out of them."""
        return len(self._queries[split] if self.task.is_list else self._files[split])

    def _hold_out(self, share: float) -> None:
        train, count = self._files["train"], self._records("train")
        held = round(count * share)
        if not 0 < held < count:
            raise InputError(
                f"{train.name}: {count} records are too few to hold out {share:.0%} for "
                "validation; name own.validation"
            )
        self._held_out = held
        for parts in (self._files, self._queries, self._indices):
            if "train" in parts:
                parts["validation"] = parts["train"]
        logging.warning(
            "%s: %d of %d %s of %s are held out for validation, unless a validation file is named",
            self.task.name,
            held,
            count,
            "queries" if self.task.is_list else "records",
            train.name,
        )

    def _index(self, split: str, index: int) -> int:
        """The record of the files; what is held out is the start of a seeded permutation."""
        if not self._held_out or split == "test":
            return index
        position = index + (self._held_out if split == "train" else 0)
        return shuffled(position, self._records(split), seed=0)

    def _available(self, split: str) -> int:
        count = self._records(split)
        if not self._held_out or split == "test":
            return count
        return self._held_out if split == "validation" else count - self._held_out

    def _with_both_labels(self) -> np.ndarray:
        """The training queries, by index, that have a positive and a negative."""
        file, queries = self._files["train"], self._queries["train"]
        count = self._available("train")
        is_trainable = queries.has_both_labels(file.table.arrow.column("label").to_numpy())
        result = np.array([i for i in range(count) if is_trainable[self._index("train", i)]], int)
        if len(result) < count:
            logging.warning(
                "%s: %d of %d train queries have no positive or no negative and are skipped",
                self.task.name,
                count - len(result),
                count,
            )
        if not len(result):
            raise InputError(f"{file.name}: no query has a positive and a negative")
        return result

    def files(self, split: str) -> Sequence[pathlib.Path]:
        """The user's."""
        return self._files[split].paths

    def count(self, split: str) -> int:
        """Rows or queries, of training those that can be learned from."""
        if split == "train" and self._trainable is not None:
            return len(self._trainable)
        return self._available(split)

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Nothing where grades are unknown; else the labels of the examples are all there is."""
        return None if self._files[split].labeled else {}

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The row; or a query's rows."""
        file, indices = self._files[split], self._indices[split]
        if not self.task.is_list:
            row = self._index(split, index)
            return Record.of([Example(file.fields(row), file.label(row, indices))])
        name, rows = self._queries[split][self._query(split, index)]
        labels = [file.label(row, indices) for row in rows]
        return Record(
            labels,
            lambda i: Example(file.fields(rows[i]), labels[i], name, file.document_id(rows[i])),
        )

    def _query(self, split: str, index: int) -> int:
        if split == "train" and self._trainable is not None:
            index = int(self._trainable[index])
        return self._index(split, index)

    def where(self, split: str, index: int) -> str:
        """The row in its file."""
        if self.task.is_list:
            return f"{self._files[split].name}, {super().where(split, index)}"
        return self._files[split].where(self._index(split, index))


def _make(options: DataOptions) -> Source:
    own = from_mapping(OwnOptions, options.own, "own")
    own.check()
    paths = own.paths()
    first = paths["train"][0]
    columns = Columns.of(own, first, rows.read_rows(first)[0])
    files = {
        split: Rows(own, columns, named, labeled=split != "test") for split, named in paths.items()
    }
    task = _task(own, columns, files)
    logging.info("own: %s", task)
    return OwnSource(task, options, files, own.held_out)


def _task(own: OwnOptions, columns: Columns, files: Mapping[str, Rows]) -> Task:
    """The task, with what the options leave open read off the files, and logged."""
    kind, path, inferred = kinds.get(own.kind), files["train"].name, []
    template = _template(own, kind, tuple(columns.fields))
    if not own.template:
        inferred.append(f"template {template.text!r}")
    classes, label_range = own.classes, own.label_range
    if kind.has_classes and not classes:
        classes = files["train"].class_names()
        inferred.append(f"classes {', '.join(classes)}")
        if len(classes) < 2:
            raise InputError(
                f"{path}: all labels are {classes[0] if classes else ''!r}; a task of kind {kind} "
                "needs at least two classes"
            )
    if kind.has_range and not label_range:
        ranges = [file.label_range() for file in files.values() if file.labeled]
        label_range = (min(low for low, _ in ranges), max(high for _, high in ranges))
        inferred.append(f"label_range {label_range}")
        if label_range[0] == label_range[1]:
            raise InputError(f"{path}: all targets are {label_range[0]:g}; name own.label_range")
    if kind.label_column == "classes" and not files["train"].has_several_classes():
        logging.warning(
            "%s: no row of %s has several classes; is own.separator=%r what separates them?",
            own.name,
            path,
            own.separator,
        )
    if inferred:
        logging.warning("%s: inferred from %s: %s", own.name, path, "; ".join(inferred))
    return Task(own.name, kind, template, own.metrics, classes, label_range or (0.0, 1.0))


def _template(own: OwnOptions, kind: Kind, fields: Sequence[str]) -> Template:
    """The template of the options, or one made of the columns; never the query is truncated."""
    text = own.template
    if not text and len(fields) == 1:
        text = f"{{{fields[0]}}}"
    elif not text:
        query_and_document = kind.is_list and len(fields) == 2
        names = ("Query", "Document") if query_and_document else fields
        text = " ".join(f"{name}: {{{field}}}" for name, field in zip(names, fields, strict=True))
    template = Template(text)
    strange = [field for field in template.fields if field not in fields]
    if strange:
        raise InputError(
            f"own.template {text!r} names {strange[0]!r}, which is not among the fields "
            f"{', '.join(fields)}; own.fields says which columns those are"
        )
    after_query = tuple(reversed(fields[1:])) if kind.is_list else ()
    truncation = tuple(identifier(name) for name in own.truncation) or after_query
    return Template(text, tuple(field for field in truncation if field in template.fields))


TASKS: dict[str, Callable[[DataOptions], Source]] = {"own": _make}
