"""Sources over tasks that others registered in seqio: `seqio:NAME` in `config.tasks`.

    gemma-encoder train --config=… --config.modules="('my_tasks',)" --config.tasks="('seqio:my_task',)"

A text-to-text task becomes one that an encoder can learn:

| features | kind |
| --- | --- |
| `inputs`, `targets` that are few different texts | classification; the texts are the classes |
| `inputs`, `targets` that are numbers with a decimal point | regression |
| `inputs`, `targets`, and a `query_id` for each element | ranking; targets are grades, or true and false |

A `query_id` comes first, then numbers, then classes. Texts are those before tokenization where the
task copies them (`inputs_pretokenized`), else what its vocabulary makes of the tokens. In a split
whose name begins with "test", the target "<unk>" or "-1" means that none is published. A task
is read at each start, since its preprocessors are code whose changes nothing tells.
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
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Groups, Table
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError, described, unknown
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

PREFIX = "seqio:"
MAX_CLASSES = 100  # different targets: beyond, they are most likely no classes
UNPUBLISHED = ("<unk>", "-1", "-1.0")  # targets of a test split that has none
UNLIMITED = 1 << 20  # tokens of a feature
GRADES = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
QUERY_ID = "query_id"


def _seqio() -> Any:
    return runtime.import_quietly("seqio")


def expand_seqio_mixture(name: str) -> tuple[str, ...]:
    """A task as it is; of a mixture its tasks, as `seqio:MIXTURE/TASK`.

    Raises:
        InputError: seqio has neither.
    """
    seqio, bare = _seqio(), name.removeprefix(PREFIX)
    tasks, mixtures = seqio.TaskRegistry.names(), seqio.MixtureRegistry.names()
    if bare in mixtures:
        subtasks = seqio.get_subtasks(seqio.MixtureRegistry.get(bare))
        return tuple(f"{name}/{task.name}" for task in subtasks)
    mixture, _, task = bare.rpartition("/")
    if task in tasks and (not mixture or mixture in mixtures):
        return (name,)
    if not {*tasks, *mixtures}:
        raise InputError(
            f"task {name}: seqio has no task; config.modules names the module that registers it"
        )
    raise unknown("task or mixture of seqio", bare, {*tasks, *mixtures})


def task_name(name: str) -> str:
    """The name of our task, for files and heads: of a task of seqio without what files forbid."""
    if not name.startswith(PREFIX):
        return name
    return re.sub(r"[^\w.-]", "_", name.removeprefix(PREFIX).rpartition("/")[2])


class SeqioSource(Source):
    """A task of seqio's registry, its kind and classes read off its targets.

    Args:
        name: with the prefix.
        options: the part of the config that concerns sources.

    Raises:
        InputError: it cannot be read, or its targets are nothing that an encoder predicts.
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
                f"task {name}: it has no train split to read its classes from, only "
                f"{', '.join(self.splits)}"
            )
        self._name = name
        self._table = functools.cache(self._read)  # of a split
        self._queries = functools.cache(self._group)  # of a split
        super().__init__(self._declare(), options)
        self._indices = {text: index for index, text in enumerate(self.task.classes)}
        for split in self._labeled:  # all targets and queries, before training
            if self.task.is_list:
                self._queries(split)
            for target in self._table(split).summary["targets"]:
                self._label(target, split, f"task {name}, {split} split")

    @property
    def _labeled(self) -> list[str]:
        return [split for split in self.splits if split.startswith(("train", "validation"))]

    def _declare(self) -> Task:
        """The task that the targets suggest."""
        name, template = task_name(self._name), Template("{inputs}")
        targets = self._table("train").summary["targets"]
        if UNPUBLISHED[0] in targets:
            raise InputError(
                f"task {self._name}: its train split has the target {UNPUBLISHED[0]!r}, which "
                "stands for none"
            )
        ranges = [self._table(split).summary["numbers"] for split in self._labeled]
        if QUERY_ID in self._table("train").arrow.column_names:
            task = Task(name, "ranking", template)
        elif all(ranges) and ranges[0]["has_point"] and ranges[0]["low"] < ranges[0]["high"]:
            low = min(numbers["low"] for numbers in ranges)
            high = max(numbers["high"] for numbers in ranges)
            task = Task(name, "regression", template, label_range=(low, high))
        elif 1 < len(targets) <= MAX_CLASSES:
            classes = kinds.get("classification").order_classes(targets, self._name)
            task = Task(name, "classification", template, classes=classes)
        else:
            count = len(targets) if len(targets) <= MAX_CLASSES else f"more than {MAX_CLASSES}"
            raise InputError(
                f"task {self._name}: its train split has {count} different targets"
                + (f", such as {targets[0][:40]!r}" if targets else "")
                + f"; an encoder predicts classes (2 to {MAX_CLASSES} texts), numbers with a "
                f"decimal point, or grades of documents by their {QUERY_ID}"
            )
        facts = f"{task.kind} {task.kind.describe(task)}".strip()
        logging.warning("%s: inferred from its features: %s", name, facts)
        return task

    def _read(self, split: str) -> Table:
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
        facts = _facts(Table(folder).arrow.column("targets").chunks)
        table.write_summary(folder, {**facts, "digest": digest})

    def _elements(self, split: str) -> Iterator[dict[str, Any]]:
        """The elements by feature; of tokenized ones, with the text under the feature's name."""
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
        """The function that makes a feature text; raises InputError where none can."""
        if feature not in element:
            raise InputError(
                f"task {self._name} has no feature {feature!r}; it has {', '.join(element)}"
            )
        value, declared = element[feature], self._seqio_task.output_features
        if isinstance(value, bytes | str) or np.ndim(value) == 0:
            return _plain
        passed = _seqio().PassThroughVocabulary
        vocabulary = declared[feature].vocabulary if feature in declared else None
        if np.ndim(value) != 1 or vocabulary is None or isinstance(vocabulary, passed):
            raise InputError(
                f"task {self._name}: the feature {feature!r} is no text and cannot be turned into "
                f"one; let its preprocessor keep {feature}_pretokenized, as seqio's tokenize does"
            )
        return lambda tokens: vocabulary.decode([int(token) for token in tokens])

    def _rate(self, mixture: Any) -> float:
        """The task's rate in its mixture."""
        try:
            return float(mixture.get_rate(self._seqio_task))
        except Exception as error:
            raise InputError(
                f"task {self._name}: its mixture has no rate for it ({described(error)}); give the "
                "task's source num_input_examples, or write the rates as numbers"
            ) from error

    def _group(self, split: str) -> Groups:
        if QUERY_ID not in self._table(split).arrow.column_names:
            raise InputError(f"task {self._name}: its {split} split lacks the feature {QUERY_ID}")
        return Groups(*self._table(split).codes(QUERY_ID))

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """The digest of what was read."""
        return [(self._name, self._table(split).summary["digest"])]

    def count(self, split: str) -> int:
        """Elements, or queries."""
        return len(self._queries(split) if self.task.is_list else self._table(split))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The element, or those of a query."""
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
            if text not in self._indices:
                raise InputError(f"{where}: {unknown('class', text, self.task.classes)}")
            return float(self._indices[text])
        label = _grade(text) if self.task.is_list else _parse_number(text)
        if label is None and self.task.is_list:
            raise InputError(
                f"{where}: it has a {QUERY_ID}, so that its targets are grades of documents; "
                f"{text[:40]!r} is no number, and neither true nor false"
            )
        if label is None:
            raise InputError(f"{where}: the target {text[:40]!r} is no number")
        return label


def _facts(chunks: Iterable[Any]) -> dict[str, Any]:
    """The first different targets, and their range and form where all are numbers, for JSON."""
    targets: dict[str, None] = {}
    low, high, has_point, are_numbers = math.inf, -math.inf, False, True
    for chunk in chunks:
        texts = chunk.unique().to_pylist()
        targets |= dict.fromkeys(texts[: MAX_CLASSES + 1])
        numbers = [_parse_number(text) for text in texts]
        if None in numbers:
            are_numbers = False
        elif texts:
            low, high = min(low, *numbers), max(high, *numbers)
            has_point |= any("." in text for text in texts)
    facts = {"low": low, "high": high, "has_point": has_point}
    first = list(itertools.islice(targets, MAX_CLASSES + 1))
    return {"targets": first, "numbers": facts if first and are_numbers else None}


def _plain(value: Any) -> str:
    return table.decode(value, "text", "seqio") if isinstance(value, bytes) else str(value)


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _grade(text: str) -> float | None:
    return GRADES.get(text.strip().lower(), _parse_number(text))
