"""Task `own`: the user's files, described by `config.own`.

    gemma-encoder train --config=own:classification --config.own.train=train.csv --workdir=DIR

Files are JSONL, JSON, CSV, TSV or Parquet, see `files.rows`; a pattern such as `part-*.csv` selects
several. A row is one text, one pair of texts, or one document of a query (ranking); for retrieval
see `own_document_columns`. All rows are checked before training. Options that are not set are
inferred, see `own_task`.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data.files import rows
from gemma_encoder.data.list_retrieval import ListRetrievalSource
from gemma_encoder.data.ranking import report_hopeless_queries
from gemma_encoder.data.source import DataOptions, Record, Source, StoredTask
from gemma_encoder.data.table import Groups
from gemma_encoder.data.tasks.own_checks import check_columns
from gemma_encoder.data.tasks.own_document_columns import DocumentColumns, resolve_retrieval
from gemma_encoder.data.tasks.own_documents import DocumentRows
from gemma_encoder.data.tasks.own_held_out import HeldOut
from gemma_encoder.data.tasks.own_options import OwnOptions
from gemma_encoder.data.tasks.own_rows import Rows
from gemma_encoder.data.tasks.own_task import Reading, resolve_columns, resolve_task
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping
from gemma_encoder.inputs.task import Example, Task


class OwnSource(Source):
    """A task whose records are rows of files, or queries that group rows.

    Args:
        task: the task to learn.
        options: the data options of the config.
        files: the rows of each split.
        held_out: fraction of training records held out if there is no "validation" split.
        reading: the reading of the files.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        files: Mapping[str, Rows | DocumentRows],
        held_out: float,
        reading: Reading | DocumentColumns,
    ):
        super().__init__(task, options)
        self.inferred = reading.to_dict()
        self._files = dict(files)
        self._held_out: HeldOut | None = None  # if validation records are from the training file
        for split, file in files.items():
            file.check_labels(
                task,
                reading.class_indices,
                any_range=reading.range_is_inferred and (split != "train" or bool(options.stored)),
            )
        self._indices = {
            split: file.class_indices(task, reading.class_indices) for split, file in files.items()
        }
        self._queries = {
            split: Groups(*file.queries()) for split, file in files.items() if task.is_list
        }
        if "validation" not in files:
            self._hold_out(held_out)
        self.splits = tuple(split for split in Source.splits if split in self._files)
        self._trainable = None
        if task.is_list:
            self._trainable = self._trainable_queries()
            self._report_queries()

    def _hold_out(self, fraction: float) -> None:
        """Creates the validation split from a fraction of the training records."""
        train = self._files["train"]
        queries = self._queries.get("train")
        self._held_out = HeldOut(train, self.task, self._indices["train"], queries, fraction)
        for by_split in (self._files, self._queries, self._indices):
            if "train" in by_split:
                by_split["validation"] = by_split["train"]
        logging.warning(
            "%s: holding out %s of %s for validation; set own.validation to use a file",
            self.task.name,
            self._held_out.summary,
            train.name,
        )
        if self._held_out.splits_classes:
            logging.warning(
                "%s: no class of %s has two records: those to validate on are of classes that "
                "training does not see",
                self.task.name,
                train.name,
            )
        if self._held_out.splits_equal_texts:
            logging.warning(
                "%s: too few texts of %s are different: the held-out ones are in training, too",
                self.task.name,
                train.name,
            )

    def _index(self, split: str, index: int) -> int:
        """Maps a record of a split to one of its files."""
        if self._held_out is None or split not in self._held_out.records:
            return index
        return int(self._held_out.records[split][index])

    def _available(self, split: str) -> np.ndarray:
        """Returns records of the files of a split, before untrainable queries are skipped."""
        if self._held_out is not None and split in self._held_out.records:
            return self._held_out.records[split]
        return np.arange(len(self._queries[split] if self.task.is_list else self._files[split]))

    def _trainable_queries(self) -> np.ndarray:
        """Returns indices of the training queries with the labels that a list needs."""
        file = self._files["train"]
        available = self._available("train")
        queries = self._queries["train"]
        if self.task.kind.embeds:  # the documents of other queries are negatives
            needed = "positive"
            is_trainable = queries.num_positives(file.numeric_labels())[available] > 0
        else:
            needed = "positive or no negative"
            is_trainable = queries.has_both_labels(file.numeric_labels())[available]
        result = np.flatnonzero(is_trainable)
        if len(result) < len(available):
            logging.warning(
                "%s: %d of %d train queries have no %s and are skipped",
                self.task.name,
                len(available) - len(result),
                len(available),
                needed,
            )
        if not len(result):
            raise InputError(f"{file.name}: no query has a {needed.replace('or no', 'and a')}")
        return result

    def _report_queries(self) -> None:
        """Logs how many queries to evaluate have no relevant document."""
        for split in self.splits:
            if split != "train" and self._files[split].labeled:
                labels = self._files[split].numeric_labels()
                relevant = self._queries[split].num_positives(labels)[self._available(split)]
                judged = np.ones(len(relevant))
                name = f"{self.task.name}: {split} split"
                report_hopeless_queries(name, judged, relevant, relevant > 0)

    def files(self, split: str) -> Sequence[pathlib.Path]:
        """Returns the files of a split."""
        return self._files[split].paths

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Returns the fingerprints of the files and, with them, of the held-out selection."""
        result = super().fingerprints(split)
        if self._held_out is not None and split in self._held_out.records:
            facts = self._held_out.facts
            result = [(name, f"{fingerprint}, {facts}") for name, fingerprint in result]
        return result

    def count(self, split: str) -> int:
        """Returns the number of rows or queries, without untrainable queries."""
        if split == "train" and self._trainable is not None:
            return len(self._trainable)
        if self._held_out is not None and split in self._held_out.records:
            return len(self._held_out.records[split])
        return len(self._queries[split] if self.task.is_list else self._files[split])

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Returns no judgments if grades are unknown, otherwise None: the labels are complete."""
        return None if self._files[split].labeled else {}

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns a row, or the rows of a query."""
        file = self._files[split]
        class_indices = self._indices[split]
        if not self.task.is_list:
            row = self._index(split, index)
            return Record.of([Example(file.fields(row), file.label(row, class_indices))])
        query_id, rows = self._queries[split][self._query(split, index)]
        labels = [file.label(row, class_indices) for row in rows]

        def example(i: int) -> Example:
            return Example(file.fields(rows[i]), labels[i], query_id, file.document_id(rows[i]))

        return Record(labels, example)

    def _query(self, split: str, index: int) -> int:
        if split == "train" and self._trainable is not None:
            index = int(self._trainable[index])
        return self._index(split, index)

    def where(self, split: str, index: int) -> str:
        """Returns the location of a row in its file."""
        if self.task.is_list:
            return f"{self._files[split].name}, {super().where(split, index)}"
        return self._files[split].where(self._index(split, index))


def _make(options: DataOptions) -> Source:
    own = from_mapping(OwnOptions, options.own, "own")
    own.check()
    if kinds.get(own.kind).embeds:
        return _make_retrieval(own, options)
    stored = options.stored.get(own.name)
    paths = own.paths()
    first = paths["train"][0]
    columns = resolve_columns(own, first, rows.read_rows(first)[0], stored)
    origin = _origin(first, stored)
    files = {
        split: Rows(own, columns, named, origin, labeled=split != "test")
        for split, named in paths.items()
    }
    check_columns(own, columns, files)
    task, reading = resolve_task(own, columns, files, stored)
    logging.info("own: %s", task)
    return OwnSource(task, options, files, own.held_out, reading)


def _make_retrieval(own: OwnOptions, options: DataOptions) -> Source:
    stored = options.stored.get(own.name)
    paths = own.paths()
    first = paths["train"][0]
    task, columns = resolve_retrieval(own, options, first, rows.read_rows(first)[0], stored)
    origin = _origin(first, stored)
    files = {
        split: DocumentRows(own, columns, named, origin, split) for split, named in paths.items()
    }
    logging.info("own: %s", task)
    lists = OwnSource(task, options, files, own.held_out, columns)
    lists.has_teacher = files["train"].has_scores
    return ListRetrievalSource(task, options, lists)


def _origin(first: pathlib.Path, stored: StoredTask | None) -> str:
    """Names the data that the columns are of, for messages."""
    return str(first) if stored is None else f"the data of {stored.origin}"


TASKS: dict[str, Callable[[DataOptions], Source]] = {"own": _make}
