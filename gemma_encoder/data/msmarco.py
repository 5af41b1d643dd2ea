"""Passage ranking from files in MS MARCO's layout, in the folder that `MSMARCO_DIR` names.

    collection.tsv           pid, passage
    queries.{train,dev}.tsv  qid, query
    qrels.{train,dev}.tsv    qid, 0, pid, relevance
    run.{train,dev}.tsv      qid, pid, rank                (the first stage's candidates), or, for dev,
    top1000.dev.tsv          qid, pid, query, passage      (or top100.dev.tsv)

Training draws lists: one positive and `list_size − 1` negatives from the run, anew each epoch. Evaluation scores every
candidate of the dev run. Passages stay on disk and are read by offset.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data.source import DataOptions, NumberedSource, Source, sample_list
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

TASK = Task("msmarco", "ranking", Template("Query: {query} Document: {document}", cut=("document",)), metrics=("mrr@10", "ndcg@10"))
FILE_SPLIT = {"train": "train", "validation": "dev"}  # our names of splits, and the files'


def read_tsv(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[tuple[int, int, list[str]]]:
    """(line number, byte offset, fields) of each line; raises InputError naming file, line and what was expected."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                fields = line.decode("utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line)") from error
            if len(fields) != len(columns) or not all(field.strip() for field in fields):
                raise InputError(
                    f"{path}:{number}: expected {len(columns)} tab-separated columns, none empty ({', '.join(columns)}); got {len(fields)}: {line[:80]!r}"
                )
            yield number, offset, fields
            offset += len(line)


def _integer(text: str, path: pathlib.Path, number: int, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}:{number}: {what} must be a whole number, got {text!r}") from None


class Passages:
    """The collection, read by offset: only ids and offsets are kept in memory."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._offsets: dict[str, int] = {}
        for number, offset, (pid, _) in read_tsv(path, ("pid", "passage")):
            if pid in self._offsets:
                raise InputError(f"{path}:{number}: pid {pid!r} appears a second time")
            self._offsets[pid] = offset
        self._file = path.open("rb")

    def __contains__(self, pid: str) -> bool:
        return pid in self._offsets

    def __getitem__(self, pid: str) -> str:
        # pread, not seek and read: several readers share the file.
        line = b""
        offset = self._offsets[pid]
        while not line.endswith(b"\n"):
            chunk = os.pread(self._file.fileno(), 4096, offset + len(line))
            if not chunk:
                break
            line += chunk
            if b"\n" in chunk:
                line = line[: line.index(b"\n") + 1]
        return line.decode("utf-8").rstrip("\r\n").split("\t")[1]


class RankingFiles:
    """Queries, judgements and first-stage candidates of one split; every id checked against the collection."""

    def __init__(self, folder: pathlib.Path, split: str, passages: Passages):
        self.folder, name = folder, FILE_SPLIT[split]
        self.queries = {qid: query for _, _, (qid, query) in read_tsv(_existing(folder, f"queries.{name}.tsv"), ("qid", "query"))}
        self.grades: dict[str, dict[str, int]] = {}
        qrels = _existing(folder, f"qrels.{name}.tsv")
        for number, _, (qid, _, pid, grade) in read_tsv(qrels, ("qid", "0", "pid", "relevance")):
            self.grades.setdefault(qid, {})[pid] = _integer(grade, qrels, number, "relevance")
        self.candidates = self._read_candidates(name, passages)
        missing = next((pid for judged in self.grades.values() for pid in judged if pid not in passages), None)
        if missing is not None:
            raise InputError(f"{qrels}: pid {missing!r} is not in {passages.path.name}")

    def _read_candidates(self, name: str, passages: Passages) -> dict[str, list[str]]:
        run = self.folder / f"run.{name}.tsv"
        if run.exists():
            path, columns = run, ("qid", "pid", "rank")
        else:
            path = _existing(self.folder, f"top1000.{name}.tsv", f"top100.{name}.tsv", f"run.{name}.tsv")
            columns = ("qid", "pid", "query", "passage")
        ranked: dict[str, list[tuple[int, str]]] = {}
        for number, _, fields in read_tsv(path, columns):
            qid, pid = fields[:2]
            if pid not in passages:
                raise InputError(f"{path}:{number}: pid {pid!r} is not in {passages.path.name}")
            if qid not in self.queries:
                raise InputError(f"{path}:{number}: qid {qid!r} is not in queries.{name}.tsv")
            listed = ranked.setdefault(qid, [])
            rank = _integer(fields[2], path, number, "rank") if columns[2] == "rank" else len(listed) + 1
            listed.append((rank, pid))
        return {qid: [pid for _, pid in sorted(listed, key=lambda pair: pair[0])] for qid, listed in ranked.items()}


def _existing(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder} holds no {' or '.join(names)}; MSMARCO_DIR must name a folder with MS MARCO passage-ranking files "
        "(collection.tsv, queries.*.tsv, qrels.*.tsv, run.*.tsv)"
    )


class MsMarcoSource(NumberedSource):
    """Lists for training, candidates for evaluation; a record is the number of a query."""

    splits = ("train", "validation")

    def __init__(self, options: DataOptions, task: Task = TASK):
        super().__init__(task, options)
        self._files: dict[str, RankingFiles] = {}
        self._query_ids: dict[str, tuple[str, ...]] = {}
        low, high = options.negative_ranks
        if not 1 <= low <= high:
            raise InputError(f"ranking.negative_ranks must be (first, last) with 1 <= first <= last, got {options.negative_ranks}")
        if options.list_size < 2:
            raise InputError(f"ranking.list_size must be at least 2, got {options.list_size}")

    def check(self) -> None:
        """Raises InputError where MSMARCO_DIR names no folder with a collection."""
        folder = os.environ.get("MSMARCO_DIR")
        if not folder:
            raise InputError(
                f"task {self.task.name!r}: MSMARCO_DIR is not set; it names a folder with collection.tsv, queries.{{train,dev}}.tsv, "
                "qrels.{train,dev}.tsv and run.{train,dev}.tsv, as published at https://microsoft.github.io/msmarco/"
            )
        if not self.folder.is_dir():
            raise InputError(f"MSMARCO_DIR={folder} is not a folder")
        _existing(self.folder, "collection.tsv")

    @property
    def folder(self) -> pathlib.Path:
        """Where the files lie."""
        return pathlib.Path(os.environ["MSMARCO_DIR"]).expanduser()

    @functools.cached_property
    def passages(self) -> Passages:
        """The collection."""
        return Passages(_existing(self.folder, "collection.tsv"))

    def files(self, split: str) -> RankingFiles:
        """Queries, judgements and candidates of a split; read once."""
        if split not in self._files:
            self._files[split] = RankingFiles(self.folder, split, self.passages)
        return self._files[split]

    def query_ids(self, split: str) -> tuple[str, ...]:
        """The queries that records number: for training those that have a positive and a negative, else all with candidates."""
        if split not in self._query_ids:
            self._query_ids[split] = self._choose_queries(split)
        return self._query_ids[split]

    def _choose_queries(self, split: str) -> tuple[str, ...]:
        files = self.files(split)
        if split != "train":
            kept = [qid for qid in files.queries if qid in files.candidates]
        else:
            kept = [qid for qid in files.queries if self._positives(split, qid) and self._negatives(split, qid)]
            if len(kept) < len(files.queries):
                logging.warning(
                    "%s: %d of %d train queries have no positive or no negative and are skipped",
                    self.task.name,
                    len(files.queries) - len(kept),
                    len(files.queries),
                )
        if not kept:
            raise InputError(f"{self.folder}: no {FILE_SPLIT[split]} query has {'a positive and a negative' if split == 'train' else 'candidates'}")
        limit = self.options.limit(split)
        return tuple(kept[:limit] if limit else kept)

    def _positives(self, split: str, qid: str) -> list[str]:
        return [pid for pid, grade in self.files(split).grades.get(qid, {}).items() if grade > 0]

    def _negatives(self, split: str, qid: str) -> list[str]:
        low, high = self.options.negative_ranks
        files = self.files(split)
        return [pid for pid in files.candidates.get(qid, [])[low - 1 : high] if files.grades.get(qid, {}).get(pid, 0) <= 0]

    def count(self, split: str) -> int:
        """How many queries a split has."""
        return len(self.query_ids(split))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """All judgements, documents that the first stage missed included; of the chosen queries when only some are used."""
        grades = self.files(split).grades
        return {qid: grades[qid] for qid in self.query_ids(split) if qid in grades} if self.options.limit(split) else grades

    def expand(self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None) -> list[Example]:
        """Training: a positive and sampled negatives, the positive first. Evaluation: every candidate in the run's order."""
        qid = self.query_ids(split)[int(record["number"])]
        files = self.files(split)
        grades = files.grades.get(qid, {})
        if rng is None:
            chosen = files.candidates[qid]
        else:
            chosen = sample_list(self._positives(split, qid), self._negatives(split, qid), self.options.list_size, rng)
        return [
            Example({"query": files.queries[qid], "document": self.passages[pid]}, float(max(grades.get(pid, 0), 0)), query_id=qid, document_id=pid)
            for pid in chosen
        ]


TASKS: dict[str, Callable[[DataOptions], Source]] = {"msmarco": MsMarcoSource}
