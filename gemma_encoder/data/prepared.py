"""Prepared tasks: records whose texts were tokenized ahead of training.

A prepared task is a folder:

    info.json                     task, tokenizer, length, fingerprints of the raw data, sizes
    train/00003/rows.arrow        the records of the fourth part of a split, with their tokens
    validation.qrels.json         the qrels of a ranking task

A record stores every text that may be drawn from it. Shuffling, the drawing of training lists and
the mixing of tasks are the same as for raw data, so a folder is valid for any seed, number of
readers, number of epochs and list size, and training batches are bitwise identical.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from gemma_encoder.data import cache, table
from gemma_encoder.data.segments import CHUNK, count_texts, encode_examples
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError, described, one_line, reason
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import EncodedText
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.whole_files import whole_file, write_whole

FORMER_NAMES = {
    "cut": "truncation",
    "max_train": "max_train_examples",
    "max_eval": "max_eval_examples",
}
VERSION = 2  # of the folder; incremented when the meaning of its files changes
INFO = "info.json"  # written last: marks a folder as complete
BEGUN = "begun.json"  # the same content, written first
PART = 10_000  # records per part; lists have fewer, in proportion to their number of texts
FREE = ("list_size", "stored")  # data options that prepared data do not depend on


class Part(NamedTuple):
    """Consecutive records of a split, stored in one table."""

    split: str
    index: int
    first: int
    last: int  # exclusive

    @property
    def path(self) -> str:
        """Folder of the table, relative to the task's folder."""
        return f"{self.split}/{self.index:05d}"


def parts(source: Source) -> list[Part]:
    """Returns all parts of a task, without evaluation splits whose data are missing.

    Raises:
        InputError: the data of the train split are missing.
    """
    step = max(PART // 100, 1) if source.task.is_list else PART  # a list has some hundred texts
    result = []
    for split in source.splits:
        try:
            size = source.size(split)
        except InputError as error:
            if split == "train":
                raise
            logging.warning("%s: skipping the split %s: %s", source.task.name, split, error)
            continue
        starts = enumerate(range(0, size, step))
        result += [Part(split, i, first, min(first + step, size)) for i, first in starts]
    return result


def describe_prepared(source: Source, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns all facts that the files of a prepared task depend on, for JSON."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for part in parts(source):
        spans.setdefault(part.split, []).append((part.first, part.last))
    facts = {
        "version": VERSION,
        "task": source.task.to_dict(),
        "parts": spans,
        "first_stage": source.first_stage,
        "mixture": [source.mixture, source.rate],
        "data": {split: source.fingerprints(split) for split in spans},
        "inferred": dict(source.inferred) or None,
    }
    return _as_json(facts) | _contract(source.options, tokenizer, max_length)


def _contract(options: DataOptions, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns the facts that must be equal when a folder is prepared and when it is read."""
    fields = dataclasses.asdict(options)
    digest = hashlib.sha256(tokenizer.model).hexdigest()
    return _as_json(
        {
            "tokenizer": {"name": tokenizer.name, "sha256": digest},
            "max_length": max_length,
            "options": {name: value for name, value in fields.items() if name not in FREE},
        }
    )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(to_json(values, default=list))


def write_part(
    source: Source, part: Part, tokenizer: Tokenizer, max_length: int, folder: epath.PathLike
) -> dict[str, int]:
    """Writes one part of a task unless its file exists.

    The file is renamed only when it is complete, so several workers may write the same part.

    Args:
        source: the task with its raw data.
        part: the records to write.
        tokenizer, max_length: the same as for training.
        folder: the folder of the task.

    Returns:
        Counts of records, texts, tokens, truncated texts and truncated tokens.
    """
    import pyarrow as pa

    path = epath.Path(folder) / part.path / table.FILE
    counts = dict.fromkeys(("records", "texts", "tokens", "cut_texts", "cut_tokens"), 0)
    if path.exists():
        return counts
    path.parent.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[list[Any]]:
        for examples in _encoded(source, part, tokenizer, max_length):
            counts["records"] += 1
            counts["tokens"] += sum(len(example.encoded.tokens) for example in examples)
            count_texts(counts, [example.encoded for example in examples])
            yield _row(examples, with_fields=part.split != "train")

    types = {
        "tokens": pa.large_list(pa.list_(pa.int32())),
        "cut": pa.list_(pa.int32()),  # truncated tokens of each text
        "labels": pa.list_(pa.float64()),
        "about": pa.large_string(),  # JSON: everything else
    }
    qrels = source.qrels(part.split) if part.split != "train" else None
    try:
        if qrels is not None:
            write_whole(_qrels_file(folder, part.split), to_json(qrels))
        with whole_file(path) as temporary:
            table.write_table_rows(temporary.parent, types, rows(), 1000, temporary.name)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {reason(error)}; rerun the command to resume"
        ) from error
    return counts


def _encoded(
    source: Source, part: Part, tokenizer: Tokenizer, max_length: int
) -> Iterator[list[Example]]:
    """Yields the encoded examples of each record of a part, in order."""
    is_drawn = part.split == "train" and source.task.is_list
    for first in range(part.first, part.last, CHUNK):
        indices = range(first, min(first + CHUNK, part.last))
        records: list[list[Example]] = []
        where: list[str] = []
        for index in indices:
            record = source.record(part.split, index, training=is_drawn)
            records.append([record.example(i) for i in range(len(record.labels))])
            where += [source.where(part.split, index)] * len(record.labels)
        flat = [example for examples in records for example in examples]
        encoded = iter(encode_examples(source.task, flat, where, tokenizer, max_length))
        for examples in records:
            yield [example._replace(encoded=next(encoded)) for example in examples]


def _row(examples: Sequence[Example], with_fields: bool) -> list[Any]:
    """Returns the row of a record: tokens, truncated tokens, labels, and JSON."""
    labels = [0.0 if isinstance(e.label, tuple) else float(e.label) for e in examples]
    return [
        [example.encoded.tokens for example in examples],
        [example.encoded.num_truncated for example in examples],
        labels,
        to_json([_about(example, with_fields) for example in examples]),
    ]


def _about(example: Example, with_fields: bool) -> dict[str, Any]:
    """Returns everything about an example that has no column of its own, for JSON."""
    about = {"query": example.query_id, "document": example.document_id}
    about |= {"info": dict(example.info), "role": example.role}
    if with_fields:
        about["fields"] = example.fields
    if isinstance(example.label, tuple):
        about["classes"] = example.label
    return about


def _qrels_file(folder: epath.PathLike, split: str) -> epath.Path:
    return epath.Path(folder) / f"{split}.qrels.json"


def begin(folder: epath.PathLike, description: Mapping[str, Any]) -> bool:
    """Creates a folder for a task's files or continues one; returns False if it is complete.

    Raises:
        InputError: it has parts for another description, or cannot be written.
    """
    folder = epath.Path(folder)
    for path in (folder / INFO, folder / BEGUN):
        is_empty = path.name == BEGUN and not any(folder.glob(f"*/*/{table.FILE}"))
        if is_empty or not path.exists():
            continue
        if differences := _differences(_read_info(path), description):
            raise InputError(
                f"{folder} was prepared differently ({'; '.join(differences)}); choose another "
                "folder or delete it"
            )
        if path.name == INFO:
            return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / BEGUN, to_json(description, indent=1))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return True


def finish(folder: epath.PathLike) -> None:
    """Marks a folder as complete."""
    (epath.Path(folder) / BEGUN).replace(epath.Path(folder) / INFO)


def _with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Renames fields of a JSON object, and of those in it, to their current names."""
    return {
        FORMER_NAMES.get(name, name): _with_current_names(value)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def _read_info(path: epath.Path) -> dict[str, Any]:
    try:
        return _with_current_names(read_object(path))
    except InputError as error:
        raise InputError(f"{path} is damaged; delete the folder and prepare it again") from error


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Lists the entries of `current` with other stored values, as "name: stored -> current"."""
    differences = []
    for name, value in current.items():
        before = stored.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            differences += [f"{name}.{line}" for line in _differences(before, value)]
        elif before != value:
            differences.append(f"{name}: {before!r} -> {value!r}")
    return differences


class PreparedSource(Source):
    """A task read from its prepared folder; the raw data are not needed.

    Args:
        name: name of the task.
        root: the folder of prepared tasks.
        options: the data options of the config; see `check_prepared`.

    Raises:
        InputError: the folder does not exist, is incomplete or damaged, or has an old format.
    """

    def __init__(self, name: str, root: epath.PathLike, options: DataOptions):
        self.folder = epath.Path(root) / task_name(name)
        if not (self.folder / INFO).exists():
            incomplete = "is incomplete: the program that prepares it did not finish"
            state = incomplete if (self.folder / BEGUN).exists() else "does not exist"
            raise InputError(
                f"task {name!r}: the prepared folder {self.folder} {state}; "
                "run gemma-encoder prepare with this config"
            )
        self.info = _read_info(self.folder / INFO)
        if self.info.get("version") != VERSION:
            raise InputError(
                f"{self.folder} has version {self.info.get('version')}, this program reads version "
                f"{VERSION}; prepare it again"
            )
        try:
            task = Task.from_dict(self.info["task"])
            self.splits = tuple(self.info["parts"])
            self.first_stage = self.info["first_stage"]
            self.mixture, self.rate = self.info["mixture"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / INFO} is damaged: {described(error)}") from error
        if task.name != task_name(name):
            raise InputError(
                f"{self.folder} contains the task {task.name!r}, not {task_name(name)!r}"
            )
        super().__init__(task, options)
        self.inferred = self.info.get("inferred") or {}
        self._table = functools.cache(self._open)

    def count(self, split: str) -> int:
        """Returns the number of records of the raw data."""
        spans = self.info["parts"][split]
        return spans[-1][1] if spans else 0

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Returns the fingerprints of the raw data."""
        return [(name, value) for name, value in self.info["data"][split]]

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns encoded examples; only those of evaluation splits have their fields."""
        if split == "train" and self.task.is_list and not training:
            raise InputError(
                f"task {self.task.name!r}: prepared lists of the train split support training "
                "only; use the raw data to evaluate"
            )
        spans = self.info["parts"][split]
        part = bisect.bisect_right(spans, index, key=lambda span: span[1])
        rows = self._table(split, part)
        row = index - spans[part][0]
        about = json.loads(rows.value("about", row))
        texts = rows.arrow.column("tokens")[row].values
        num_truncated = rows.value("cut", row)
        labels = [
            tuple(facts["classes"]) if "classes" in facts else label
            for facts, label in zip(about, rows.value("labels", row), strict=True)
        ]

        def example(i: int) -> Example:
            facts = about[i]
            fields = facts.get("fields", {})
            ids = (facts["query"], facts["document"])
            encoded = EncodedText(table.numeric_values(texts[i].values), num_truncated[i])
            return Example(fields, labels[i], *ids, facts["info"], encoded, facts["role"])

        return Record(labels, example)

    def _open(self, split: str, part: int) -> Table:
        """Opens the table of a part; a remote one is first copied to the cache folder."""
        folder = self.folder / f"{split}/{part:05d}"
        if "://" in str(folder):
            file = folder / table.FILE
            folder = cache.keep(
                [file], "prepared part", lambda to: file.copy(epath.Path(to) / table.FILE)
            )
        first, last = self.info["parts"][split][part]
        try:
            rows = Table(pathlib.Path(folder))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} is damaged or missing ({one_line(error)}); prepare it again"
            ) from error
        if len(rows) != last - first:
            raise InputError(
                f"{folder} has {len(rows)} records instead of {last - first}; prepare it again"
            )
        return rows

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Returns the qrels of the raw data."""
        file = _qrels_file(self.folder, split)
        return read_object(file, "prepare it again") if file.exists() else None


def check_prepared(
    sources: Sequence[PreparedSource], tokenizer: Tokenizer, max_length: int
) -> None:
    """Raises InputError if tasks were prepared with different tokenizers or another config."""
    by_digest = {source.info["tokenizer"]["sha256"]: source for source in sources}
    if len(by_digest) > 1:
        names = [
            f"{source.task.name!r} with {source.info['tokenizer']['name']!r} ({digest[:8]})"
            for digest, source in by_digest.items()
        ]
        raise InputError(
            "the tasks of a mixture must share one tokenizer, but were prepared as "
            f"{' and '.join(names)}; prepare one of them again"
        )
    for source in sources:
        contract = _contract(source.options, tokenizer, max_length)
        if differences := _differences(source.info, contract):
            raise InputError(
                f"{source.folder} was prepared for another config: {'; '.join(differences)}; "
                "prepare it again in another folder, or revert the change"
            )
