"""Tasks whose texts were tokenized ahead, by record; training then reads tokens.

A prepared task is a folder:

    info.json                     task, tokenizer, length, fingerprints of the raw data, sizes
    train/00003/rows.arrow        the records of the fourth part of a split, with their tokens
    validation.qrels.json         the judgments of a ranking task

A record holds every text that may be drawn from it, and the order of an epoch, the drawing of lists
and the mixing of tasks are the same as for raw data. So one folder serves any seed, number of
readers, number of epochs and list size, and training sees the same batches, to the bit.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from gemma_encoder.data import cache, table
from gemma_encoder.data.segments import CHUNK, count_texts, encode_examples
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError, described, one_line
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import EncodedText
from gemma_encoder.inputs.tokenizer import Tokenizer

FORMER_NAMES = {
    "cut": "truncation",
    "max_train": "max_train_examples",
    "max_eval": "max_eval_examples",
}
VERSION = 2  # of the folder; raised when the meaning of its files changes
INFO = "info.json"  # written last: a folder that has it is whole
BEGUN = "begun.json"  # the same content, written first
PART = 10_000  # records of a part; a list counts as many as it has texts on average
FREE = ("list_size",)  # options of the sources that prepared data do not depend on


class Part(NamedTuple):
    """Consecutive records of a split, the content of one table."""

    split: str
    index: int
    first: int
    last: int  # exclusive

    @property
    def path(self) -> str:
        """The table's folder in the task's."""
        return f"{self.split}/{self.index:05d}"


def parts(source: Source) -> list[Part]:
    """All parts of a task; a split other than train whose data are absent is left out."""
    step = max(PART // 100, 1) if source.task.is_list else PART  # a list holds some hundred texts
    result = []
    for split in source.splits:
        try:
            size = source.size(split)
        except InputError as error:
            if split == "train":
                raise
            logging.warning("%s: the split %s is left out: %s", source.task.name, split, error)
            continue
        starts = enumerate(range(0, size, step))
        result += [Part(split, i, first, min(first + step, size)) for i, first in starts]
    return result


def describe_prepared(source: Source, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The facts that the files of a task depend on, for JSON."""
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
    }
    return _as_json(facts) | _contract(source.options, tokenizer, max_length)


def _contract(options: DataOptions, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The facts that must be the same where files are made and where they are read."""
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
    """`values` as they come back from a file."""
    return json.loads(json.dumps(values, default=list))


def write_part(
    source: Source, part: Part, tokenizer: Tokenizer, max_length: int, folder: epath.PathLike
) -> dict[str, int]:
    """Writes one part of a task unless it is there; it has its name only when it is whole.

    Args:
        source: the task, read raw.
        part: the records.
        tokenizer, max_length: as training will have them.
        folder: of the task.

    Returns:
        Records, texts, tokens, truncated texts and truncated tokens.
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
        "cut": pa.list_(pa.int32()),
        "labels": pa.list_(pa.float64()),
        "about": pa.large_string(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        table.write_table_rows(pathlib.Path(temporary), types, rows(), batch=1000)
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        partial = path.with_name(f"{path.name}.{writer}.part")
        epath.Path(temporary, table.FILE).copy(partial, overwrite=True)
        partial.replace(path)
    if part.split != "train" and (qrels := source.qrels(part.split)) is not None:
        _qrels_file(folder, part.split).write_text(json.dumps(qrels))
    return counts


def _encoded(
    source: Source, part: Part, tokenizer: Tokenizer, max_length: int
) -> Iterator[list[Example]]:
    """The examples of each record of a part, in order, with their tokens."""
    is_drawn = part.split == "train" and source.task.is_list
    for first in range(part.first, part.last, CHUNK):
        indices = range(first, min(first + CHUNK, part.last))
        records = [source.record(part.split, index, training=is_drawn) for index in indices]
        examples = [[record.example(i) for i in range(len(record.labels))] for record in records]
        names = [source.where(part.split, index) for index in indices]
        flat = [example for of_record in examples for example in of_record]
        where = [name for name, some in zip(names, examples, strict=True) for _ in some]
        tokens = iter(encode_examples(source.task, flat, where, tokenizer, max_length))
        for of_record in examples:
            yield [example._replace(encoded=next(tokens)) for example in of_record]


def _row(examples: Sequence[Example], with_fields: bool) -> list[Any]:
    about = [
        {"query": e.query_id, "document": e.document_id, "info": dict(e.info), "role": e.role}
        | ({"fields": e.fields} if with_fields else {})
        | ({"classes": e.label} if isinstance(e.label, tuple) else {})
        for e in examples
    ]
    labels = [0.0 if isinstance(e.label, tuple) else float(e.label) for e in examples]
    tokens = [example.encoded.tokens for example in examples]
    return [
        tokens,
        [example.encoded.num_truncated for example in examples],
        labels,
        json.dumps(about),
    ]


def _qrels_file(folder: epath.PathLike, split: str) -> epath.Path:
    return epath.Path(folder) / f"{split}.qrels.json"


def begin(folder: epath.PathLike, description: Mapping[str, Any]) -> bool:
    """Makes a folder ready for a task's files; False where they are all there.

    A folder that was begun is continued. Raises InputError where it holds files of another kind.
    """
    folder = epath.Path(folder)
    for path in (folder / INFO, folder / BEGUN):
        if not path.exists():
            continue
        if unequal := _differences(_read_info(path), description):
            raise InputError(
                f"{folder} was prepared differently ({'; '.join(unequal)}); name another folder, "
                "or delete it"
            )
        if path.name == INFO:
            return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).write_text(json.dumps(description, indent=1))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return True


def finish(folder: epath.PathLike) -> None:
    """Declares a folder whole."""
    (epath.Path(folder) / BEGUN).replace(epath.Path(folder) / INFO)


def _with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the fields that were renamed since it was written."""
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


def _read_info(path: epath.Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(), object_hook=_with_current_names)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise InputError(f"{path} is damaged; delete the folder and prepare it anew")
    return info


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries of `now` that are stored otherwise, as "name: stored -> now"."""
    unequal = []
    for name, value in now.items():
        before = stored.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            unequal += [f"{name}.{line}" for line in _differences(before, value)]
        elif before != value:
            unequal.append(f"{name}: {before!r} -> {value!r}")
    return unequal


class PreparedSource(Source):
    """A task read from its prepared folder; the raw data are not needed.

    Args:
        name: the task.
        root: the folder that holds prepared tasks.
        options: the part of the config that concerns sources; what the files depend on must be as
            when they were made.

    Raises:
        InputError: the folder is not there, or not whole.
    """

    def __init__(self, name: str, root: epath.PathLike, options: DataOptions):
        self.folder = epath.Path(root) / task_name(name)
        if not (self.folder / INFO).exists():
            state = "does not exist"
            if (self.folder / BEGUN).exists():
                state = "is not whole: the program that prepares it did not end"
            raise InputError(
                f"task {name!r}: the prepared folder {self.folder} {state}; "
                "run gemma-encoder prepare with this config"
            )
        self.info = _read_info(self.folder / INFO)
        if self.info.get("version") != VERSION:
            raise InputError(
                f"{self.folder} is of version {self.info.get('version')}, this program reads "
                f"{VERSION}; prepare it anew"
            )
        try:
            task = Task.from_dict(self.info["task"])
            self.splits = tuple(self.info["parts"])
            self.first_stage = self.info["first_stage"]
            self.mixture, self.rate = self.info["mixture"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / INFO} is damaged: {described(error)}") from error
        if task.name != task_name(name):
            raise InputError(f"{self.folder} holds the task {task.name!r}, not {task_name(name)!r}")
        super().__init__(task, options)
        self._table = functools.cache(self._open)

    def count(self, split: str) -> int:
        """As the raw data had it."""
        spans = self.info["parts"][split]
        return spans[-1][1] if spans else 0

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Those of the raw data."""
        return [(name, value) for name, value in self.info["data"][split]]

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The examples with their tokens; their fields are there for evaluation only."""
        if split == "train" and self.task.is_list and not training:
            raise InputError(
                f"task {self.task.name!r}: prepared lists of the train split can be trained on, "
                "not evaluated; use the raw data"
            )
        spans = self.info["parts"][split]
        part = bisect.bisect_right(spans, index, key=lambda span: span[1])
        rows, row = self._table(split, part), index - spans[part][0]
        labels, about = rows.value("labels", row), json.loads(rows.value("about", row))
        texts, cut = rows.arrow.column("tokens")[row].values, rows.value("cut", row)
        labels = [
            tuple(facts["classes"]) if "classes" in facts else label
            for facts, label in zip(about, labels, strict=True)
        ]

        def example(i: int) -> Example:
            facts, fields = about[i], about[i].get("fields", {})
            encoded = EncodedText(table.numeric_values(texts[i].values), cut[i])
            names = (facts["query"], facts["document"], facts["info"])
            return Example(fields, labels[i], *names, encoded, facts["role"])

        return Record(labels, example)

    def _open(self, split: str, part: int) -> Table:
        """The rows of a part; a remote one is copied to the cache folder."""
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
                f"{folder} is damaged or absent ({one_line(error)}); prepare it anew"
            ) from error
        if len(rows) != last - first:
            raise InputError(
                f"{folder} holds {len(rows)} records instead of {last - first}; prepare it anew"
            )
        return rows

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """As the raw data had them."""
        file = _qrels_file(self.folder, split)
        return json.loads(file.read_text()) if file.exists() else None


def check_prepared(
    sources: Sequence[PreparedSource], tokenizer: Tokenizer, max_length: int
) -> None:
    """Raises InputError where tasks were prepared with different tokenizers, or another config."""
    by_digest = {source.info["tokenizer"]["sha256"]: source for source in sources}
    if len(by_digest) > 1:
        names = [
            f"{source.task.name!r} with {source.info['tokenizer']['name']!r} ({digest[:8]})"
            for digest, source in by_digest.items()
        ]
        raise InputError(
            "the tasks of a mixture share one tokenizer; prepared were "
            f"{' and '.join(names)}: prepare one of them anew"
        )
    for source in sources:
        contract = _contract(source.options, tokenizer, max_length)
        if unequal := _differences(source.info, contract):
            raise InputError(
                f"{source.folder} was prepared for another config: {'; '.join(unequal)}; prepare "
                "it anew in another folder, or undo"
            )
