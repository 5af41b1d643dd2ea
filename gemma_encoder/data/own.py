"""The user's own files, by config alone: `config.own`, task `own`.

    gemma-encoder train --config=own:classification --config.own.train=train.csv --workdir=DIR

Files are JSONL, CSV, TSV or Parquet, see `tables`; each row is one text, one pair of texts, or one
document of a query (ranking). Every row is checked before training starts. What the config leaves
open is read off the training file, and logged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data import tables
from gemma_encoder.data.memory import NumberedSource
from gemma_encoder.data.own_options import OwnOptions
from gemma_encoder.data.own_rows import Columns, Rows, identifier
from gemma_encoder.data.source import DataOptions, Source, sample_list
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import Kind, Label
from gemma_encoder.inputs.options import from_mapping
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template


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
        if task.is_list:
            self._chosen["train"] = self._trainable()
        for split in self.splits:
            self._chosen[split] = self._chosen[split][: options.limit(split) or None]

    def _group(self, rows: Rows) -> tuple[list[str], np.ndarray, np.ndarray]:
        if not self.task.is_list:
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
            "%s: %d of %d %s of %s are held out for validation, unless a validation file is named",
            self.task.name,
            held,
            count,
            "queries" if self.task.is_list else "records",
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
                "%s: %d of %d train queries have no positive or no negative and are skipped",
                self.task.name,
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
        if not self.task.is_list:
            return [Example(file.fields(row), _label(labels[row])) for row in rows]
        if rng is not None:
            rows = sample_list(
                rows[labels[rows] > 0], rows[labels[rows] <= 0], self.options.list_size, rng
            )
        return [
            Example(file.fields(row), _label(labels[row]), names[number], file.document_id(row))
            for row in rows
        ]


def _label(value: Any) -> Label:
    return value if isinstance(value, tuple) else float(value)


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
    """The task, with what the options leave open read off the files, and logged."""
    kind, path, inferred = kinds.get(own.kind), files["train"].path, []
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
        labels = [rows.table.numbers("label") for rows in files.values() if rows.labelled]
        values = np.concatenate(labels)
        label_range = (float(values.min()), float(values.max()))
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
    cut = tuple(identifier(name) for name in own.cut) or after_query
    return Template(text, tuple(field for field in cut if field in template.fields))


TASKS: dict[str, Callable[[DataOptions], Source]] = {"own": _make}
