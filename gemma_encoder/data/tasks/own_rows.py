"""Rows of the user's own files as examples: which columns mean what, texts and labels checked."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.files import rows
from gemma_encoder.data.table import Table
from gemma_encoder.data.tasks import own_cells as cells
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_table import (
    TEXT_LABELS,
    label_column,
    name_column,
    text_column,
    write_own_table,
)
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Task

NOT_FIELDS = ("id", "idx", "index")  # columns that are no text of the example, unless named
MAX_CLASSES = 1000  # that are inferred: beyond, the label is most likely no class
QUERY_ID, DOCUMENT_ID = "query_id", "document_id"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Meaning of the columns of the files.

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
            named = getattr(options, field)
            ids[field] = existing(named, field) if named else field if field in present else ""
        if options.fields:
            names = [existing(name, "fields") for name in options.fields]
        elif is_list and {"query", "document"} <= set(present):
            names = ["query", "document"]
        else:
            names = [name for name in present if name not in (label, *ids.values(), *NOT_FIELDS)]
        if len(names) < 1 + is_list:
            needed = "a query and a document" if is_list else "a text"
            raise InputError(
                f"{path} has the columns {', '.join(map(repr, present))}; own.fields should name "
                f"{needed} among them"
            )
        fields = {identifier(name): name for name in names}
        if len(fields) < len(names):
            raise InputError(
                f"own.fields: {', '.join(map(repr, names))} are too alike as names of a template, "
                f"{', '.join(map(identifier, names))}"
            )
        return cls(fields, label, **ids)


class Rows:
    """Rows of the files of one split as examples: texts, labels and the query each belongs to.

    Args:
        options: the config's.
        columns: what they mean.
        paths: the files.
        labeled: tells that labels must be there; a test file need not have any.

    Attributes:
        name: of the files, for messages.
        labeled: whether there are labels.
        table: the rows, as `own_table.write_table` writes them.
    """

    def __init__(
        self,
        options: OwnOptions,
        columns: Columns,
        paths: Sequence[pathlib.Path],
        *,
        labeled: bool,
    ):
        present = _common_columns(paths)
        ids = (columns.query_id, columns.document_id)
        required = [*columns.fields.values(), *ids, *([columns.label] if labeled else [])]
        missing = [name for name in required if name and name not in present]
        if missing:
            raise InputError(
                f"{paths[0]} has no column {missing[0]!r}; it has {', '.join(map(repr, present))}"
            )
        self.paths, self.labeled = paths, columns.label in present
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self.has_query_id, self.has_document_id = map(bool, ids)
        self._kind = kinds.get(options.kind)
        self._as_text = self.labeled and self._kind.label_column in TEXT_LABELS
        # Fields may have any name, so those of the ids and of the label are told apart by prefix.
        self._fields = {field: f"field {field}" for field in columns.fields}
        table_columns = {
            **{self._fields[field]: text_column(name) for field, name in columns.fields.items()},
            **{
                to: name_column(name)
                for to, name in zip((QUERY_ID, DOCUMENT_ID), ids, strict=True)
                if name
            },
            "label": label_column(options, columns.label if self.labeled else ""),
        }
        settings = (
            self._kind.name,
            options.separator,
            dataclasses.astuple(columns),
            self.labeled,
        )
        needed = [*columns.fields.values(), *filter(None, ids)]
        needed += [columns.label] if self.labeled else []

        def write(folder: pathlib.Path) -> None:
            write_own_table(folder, paths, needed, table_columns)

        self.table = cache.derive(paths, f"table with {settings!r}", write, Table)
        if not len(self.table):
            raise InputError(f"{self.name} holds no row")

    def __len__(self) -> int:
        return len(self.table)

    def fields(self, row: int) -> dict[str, str]:
        """The text's fields."""
        return {field: self.table.value(column, row) for field, column in self._fields.items()}

    def where(self, row: int) -> str:
        """Names a row in messages."""
        path = self.paths[self.table.value("file", row)]
        return rows.where(path, self.table.value("row", row))

    def has_several_classes(self) -> bool:
        """Whether a row names more than one class."""
        return self.table.summary["several"]

    def class_names(self) -> tuple[str, ...]:
        """The classes that occur, in label order."""
        names = self.table.summary["values"]
        if len(names) > MAX_CLASSES:
            raise InputError(
                f"{self.name} has more than {MAX_CLASSES} different labels; name own.classes, or "
                "choose another own.kind or own.label"
            )
        return self._kind.order_classes(names, self.name)

    def label_range(self) -> tuple[float, float]:
        """The lowest and the highest label."""
        return self.table.summary["low"][0], self.table.summary["high"][0]

    def check_labels(self, task: Task) -> None:
        """Raises InputError naming the first row whose label the task does not have."""
        if not self.labeled:
            return
        summary = self.table.summary
        if self._as_text:
            indices = self.class_indices(task)
            for name, row in summary["values"].items():
                if name not in indices:
                    raise InputError(f"{self.where(row)}: {unknown('class', name, task.classes)}")
        elif self._kind.has_range:
            for value, row in sorted((summary["low"], summary["high"]), key=lambda pair: pair[1]):
                task.check_label(value, self.where(row))

    def class_indices(self, task: Task) -> dict[str, int]:
        """The index of each class by the name that the file has for it, which may be the index."""
        by_name = {name: index for index, name in enumerate(task.classes)}
        if by_name.keys() & self.table.summary["values"].keys():
            return by_name
        return {str(index): index for index in range(len(task.classes))}

    def label(self, row: int, indices: Mapping[str, int]) -> Label:
        """The label of a row as `Example.label` has it; `indices` as from `class_indices`."""
        value = self.table.value("label", row)
        if not self._as_text:
            return value
        labels = [indices[name] for name in cells.split_names(value) if name]
        return tuple(sorted(labels)) if self._kind.label_column == "classes" else float(labels[0])

    def queries(self) -> tuple[list[str], np.ndarray]:
        """Ids of the queries, and the index of each row's query.

        Raises:
            InputError: a document comes twice for a query, or a query has two texts.
        """
        texts, text_codes = self.table.codes(next(iter(self._fields.values())))
        if self.has_query_id:
            names, codes = self.table.codes(QUERY_ID)
            self._check_query_texts(names, codes, text_codes)
        else:
            names, codes = [f"query{index}" for index in range(1, len(texts) + 1)], text_codes
        if self.has_document_id:
            _, documents = self.table.codes(DOCUMENT_ID)
            order = np.lexsort((documents, codes))
            same_query = codes[order][1:] == codes[order][:-1]
            same_document = documents[order][1:] == documents[order][:-1]
            again = order[1:][same_query & same_document]
            if len(again):
                row = int(again.min())
                raise InputError(
                    f"{self.where(row)}: document {self.document_id(row)!r} comes a second time "
                    f"for query {names[codes[row]]!r}"
                )
        return names, codes

    def _check_query_texts(self, names: list[str], codes: np.ndarray, texts: np.ndarray) -> None:
        first = np.zeros(len(names), np.int64)
        first[codes[::-1]] = np.arange(len(codes))[::-1]
        for row in np.flatnonzero(texts != texts[first[codes]])[:1]:
            earlier = self.where(int(first[codes[row]]))
            raise InputError(
                f"{self.where(int(row))}: query {names[codes[row]]!r} has another text than "
                f"at {earlier}"
            )

    def document_id(self, row: int) -> str:
        """The name of a row's document."""
        if self.has_document_id:
            return self.table.value(DOCUMENT_ID, row)
        name = f"row{self.table.value('row', row)}"
        return name if len(self.paths) == 1 else f"file{self.table.value('file', row) + 1}{name}"


def _common_columns(paths: Sequence[pathlib.Path]) -> tuple[str, ...]:
    """The columns of the first file; raises InputError where another one lacks some or has more."""
    first = rows.read_rows(paths[0])[0]
    for path in paths[1:]:
        columns = rows.read_rows(path)[0]
        if differing := set(first) ^ set(columns):
            raise InputError(
                f"{path} and {paths[0]} differ in the column {sorted(differing)[0]!r}; the files "
                "of a split have the same columns"
            )
    return first


def identifier(column: str) -> str:
    """A column's name as a template can hold it."""
    name = re.sub(r"\W", "_", column)
    return name if name.isidentifier() else f"_{name}"
