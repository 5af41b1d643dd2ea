"""Rows of the user's files as examples: meaning of columns, checks of texts and labels."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data import cache
from gemma_encoder.data.table import Table
from gemma_encoder.data.tasks import own_cells as cells
from gemma_encoder.data.tasks.own_checks import (
    check_present,
    common_columns,
    refuse_labels,
    report_unused_ids,
    without_indices,
)
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_queries import DOCUMENT_ID, QUERY_ID, QueryRows, name_of
from gemma_encoder.data.tasks.own_table import (
    TEXT_LABELS,
    are_labeled,
    label_column,
    name_column,
    text_column,
    write_own_table,
)
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import canonical_name
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import UNLABELED, Label
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import identifier

MAX_CLASSES = 1000  # more distinct labels are unlikely to be classes
INDICES_RULE = (
    "labels are indices only if own.classes gives the order of the classes and the labels of all "
    "files are indices"
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Meaning of the columns of the files.

    Attributes:
        fields: template field -> column.
        label: column of the label.
        query_id, document_id: columns of ids, "" if there is none.
    """

    fields: Mapping[str, str]
    label: str
    query_id: str = ""
    document_id: str = ""

    @classmethod
    def of(cls, options: OwnOptions, path: pathlib.Path, present: Sequence[str]) -> "Columns":
        """Resolves the options for the training file `path` with the columns `present`.

        Options that are not set are inferred from the names of the columns.

        Raises:
            InputError: an option names a missing column, the label is among the fields, or there
                are too few columns.
        """
        is_list = kinds.get(options.kind).is_list

        def existing(name: str, field: str) -> str:
            if name not in present:
                raise InputError(
                    f"{path} has no column {name!r}, which own.{field} names; it has "
                    f"{', '.join(map(repr, present))}"
                )
            return name

        label = existing(options.label, "label")
        ids = {}
        for field in (QUERY_ID, DOCUMENT_ID) if is_list else ():
            if column := getattr(options, field):
                ids[field] = existing(column, field)
            else:
                ids[field] = field if field in present else ""
        if options.fields:
            names = [existing(name, "fields") for name in options.fields]
            refuse_labels(options, names, label, ids)
        elif is_list and {"query", "document"} <= set(present):
            names = ["query", "document"]
        else:
            names = [name for name in present if name not in (label, *ids.values())]
            names = without_indices(names, options.columns_of_template(names), str(path))
        if len(names) < 1 + is_list:
            needed = "the query and the document" if is_list else "the text"
            raise InputError(
                f"{path} has the columns {', '.join(map(repr, present))}; set own.fields to the "
                f"columns of {needed}"
            )
        fields = {identifier(name): name for name in names}
        if len(fields) < len(names):
            raise InputError(
                f"own.fields: the columns {', '.join(map(repr, names))} have the same names in a "
                f"template: {', '.join(map(identifier, names))}"
            )
        return cls(fields, label, **ids)


class Rows(QueryRows):
    """Rows of the files of one split: texts, labels and queries.

    Args:
        options: `config.own`.
        columns: meaning of the columns.
        paths: the files.
        origin: names the data that the columns are of, for messages.
        labeled: require labels. They are optional in test files, which have none if there is no
            label column, or if it is empty or -1 throughout, as in the files of GLUE.

    Attributes:
        name: name of the files, for messages.
        labeled: True if there are labels.
        table: the rows, written by `own_table.write_own_table`.
    """

    def __init__(
        self,
        options: OwnOptions,
        columns: Columns,
        paths: Sequence[pathlib.Path],
        origin: str,
        *,
        labeled: bool,
    ):
        self.paths = paths
        self.name = name_of(paths)
        ids = (columns.query_id, columns.document_id)
        required = [*columns.fields.values(), *ids, *([columns.label] if labeled else [])]
        present = common_columns(paths, required)
        check_present(columns, required, present, paths[0], origin)
        report_unused_ids(columns, kinds.get(options.kind), present, self.name, origin)
        self.labeled = labeled or are_labeled(paths, self.name, columns.label, present)
        self.has_query_id, self.has_document_id = map(bool, ids)
        self._kind = kinds.get(options.kind)
        self._as_text = self.labeled and self._kind.label_column in TEXT_LABELS
        # The prefix keeps fields of any name apart from the columns of ids and labels.
        self._fields = {field: f"field {field}" for field in columns.fields}
        self.table = self._open_table(options, columns)
        if not len(self.table):
            raise InputError(f"{self.name} has no rows")

    def _open_table(self, options: OwnOptions, columns: Columns) -> Table:
        """Reads and checks the rows, or opens their cached table."""
        table_columns = {
            self._fields[field]: text_column(name) for field, name in columns.fields.items()
        }
        needed = list(columns.fields.values())
        for id_name, column in ((QUERY_ID, columns.query_id), (DOCUMENT_ID, columns.document_id)):
            if column:
                table_columns[id_name] = name_column(column)
                needed.append(column)
        if self.labeled:
            needed.append(columns.label)
        table_columns["label"] = label_column(options, columns.label if self.labeled else "")
        settings = (
            self._kind.name,
            options.separator,
            dataclasses.astuple(columns),
            self.labeled,
            # These invalidate tables that earlier versions wrote.
            *(["whole labels"] if self._kind.whole_labels else []),
            *(["decimal labels"] if self._kind.label_column == "number" else []),
        )

        def write(folder: pathlib.Path) -> None:
            write_own_table(folder, self.paths, needed, table_columns)

        return cache.derive(self.paths, f"table with {settings!r}", write, Table)

    @property
    def has_classes(self) -> bool:
        """True if the labels are names of classes."""
        return self._as_text

    @property
    def text_columns(self) -> list[str]:
        """Columns of the table with the fields of the text, in order."""
        return list(self._fields.values())

    def fields(self, row: int) -> dict[str, str]:
        """Returns the fields of the text."""
        return {field: self.table.value(column, row) for field, column in self._fields.items()}

    def has_several_classes(self) -> bool:
        """Returns True if any row has more than one class."""
        return self.table.summary["several"]

    def label_names(self) -> Mapping[str, int]:
        """Returns the first row of each class name among the labels; empty without classes."""
        return self.table.summary["values"] if self._as_text else {}

    def class_names(self) -> tuple[str, ...]:
        """Returns the classes of the labels, in label order; numbers in their shortest form."""
        names = self.label_names()
        if len(names) > MAX_CLASSES:
            raise InputError(
                f"{self.name} has more than {MAX_CLASSES} distinct labels; set own.classes, or "
                "another own.kind or own.label"
            )
        return self._kind.order_classes(set(map(canonical_name, names)), self.name)

    def label_range(self) -> tuple[float, float]:
        """Returns the lowest and the highest label."""
        return self.table.summary["low"][0], self.table.summary["high"][0]

    def count_placeholders(self) -> int:
        """Returns the number of rows with the label -1, if all other labels are 0 or more."""
        labels = self.table.arrow.column("label")
        if not self._as_text:
            values = labels.to_numpy()
            is_placeholder = values == UNLABELED
            return int(is_placeholder.sum()) if (values[~is_placeholder] >= 0).all() else 0
        names = {canonical_name(name) for name in self.label_names()}
        if not {"-1", "0"} <= names or not all(map(str.isdecimal, names - {"-1"})):
            return 0
        values, counts = np.unique(labels.to_numpy(), return_counts=True)
        return sum(
            int(count)
            for value, count in zip(values.tolist(), counts, strict=True)
            if canonical_name(value) == "-1"
        )

    def check_labels(self, task: Task, are_indices: bool, any_range: bool) -> None:
        """Raises InputError naming the first row with a label that is invalid for the task.

        Args:
            task: the task.
            are_indices: see `class_indices`.
            any_range: only warn of targets outside of the task's range.
        """
        if not self.labeled:
            return
        if self._as_text:
            indices = self.class_indices(task, are_indices)
            for name, row in self.label_names().items():
                if name not in indices:
                    self._refuse_label(task, name, row, are_indices)
        elif self._kind.has_range:
            self._refuse_placeholders(task)
            extremes = (self.table.summary["low"], self.table.summary["high"])
            for value, row in sorted(extremes, key=lambda pair: pair[1]):
                try:
                    task.check_label(value, self.where(row))
                except InputError as error:
                    if not any_range:
                        raise
                    logging.warning("%s: it is evaluated all the same", error)

    def _refuse_placeholders(self, task: Task) -> None:
        """Raises InputError for a target that evaluation would take for a missing label."""
        if task.is_unlabeled(UNLABELED):
            labels = self.table.arrow.column("label").to_numpy()
            for row in np.flatnonzero(labels == UNLABELED)[:1]:
                raise InputError(
                    f"{self.where(int(row))}: target -1 marks an unlabeled row, but other rows "
                    "have labels; leave unlabeled rows out, or set own.label_range to a range that "
                    "contains -1"
                )

    def _refuse_label(self, task: Task, name: str, row: int, are_indices: bool) -> None:
        """Raises InputError for a label that is not one of the task's classes."""
        where = self.where(row)
        if are_indices:
            raise InputError(
                f"{where}: label {name!r} is not an index from 0 to {len(task.classes) - 1} of the "
                "classes, as the labels of all files are"
            )
        is_index = name in map(str, range(len(task.classes)))
        hint = f"; {INDICES_RULE}" if is_index else ""
        raise InputError(f"{where}: {unknown('class', name, task.classes)}{hint}")

    def class_indices(self, task: Task, are_indices: bool) -> dict[str, int]:
        """Returns the class index of each label of the file that is valid.

        Args:
            task: the task.
            are_indices: True if labels are indices of classes, False if they are their names, which
                are compared by `canonical_name`.
        """
        names = map(str, range(len(task.classes))) if are_indices else task.classes
        by_name = {canonical_name(name): index for index, name in enumerate(names)}
        indices = {name: by_name.get(canonical_name(name)) for name in self.label_names()}
        return {name: index for name, index in indices.items() if index is not None}

    def label(self, row: int, indices: Mapping[str, int]) -> Label:
        """Returns the label of a row for `Example.label`; `indices` are from `class_indices`."""
        value = self.table.value("label", row)
        if not self._as_text:
            return value
        labels = [indices[name] for name in cells.split_names(value) if name]
        return tuple(sorted(labels)) if self._kind.label_column == "classes" else float(labels[0])
