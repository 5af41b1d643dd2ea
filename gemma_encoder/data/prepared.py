"""Prepared tasks: records whose texts were tokenized ahead of training.

A prepared task is a folder:

    info.json                     task, tokenizer, length, fingerprints of the raw data, sizes
    train/00003/rows.arrow        the records of the fourth part of a split, with their tokens
    validation.qrels.json         the qrels of a ranking task
    digests.json                  of the other files beside it, here and in each part

A record stores every text that may be drawn from it. Shuffling, the drawing of training lists and
the mixing of tasks are the same as for raw data, so a folder is valid for any seed, number of
readers, number of epochs and list size, and training batches are bitwise identical.
"""

import bisect
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from gemma_encoder import digests
from gemma_encoder.data import cache, table
from gemma_encoder.data.prepared_rows import column_types, encoded_records, from_row, to_row
from gemma_encoder.data.segments import count_texts
from gemma_encoder.data.seqio_source import task_name
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError, described, in_one_line
from gemma_encoder.inputs.json_text import from_json, read_object, to_json
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.whole_files import is_remote, whole_file, write_whole

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
LATER = ("positive", "negative", "score")  # options of own files that earlier folders lack


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
    return _as_json(facts) | _contract(source, tokenizer, max_length)


def _contract(source: Source, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns the facts that must be equal when a folder is prepared and when it is read."""
    fields = dataclasses.asdict(source.options)
    retrieval = fields.pop("retrieval")
    if source.task.kind.embeds:  # a record has all positives and, if any are used, all negatives
        retrieval |= {"positives": None, "negatives": retrieval["negatives"] > 0}
        fields["retrieval"] = retrieval
    fields["own"] = {
        name: value for name, value in fields["own"].items() if value or name not in LATER
    }
    digest = hashlib.sha256(tokenizer.model).hexdigest()
    return _as_json(
        {
            "tokenizer": {"name": tokenizer.name, "sha256": digest},
            "max_length": max_length,
            "options": {name: value for name, value in fields.items() if name not in FREE},
        }
    )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return from_json(to_json(values, default=list))


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
    path = epath.Path(folder) / part.path / table.FILE
    counts = dict.fromkeys(("records", "texts", "tokens", "cut_texts", "cut_tokens"), 0)
    if path.exists() and (is_remote(path) or (path.parent / digests.NAME).exists()):
        return counts
    path.parent.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[list[Any]]:
        records = range(part.first, part.last)
        for examples in encoded_records(source, part.split, records, tokenizer, max_length):
            counts["records"] += 1
            counts["tokens"] += sum(len(example.encoded.tokens) for example in examples)
            count_texts(counts, [example.encoded for example in examples])
            yield to_row(examples, with_fields=part.split != "train")

    qrels = source.qrels(part.split) if part.split != "train" else None
    with in_one_line(f"{path} cannot be written", "rerun the command to resume", OSError):
        if qrels is not None:
            write_whole(_qrels_file(folder, part.split), to_json(qrels))
        with whole_file(path) as temporary:
            types = column_types()
            table.write_table_rows(temporary.parent, types, rows(), 1000, temporary.name)
        digests.add(path.parent, [table.FILE])  # last: a part without digests is written again
    return counts


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
        if path.name == INFO:
            _check_digests(folder, folder)
        if differences := _differences(_read_info(path), description):
            raise InputError(
                f"{folder} was prepared differently ({'; '.join(differences)}); choose another "
                "folder or delete it"
            )
        if path.name == INFO:
            return False
    with in_one_line(f"{folder} cannot be written", errors=OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / BEGUN, to_json(description, indent=1))
    return True


def finish(folder: epath.PathLike) -> None:
    """Marks a folder as complete."""
    folder = epath.Path(folder)
    digests.add(folder, sorted(path.name for path in folder.glob("*.qrels.json")))
    digests.update(folder, {INFO: (folder / BEGUN).read_bytes()})
    (folder / BEGUN).unlink()


def _check_digests(part: epath.Path, folder: epath.Path) -> None:
    """Checks the files of a part, or those beside the parts; former versions have no digests.

    Args:
        part: the folder with the files.
        folder: the folder of the task.

    Raises:
        InputError: a file is damaged or missing.
    """
    try:
        digests.check(part)
    except digests.DamagedFileError as error:
        raise InputError(f"{error}; {_advice(folder)}") from error


def _advice(folder: epath.Path) -> str:
    return f"delete {folder} and prepare it again"


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


def _check_lists(info: Mapping[str, Any]) -> None:
    """Raises ValueError unless each split has spans of records and fingerprints of files."""
    for split, spans in info["parts"].items():
        for first, last in spans:
            if type(first) is not int or type(last) is not int or not 0 <= first <= last:
                raise ValueError(f"the split {split} has a part from {first} to {last}")
        for name, value in info["data"][split]:
            if not isinstance(name, str) or not isinstance(value, str):
                raise ValueError(f"the split {split} has the fingerprint {value} of {name}")


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
        _check_digests(self.folder, self.folder)
        self.info = _read_info(self.folder / INFO)
        if self.info.get("version") != VERSION:
            raise InputError(
                f"{self.folder} has version {self.info.get('version')}, this program reads version "
                f"{VERSION}; prepare it again"
            )
        try:
            task = Task.from_dict(self.info["task"])
            self.splits = tuple(self.info["parts"])
            _check_lists(self.info)
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

    @property
    def has_teacher(self) -> bool:
        """True if the labels of the first training record have scores of a teacher."""
        if not self.task.kind.embeds or not self.count("train"):
            return False
        labels = self.record("train", 0, training=True).labels
        return any(isinstance(label, tuple) for label in labels)

    def size(self, split: str) -> int:
        """Returns the number of records; those of a search are limited by their queries."""
        is_search = self.task.kind.embeds and split in self.splits and split != "train"
        return self.count(split) if is_search else super().size(split)

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
        with in_one_line(f"record {row} in {self.folder / split} is damaged", _advice(self.folder)):
            return from_row(rows, row)

    def _open(self, split: str, part: int) -> Table:
        """Opens the table of a part; a remote one is first copied to the cache folder."""
        folder = self.folder / f"{split}/{part:05d}"
        if "://" in str(folder):
            file = folder / table.FILE
            folder = cache.keep(
                [file], "prepared part", lambda to: file.copy(epath.Path(to) / table.FILE)
            )
        _check_digests(folder, self.folder)
        first, last = self.info["parts"][split][part]
        with in_one_line(f"{folder} is damaged or missing", _advice(self.folder)):
            rows = Table(pathlib.Path(folder))
            if not (folder / digests.NAME).exists():  # of a former version, or of the cache
                rows.arrow.validate(full=True)  # else Arrow may end the process
        if len(rows) != last - first:
            raise InputError(
                f"{folder} has {len(rows)} records instead of {last - first}; "
                f"{_advice(self.folder)}"
            )
        return rows

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Returns the qrels of the raw data."""
        file = _qrels_file(self.folder, split)
        return read_object(file, _advice(self.folder)) if file.exists() else None


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
        contract = _contract(source, tokenizer, max_length)
        if differences := _differences(source.info, contract):
            raise InputError(
                f"{source.folder} was prepared for another config: {'; '.join(differences)}; "
                "prepare it again in another folder, or revert the change"
            )
