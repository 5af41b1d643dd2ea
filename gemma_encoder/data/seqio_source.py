"""Sources over tasks of seqio's registry: `seqio:NAME` in `config.tasks`.

    gemma-encoder train --config=… --config.modules="('my_tasks',)"
        --config.tasks="('seqio:my_task',)"

The kind of a text-to-text task is inferred from its features, in this order:

| features | kind |
| --- | --- |
| a `query_id` in each element | ranking; targets are grades, or true and false |
| `targets` are numbers with a decimal point | regression |
| `targets` have few distinct values | classification; the values are the classes |

Texts are read before tokenization if the task keeps them (`inputs_pretokenized`); otherwise the
tokens are decoded with the task's vocabulary. In splits whose name starts with "test", the targets
"<unk>" and "-1" mark unpublished labels. A task is read again at every start, because changes of
its preprocessors cannot be detected.
"""

import functools
import hashlib
import itertools
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder import runtime
from gemma_encoder.data import table
from gemma_encoder.data.files.lines import parse_number
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Groups, Table
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.class_names import canonical_name
from gemma_encoder.inputs.errors import InputError, described, unknown
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

PREFIX = "seqio:"
MAX_CLASSES = 100  # more distinct targets are unlikely to be classes
UNPUBLISHED = ("<unk>", "-1", "-1.0")  # targets of test splits without published labels
UNLIMITED = 1 << 20  # tokens of a feature: disables truncation
GRADES = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
QUERY_ID = "query_id"


def _seqio() -> Any:
    return runtime.import_quietly("seqio")


def expand_seqio_mixture(name: str) -> tuple[str, ...]:
    """Expands a seqio mixture to its tasks, as `seqio:MIXTURE/TASK`; returns tasks unchanged.

    Raises:
        InputError: seqio has no such task or mixture.
    """
    seqio = _seqio()
    tasks = seqio.TaskRegistry.names()
    mixtures = seqio.MixtureRegistry.names()
    seqio_name = name.removeprefix(PREFIX)
    if seqio_name in mixtures:
        subtasks = seqio.get_subtasks(seqio.MixtureRegistry.get(seqio_name))
        return tuple(f"{name}/{task.name}" for task in subtasks)
    mixture, _, task = seqio_name.rpartition("/")
    if task in tasks and (not mixture or mixture in mixtures):
        return (name,)
    if not {*tasks, *mixtures}:
        raise InputError(
            f"task {name}: no task is registered in seqio; set config.modules to the module that "
            "registers it"
        )
    raise unknown("task or mixture of seqio", seqio_name, {*tasks, *mixtures})


def task_name(name: str) -> str:
    """Returns the name of a task for files and heads, for seqio tasks in file-safe characters."""
    if not name.startswith(PREFIX):
        return name
    return re.sub(r"[^\w.-]", "_", name.removeprefix(PREFIX).rpartition("/")[2])


class SeqioSource(Source):
    """A task of seqio's registry, with its kind and classes inferred from its targets.

    Args:
        name: name of the task, with the prefix.
        options: the data options of the config.

    Raises:
        InputError: the task cannot be read, or an encoder cannot predict its targets.
    """

    def __init__(self, name: str, options: DataOptions):
        expand_seqio_mixture(name)
        self.mixture, _, task = name.removeprefix(PREFIX).rpartition("/")
        self._seqio_task = _seqio().TaskRegistry.get(task)
        if self.mixture:
            self.rate = self._rate(_seqio().MixtureRegistry.get(self.mixture))
        self.splits = tuple(self._seqio_task.splits)
        if "train" not in self.splits:
            raise InputError(
                f"task {name}: it has no train split to infer classes from, only "
                f"{', '.join(self.splits)}"
            )
        self._name = name
        self._table = functools.cache(self._read)  # by split
        self._queries = functools.cache(self._group)  # by split
        stored = options.stored.get(task_name(name))
        super().__init__(self._declare() if stored is None else stored.task, options)
        self.inferred = {"range_is_inferred": True} if self.task.kind.has_range else {}
        self._indices = {
            canonical_name(name): index for index, name in enumerate(self.task.classes)
        }
        for split in self._labeled:  # check all targets and queries before training
            if self.task.is_list:
                self._queries(split)
            for target in self._table(split).summary["targets"]:
                self._label(target, split, f"task {name}, {split} split")

    @property
    def _labeled(self) -> list[str]:
        others = [split for split in self.splits if split.startswith("validation")]
        return ["train", *others]

    def _declare(self) -> Task:
        """Infers the task from its targets."""
        name = task_name(self._name)
        template = Template("{inputs}")
        targets = self._table("train").summary["targets"]
        if UNPUBLISHED[0] in targets:
            raise InputError(
                f"task {self._name}: its train split has the target {UNPUBLISHED[0]!r}, which "
                "marks an unpublished label"
            )
        ranges = [self._table(split).summary["numbers"] for split in self._labeled]
        if QUERY_ID in self._table("train").arrow.column_names:
            task = Task(name, "ranking", template)
        elif all(ranges) and ranges[0]["has_point"] and ranges[0]["low"] < ranges[0]["high"]:
            train = self._table("train").summary["numbers"]
            task = Task(name, "regression", template, label_range=(train["low"], train["high"]))
        elif 1 < len(targets) <= MAX_CLASSES:
            names = set(map(canonical_name, targets))
            classes = kinds.get("classification").order_classes(names, self._name)
            task = Task(name, "classification", template, classes=classes)
        else:
            count = len(targets) if len(targets) <= MAX_CLASSES else f"more than {MAX_CLASSES}"
            example = f", such as {targets[0][:40]!r}" if targets else ""
            raise InputError(
                f"task {self._name}: its train split has {count} distinct targets{example}; an "
                f"encoder predicts classes (2 to {MAX_CLASSES} texts), numbers with a decimal "
                f"point, or grades of documents with a {QUERY_ID}"
            )
        description = f"{task.kind} {task.kind.describe(task)}".strip()
        logging.warning("%s: inferred from its features: %s", name, description)
        return task

    def _read(self, split: str) -> Table:
        """Reads a split into a table."""
        with tempfile.TemporaryDirectory() as folder:
            self._write(pathlib.Path(folder), split)
            return Table(pathlib.Path(folder))

    def _write(self, folder: pathlib.Path, split: str) -> None:
        import pyarrow as pa

        elements = self._elements(split)
        first = next(elements, None)
        if first is None:
            raise InputError(f"task {self._name}: its {split} split is empty")
        columns = {"inputs": self._text(first, "inputs"), "targets": self._text(first, "targets")}
        if QUERY_ID in first:
            columns[QUERY_ID] = _plain
        rows = (
            [read(element[column]) for column, read in columns.items()]
            for element in itertools.chain([first], elements)
        )
        table.write_table_rows(folder, dict.fromkeys(columns, pa.large_string()), rows)
        digest = hashlib.sha256((folder / table.FILE).read_bytes()).hexdigest()
        summary = _summarize_targets(Table(folder).arrow.column("targets").chunks)
        table.write_summary(folder, {**summary, "digest": digest})

    def _elements(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields elements by feature, with pretokenized texts in place of tokens."""
        try:
            features = self._seqio_task.output_features.items()
            unlimited = {name: UNLIMITED for name, feature in features if feature.rank}
            dataset = self._seqio_task.get_dataset(
                sequence_length=unlimited, split=split, shuffle=False, seed=0
            )
            for element in dataset.as_numpy_iterator():
                for name in ("inputs", "targets"):
                    if f"{name}_pretokenized" in element:
                        element[name] = element[f"{name}_pretokenized"]
                yield element
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"task {self._name}: its {split} split cannot be read: {described(error)}"
            ) from error

    def _text(self, element: Mapping[str, Any], feature: str) -> Callable[[Any], str]:
        """Returns the function that converts a feature to text.

        Raises:
            InputError: the feature is missing, or there is no text and no vocabulary to decode it.
        """
        if feature not in element:
            raise InputError(
                f"task {self._name} has no feature {feature!r}; it has {', '.join(element)}"
            )
        value = element[feature]
        if isinstance(value, bytes | str) or np.ndim(value) == 0:
            return _plain
        declared = self._seqio_task.output_features
        vocabulary = declared[feature].vocabulary if feature in declared else None
        pass_through = isinstance(vocabulary, _seqio().PassThroughVocabulary)
        if np.ndim(value) != 1 or vocabulary is None or pass_through:
            raise InputError(
                f"task {self._name}: the feature {feature!r} is not text and cannot be decoded; "
                f"make its preprocessor keep {feature}_pretokenized, as seqio's tokenize does"
            )
        return lambda tokens: vocabulary.decode([int(token) for token in tokens])

    def _rate(self, mixture: Any) -> float:
        """Returns the rate of the task in its mixture."""
        try:
            return float(mixture.get_rate(self._seqio_task))
        except Exception as error:
            raise InputError(
                f"task {self._name}: its mixture has no rate for it ({described(error)}); pass "
                "num_input_examples to the task's source, or give the rates as numbers"
            ) from error

    def _group(self, split: str) -> Groups:
        """Groups the rows of a split by query."""
        if QUERY_ID not in self._table(split).arrow.column_names:
            raise InputError(f"task {self._name}: its {split} split lacks the feature {QUERY_ID}")
        return Groups(*self._table(split).codes(QUERY_ID))

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Returns the digest of the elements that were read."""
        return [(self._name, self._table(split).summary["digest"])]

    def count(self, split: str) -> int:
        """Returns the number of elements, or of queries for ranking."""
        return len(self._queries(split) if self.task.is_list else self._table(split))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns one element, or the elements of a query."""
        if not self.task.is_list:
            return Record.of([self._example(split, index)])
        query, rows = self._queries(split)[index]
        return Record.of([self._example(split, row, query, str(i)) for i, row in enumerate(rows)])

    def _example(self, split: str, row: int, query: str = "", document: str = "") -> Example:
        values = self._table(split).row(row)
        label = self._label(values["targets"], split, self.where(split, row))
        return Example({"inputs": values["inputs"]}, label, query, document)

    def _label(self, text: str, split: str, where: str) -> float:
        if split.startswith("test") and text in UNPUBLISHED:
            return UNLABELED
        if self.task.classes:
            index = self._indices.get(canonical_name(text))
            if index is None:
                raise InputError(f"{where}: {unknown('class', text, self.task.classes)}")
            return float(index)
        label = _parse_grade(text) if self.task.is_list else _parse_number(text)
        if label is None and self.task.is_list:
            raise InputError(
                f"{where}: elements with a {QUERY_ID} need grades as targets; {text[:40]!r} is "
                "neither a number nor true or false"
            )
        if label is None:
            raise InputError(f"{where}: the target {text[:40]!r} is not a number")
        return label


def _summarize_targets(chunks: Iterable[Any]) -> dict[str, Any]:
    """Summarizes targets for JSON: the first distinct ones, and their range if all are numbers."""
    targets: dict[str, None] = {}
    low = math.inf
    high = -math.inf
    has_point = False
    are_numeric = True
    for chunk in chunks:
        texts = chunk.unique().to_pylist()
        targets |= dict.fromkeys(texts[: MAX_CLASSES + 1])
        values = [_parse_number(text) for text in texts]
        if None in values:
            are_numeric = False
        elif texts:
            low = min(low, *values)
            high = max(high, *values)
            has_point |= any("." in text for text in texts)
    limits = {"low": low, "high": high, "has_point": has_point}
    first = list(itertools.islice(targets, MAX_CLASSES + 1))
    return {"targets": first, "numbers": limits if first and are_numeric else None}


def _plain(value: Any) -> str:
    return table.decode(value, "text", "seqio") if isinstance(value, bytes) else str(value)


def _parse_number(text: str) -> float | None:
    """Parses a finite number; returns None for any other text."""
    value = parse_number(text)
    return None if math.isnan(value) else value


def _parse_grade(text: str) -> float | None:
    """Parses a number or a truth value; returns None for any other text."""
    return GRADES.get(text.strip().lower(), _parse_number(text))
