"""Rows of the user's own files as examples: which columns mean what, texts and labels checked."""

import ast
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.data import tables
from gemma_encoder.data.own_options import OwnOptions
from gemma_encoder.data.tables import Table
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.kind import UNLABELLED, Label
from gemma_encoder.inputs.task import Task

NOT_FIELDS = ("id", "idx", "index")  # columns that are no text of the example, unless named
MAX_CLASSES = 1000  # that are inferred: beyond, the label is most likely no class
QUERY_ID, DOCUMENT_ID = "query_id", "document_id"
JOIN = "\x1f"  # between the class names of one row, in the table


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
    """Rows of one file as examples: texts, labels and, for lists, the query each belongs to.

    Args:
        options: what the config says.
        columns: what they mean.
        path: the file.
        labelled: tells that labels must be there; a test file need not have any.
    """

    def __init__(
        self, options: OwnOptions, columns: Columns, path: pathlib.Path, *, labelled: bool
    ):
        present, _ = tables.rows(path)
        ids = (columns.query_id, columns.document_id)
        needed = [*columns.fields.values(), *ids, *([columns.label] if labelled else [])]
        missing = [name for name in needed if name and name not in present]
        if missing:
            raise InputError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, present))}"
            )
        self.path, self.labelled = path, columns.label in present
        self.has_query_id, self.has_document_id = map(bool, ids)
        kind = kinds.get(options.kind)
        as_text = self.labelled and kind.label_column in _TEXT_LABELS
        read_label = _label_reader(options, columns.label) if self.labelled else _unlabelled
        # Fields may have any name, so those of the ids and of the label are told apart by prefix.
        self._fields = {field: f"field {field}" for field in columns.fields}
        id_names = [
            name for name, column in zip((QUERY_ID, DOCUMENT_ID), ids, strict=True) if column
        ]

        def convert(values: Mapping[str, Any], where: str) -> list[Any]:
            texts = [_text(values, name, where) for name in columns.fields.values()]
            names = [_name(values, name, where) for name in ids if name]
            return [*texts, *names, read_label(values, where)]

        texts = [*self._fields.values(), *id_names, *(["label"] if as_text else [])]
        settings = (kind.name, options.separator, dataclasses.astuple(columns), self.labelled)
        self.table = Table(path, texts, [] if as_text else ["label"], convert, settings)
        self._kind = kind

    def fields(self, row: int) -> dict[str, str]:
        """The text's fields."""
        return {field: self.table[column, row] for field, column in self._fields.items()}

    def has_several_classes(self) -> bool:
        """Whether a row names more than one class."""
        return any(JOIN in value for value in self.table.codes("label")[0])

    def class_names(self) -> tuple[str, ...]:
        """The classes that occur, in label order."""
        values = self.table.codes("label")[0]
        names = {name for value in values for name in _split(value) if name}
        if len(names) > MAX_CLASSES:
            raise InputError(
                f"{self.path} has {len(names)} different labels; name own.classes, or choose "
                "another own.kind or own.label"
            )
        return self._kind.order_classes(names, str(self.path))

    def labels(self, task: Task) -> Sequence[Label]:
        """[N] as `Example.label` has them; raises InputError naming the first row that is wrong."""
        if not self.labelled:
            return np.full(len(self.table), UNLABELLED)
        if self._kind.label_column in _TEXT_LABELS:
            return self._class_labels(task)
        values = self.table.numbers("label")
        low, high = task.label_range
        if self._kind.has_range:
            for row in np.flatnonzero((values < low) | (values > high))[:1]:
                task.check_label(values[row], self.table.where(int(row)))
        return values

    def _class_labels(self, task: Task) -> Sequence[Label]:
        """Class names as indices: of one class, or the tuple of all classes of a row."""
        values, codes = self.table.codes("label")
        by_name = {name: index for index, name in enumerate(task.classes)}
        if not by_name.keys() & {name for value in values for name in _split(value)}:
            by_name = {str(index): index for index in range(len(task.classes))}
        labels: list[Label] = []
        for code, value in enumerate(values):
            names = [name for name in _split(value) if name]
            for name in names:
                if name not in by_name:
                    row = int(np.flatnonzero(codes == code)[0])
                    raise InputError(
                        f"{self.table.where(row)}: {unknown('class', name, task.classes)}"
                    )
            indices = tuple(sorted(by_name[name] for name in names))
            labels.append(indices if self._kind.label_column == "classes" else float(indices[0]))
        if self._kind.label_column == "classes":
            return [labels[code] for code in codes]
        return np.array(labels)[codes]

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
                    f"{self.table.where(row)}: document {self.document_id(row)!r} comes a second "
                    f"time for query {names[codes[row]]!r}"
                )
        return names, codes

    def _check_query_texts(self, names: list[str], codes: np.ndarray, texts: np.ndarray) -> None:
        first = np.zeros(len(names), np.int64)
        first[codes[::-1]] = np.arange(len(codes))[::-1]
        for row in np.flatnonzero(texts != texts[first[codes]])[:1]:
            earlier = self.table.where(int(first[codes[row]]))
            raise InputError(
                f"{self.table.where(int(row))}: query {names[codes[row]]!r} has another text than "
                f"at {earlier}"
            )

    def document_id(self, row: int) -> str:
        """The name of a row's document."""
        if self.has_document_id:
            return self.table[DOCUMENT_ID, row]
        return f"row{self.table['row', row]}"


_TEXT_LABELS = ("class", "classes")


def identifier(column: str) -> str:
    """A column's name as a template can hold it."""
    name = re.sub(r"\W", "_", column)
    return name if name.isidentifier() else f"_{name}"


def _label_reader(options: OwnOptions, column: str):
    """The function that reads the label of a row (values, where)."""
    kind = kinds.get(options.kind)
    if kind.label_column == "class":
        return lambda values, where: _name(values, column, where)
    if kind.label_column == "classes":
        return lambda values, where: JOIN.join(_names(values, column, options.separator, where))
    return lambda values, where: _number(values, column, where, kind.least_label)


def _unlabelled(values: Mapping[str, Any], where: str) -> float:
    return UNLABELLED


def _split(value: str) -> list[str]:
    return value.split(JOIN)


def _text(values: Mapping[str, Any], column: str, where: str) -> str:
    value = _present(values, column, where)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} should hold text, got {type(value).__name__} "
            f"{str(value)[:40]!r}"
        )
    if not value.strip():
        raise InputError(f"{where}: column {column!r} is empty")
    return value


def _name(values: Mapping[str, Any], column: str, where: str) -> str:
    """A class or an id: text, a whole number, or true and false."""
    return _as_name(_present(values, column, where), column, where)


def _as_name(value: Any, column: str, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise InputError(
            f"{where}: column {column!r} should hold text or a whole number, got "
            f"{type(value).__name__} {str(value)[:40]!r}"
        )
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if not name:
        raise InputError(f"{where}: column {column!r} is empty")
    return name


def _names(values: Mapping[str, Any], column: str, separator: str, where: str) -> list[str]:
    """Several classes: a list, a list that is written as text, or text with separators.

    An empty list or text means that no class applies.
    """
    value = _present(values, column, where)
    if isinstance(value, str) and value.strip().startswith("["):
        value = _parsed_list(value.strip(), column, where)
    elif isinstance(value, str):
        value = [part for part in value.split(separator)] if value.strip() else []
    elif not isinstance(value, Sequence):
        value = [value]
    names = [_as_name(item, column, where) for item in value]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: column {column!r} names a class twice: {', '.join(names)}")
    return names


def _parsed_list(text: str, column: str, where: str) -> list[Any]:
    """A list as JSON writes it, or as Python does (pandas' `to_csv`)."""
    for parse, error in ((json.loads, json.JSONDecodeError), (ast.literal_eval, Exception)):
        try:
            value = parse(text)
        except error:
            continue
        if isinstance(value, list):
            return value
    raise InputError(f"{where}: column {column!r} holds a malformed list: {text[:60]!r}")


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
    if values.get(column) is not None:
        return values[column]
    if column in values:
        raise InputError(f"{where}: column {column!r} is null")
    raise InputError(
        f"{where}: column {column!r} is missing; there are {', '.join(map(repr, values))}"
    )
