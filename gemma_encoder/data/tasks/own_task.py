"""The task that the user's files and `config.own` describe.

Options that are not set are inferred from the training file. If a checkpoint was trained on the
task, they are those of the checkpoint instead, and options that contradict it are refused.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from gemma_encoder.data.source import StoredTask
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_rows import (
    DOCUMENT_ID,
    INDICES_RULE,
    QUERY_ID,
    Columns,
    Rows,
)
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import canonical_name, differing_names
from gemma_encoder.inputs.errors import InputError, format_value, unknown
from gemma_encoder.inputs.kind import Kind
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import PROTECTED_SHARE, Template, identifier

LISTED_CLASSES = 20  # in messages


@dataclasses.dataclass(frozen=True)
class Reading:
    """The reading of the user's files: the decisions that all files of a task share.

    Stored in checkpoints, so that a later command reads other files in the same way.

    Attributes:
        fields: template field -> column.
        query_id, document_id: columns of ids, "" for none.
        class_indices: True if labels are indices of `own.classes`, False if they are names.
        range_is_inferred: True if the label range is that of the training targets.
    """

    fields: Mapping[str, str]
    query_id: str = ""
    document_id: str = ""
    class_indices: bool = False
    range_is_inferred: bool = False

    @classmethod
    def stored(cls, task: StoredTask) -> "Reading | None":
        """Returns the reading that a checkpoint stores.

        None for checkpoints of earlier versions, and of tasks that another source read.
        """
        return cls(**task.inferred) if "fields" in task.inferred else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-ready."""
        return dataclasses.asdict(self)


def resolve_columns(
    own: OwnOptions, path: pathlib.Path, present: Sequence[str], stored: StoredTask | None
) -> Columns:
    """Returns the meaning of the columns, from the checkpoint if there is one.

    Args:
        own: the options.
        path: the training file.
        present: its columns.
        stored: the checkpoint's task.

    Raises:
        InputError: the options contradict the checkpoint, or name a missing column.
    """
    if stored is None:
        return _without_unused(own, Columns.of(own, path, present))
    kind = kinds.get(own.kind)
    _refuse(stored, "kind", kind.name, stored.task.kind.name, kind != stored.task.kind)
    reading = Reading.stored(stored)
    if reading is None:  # an earlier version wrote the checkpoint
        fields = stored.task.template.fields
        by_field = {identifier(column): column for column in present}
        missing = [field for field in fields if field not in by_field]
        if missing:
            raise InputError(
                f"{path} has no column {missing[0]!r}, which the template of the checkpoint names: "
                f"{stored.task.template.text!r}; it has {', '.join(map(repr, present))}"
            )
        names = own.fields or tuple(by_field[field] for field in fields)
        return Columns.of(dataclasses.replace(own, fields=names), path, present)
    columns = tuple(reading.fields.values())
    _refuse(stored, "fields", own.fields, columns, own.fields and own.fields != columns)
    for field in (QUERY_ID, DOCUMENT_ID):
        name = getattr(own, field)
        before = getattr(reading, field)
        _refuse(stored, field, name, before, name and name != before)
    return Columns(reading.fields, own.label, reading.query_id, reading.document_id)


def _without_unused(own: OwnOptions, columns: Columns) -> Columns:
    """Leaves out the columns that `own.template` does not name, unless `own.fields` names them."""
    if not own.template or own.fields:
        return columns
    used = _parsed_template(own.template, tuple(columns.fields)).fields
    query = next(iter(columns.fields)) if kinds.get(own.kind).is_list else ""
    fields = {field: column for field, column in columns.fields.items() if field in (*used, query)}
    return dataclasses.replace(columns, fields=fields)


def resolve_task(
    own: OwnOptions, columns: Columns, files: Mapping[str, Rows], stored: StoredTask | None
) -> tuple[Task, Reading]:
    """Returns the task, and how its files are read.

    Args:
        own: the options.
        columns: the meaning of the columns.
        files: the rows of each split.
        stored: the checkpoint's task, None for a new one.

    Raises:
        InputError: the task cannot be inferred, or the options contradict the checkpoint.
    """
    if stored is None:
        task = _inferred_task(own, columns, files)
    else:
        task = _stored_task(own, columns, stored)
    reading = None if stored is None else Reading.stored(stored)
    if reading is None:
        reading = Reading(
            dict(columns.fields),
            columns.query_id,
            columns.document_id,
            bool(own.classes) and _labels_are_indices(task, files),
            task.kind.has_range and not own.label_range,
        )
    if reading.class_indices:
        logging.warning(
            "%s: labels are indices of the classes %s in all files",
            own.name,
            ", ".join(f"{index} {name}" for index, name in enumerate(task.classes)),
        )
    return task, reading


def _labels_are_indices(task: Task, files: Mapping[str, Rows]) -> bool:
    """Returns True if no file has a class's name as a label, and all have whole numbers.

    Raises:
        InputError: the labels of the training file are indices, but not those of another file.
    """
    classes = set(map(canonical_name, task.classes))

    def is_index(name: str) -> bool:
        name = canonical_name(name)
        return name.isdecimal() and name not in classes

    train = files["train"]
    if not train.label_names() or not all(map(is_index, train.label_names())):
        return False
    for file in files.values():
        for name, row in file.label_names().items():
            if not is_index(name):
                label, first = next(iter(train.label_names().items()))
                problem = unknown("class", label, task.classes)
                raise InputError(
                    f"{train.where(first)}: {problem}; {INDICES_RULE}, but {file.where(row)} has "
                    f"{name!r}"
                )
    return True


def _stored_task(own: OwnOptions, columns: Columns, stored: StoredTask) -> Task:
    """Returns the checkpoint's task, with the metrics of the options.

    Raises:
        InputError: an option contradicts the checkpoint.
    """
    task = stored.task
    template = task.template
    truncation = tuple(name for name in map(identifier, own.truncation) if name in template.fields)
    share = "" if own.protected_share == PROTECTED_SHARE else own.protected_share
    for field, option, before in (
        ("template", own.template, template.text),
        ("truncation", truncation, template.truncation),
        ("protected_share", share, template.protected_share),
        ("label_range", own.label_range, task.label_range),
    ):
        _refuse(stored, field, option, before, option and option != before)
    is_other = own.classes and differing_names(own.classes, task.classes)
    _refuse(stored, "classes", own.classes, task.classes, is_other)
    if unknown_fields := set(template.fields) - set(columns.fields):
        raise InputError(
            f"own.fields: the template of {stored.origin} needs {sorted(unknown_fields)[0]!r}: "
            f"{template.text!r}; got {', '.join(columns.fields)}"
        )
    return dataclasses.replace(task, metrics=own.metrics or task.metrics)


def _refuse(stored: StoredTask, field: str, option: Any, before: Any, is_other: Any) -> None:
    if is_other:
        raise InputError(
            f"own.{field} is {format_value(option)}, but {stored.origin} was trained with "
            f"{format_value(before)}; leave own.{field} as it was, or train again in another "
            "workdir"
        )


def _inferred_task(own: OwnOptions, columns: Columns, files: Mapping[str, Rows]) -> Task:
    """Returns a new task; options that are not set are inferred and logged.

    Classes and the label range are those of the training file.
    """
    kind = kinds.get(own.kind)
    train = files["train"]
    path = train.name
    inferred = []
    template = _template(own, kind, tuple(columns.fields))
    if not own.template:
        inferred.append(f"template {template.text!r}")
    classes = own.classes
    if kind.has_classes and not classes:
        classes = train.class_names()
        more = f" and {len(classes) - LISTED_CLASSES} more" if len(classes) > LISTED_CLASSES else ""
        inferred.append(f"classes {', '.join(classes[:LISTED_CLASSES])}{more}")
        if len(classes) < 2:
            only_class = classes[0] if classes else ""
            raise InputError(
                f"{path}: all labels are {only_class!r}; a task of kind {kind} needs at least two "
                "classes"
            )
    label_range = own.label_range
    if kind.has_range and not label_range:
        label_range = train.label_range()
        inferred.append(f"label_range {label_range}")
        if label_range[0] == label_range[1]:
            raise InputError(f"{path}: all targets are {label_range[0]:g}; set own.label_range")
    if kind.label_column == "classes" and not train.has_several_classes():
        logging.warning(
            "%s: no row of %s has several classes; check own.separator=%r",
            own.name,
            path,
            own.separator,
        )
    if inferred:
        logging.warning("%s: inferred from %s: %s", own.name, path, "; ".join(inferred))
    if not (own.classes or own.label_range) and (count := train.count_placeholders()):
        logging.warning(
            "%s: %d rows of %s have the label -1 and no other is negative; it is %s. If it marks "
            "rows without a label, leave them out",
            own.name,
            count,
            path,
            "a class like any other" if kind.has_classes else "a target like any other",
        )
    return Task(own.name, kind, template, own.metrics, classes, label_range or (0.0, 1.0))


def _template(own: OwnOptions, kind: Kind, fields: Sequence[str]) -> Template:
    """Returns the template of the options, or a default for the fields.

    By default, queries of rankings are protected from truncation.
    """
    text = own.template
    if not text and len(fields) == 1:
        text = f"{{{fields[0]}}}"
    elif not text:
        is_query_and_document = kind.is_list and len(fields) == 2
        names = ("Query", "Document") if is_query_and_document else fields
        text = " ".join(f"{name}: {{{field}}}" for name, field in zip(names, fields, strict=True))
    template = _parsed_template(text, fields)
    after_query = tuple(reversed(fields[1:])) if kind.is_list else ()
    truncation = tuple(identifier(name) for name in own.truncation) or after_query
    truncation = tuple(field for field in truncation if field in template.fields)
    return Template(text, truncation, own.protected_share)


def _parsed_template(text: str, fields: Sequence[str]) -> Template:
    """Parses a template; raises InputError if it names other fields than these."""
    template = Template(text)
    unknown_fields = [field for field in template.fields if field not in fields]
    if unknown_fields:
        raise InputError(
            f"own.template {text!r} names {unknown_fields[0]!r}, which is not among the fields "
            f"{', '.join(fields)}; set own.fields to the columns of the text"
        )
    return template
