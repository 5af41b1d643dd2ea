"""Ranking sources that read texts, qrels and first-stage runs from files: a record is a query.

In each epoch, training draws a list per query: one of its positives, and `list_size - 1` negatives
from a range of ranks of the run, which excludes all positives. Evaluation scores every candidate of
the run.
"""

import abc
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.files.lines import COMPRESSED
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELED
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

TEMPLATE = Template("Query: {query} Document: {document}", truncation=("document",))


@dataclasses.dataclass(frozen=True)
class RankingFiles:
    """Files of one split.

    Attributes:
        queries: texts of the queries.
        documents: the collection.
        qrels: relevance grades; None if they are not published.
        open_candidates: opens the first-stage run, which retrieval may do without.
    """

    queries: Corpus
    documents: Corpus
    qrels: Qrels | None
    open_candidates: Callable[[], Candidates]

    def positives(self) -> np.ndarray:
        """Returns [Q], the number of relevant documents of each query in the collection.

        Raises:
            InputError: there are no qrels.
        """
        if self.qrels is None:
            raise InputError(f"{self.queries.path}: there are no qrels for these queries")
        return self.qrels.positives

    @functools.cached_property
    def candidates(self) -> Candidates:
        """The first-stage run."""
        return self.open_candidates()


class RankingSource(Source):
    """A ranking task read from files; subclasses locate the files of a benchmark.

    Args:
        task: the task to learn.
        options: the data options of the config.

    Raises:
        InputError: `negative_ranks` or `list_size` is invalid.
    """

    first_stage = True

    def __init__(self, task: Task, options: DataOptions):
        super().__init__(task, options)
        self.located = functools.cache(self._open)  # split -> its files, the run not opened yet
        self.opened = functools.cache(self._open_and_report)  # split -> its files, checked
        self.queries = functools.cache(self._usable_queries)  # split -> its usable queries

    @abc.abstractmethod
    def _open(self, split: str) -> RankingFiles:
        """Opens and checks the files of a split."""

    def _open_and_report(self, split: str) -> RankingFiles:
        """Opens a split; unless it is for training, logs queries that no ranking can answer."""
        files = self.located(split)
        _ = files.candidates
        if split != "train" and files.qrels is not None:
            counts = files.candidates.counts()
            used = np.flatnonzero((files.qrels.judged > 0) | (counts > 0))
            report_hopeless_queries(
                f"{self.task.name}: {split} split",
                files.qrels.judged[used],
                files.qrels.relevant[used],
                np.array([_has_retrieved(files, query) for query in used], bool),
            )
        return files

    def _usable_queries(self, split: str) -> np.ndarray:
        """Returns [n] int32, queries with candidates (train: with a positive and a negative)."""
        files = self.opened(split)
        if split == "train":
            needed = "a positive and a negative"
            is_usable = self._is_trainable(split)
        else:
            needed = "candidates"
            is_usable = files.candidates.counts() > 0
        if not is_usable.any():
            raise InputError(
                f"{files.candidates.path}: no query of {files.queries.path.name} has {needed}"
            )
        return np.flatnonzero(is_usable).astype(np.int32)

    def _is_trainable(self, split: str) -> np.ndarray:
        """Returns [Q] bool: True for queries with a positive and a negative."""
        files = self.opened(split)
        if files.qrels is None:
            raise InputError(f"task {self.task.name!r}: its {split} split has no qrels")
        low, high = self.options.negative_ranks
        in_range = np.clip(files.candidates.counts(), low - 1, high) - (low - 1)
        positives = files.qrels.positives
        is_trainable = (positives > 0) & (in_range > positives)
        # Only the few queries whose positives may fill the range need a look at their candidates.
        for query in np.flatnonzero((positives > 0) & (in_range > 0) & ~is_trainable):
            is_trainable[query] = len(self._negatives(split, query)) > 0
        if not is_trainable.all():
            logging.warning(
                "%s: %d of %d train queries have no positive or no negative and are skipped",
                self.task.name,
                (~is_trainable).sum(),
                len(is_trainable),
            )
        return is_trainable

    def _positives(self, split: str, query: int) -> np.ndarray:
        return self.opened(split).qrels.positives_of(query)

    def _negatives(self, split: str, query: int) -> np.ndarray:
        low, high = self.options.negative_ranks
        candidates = self.opened(split).candidates.of(query)[low - 1 : high]
        return candidates[~np.isin(candidates, self._positives(split, query))]

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the files of queries, collection, candidates and qrels."""
        files = self.opened(split)
        paths = [files.queries.path, files.documents.path, files.candidates.path]
        return [*paths, *([files.qrels.path] if files.qrels else [])]

    def count(self, split: str) -> int:
        """Returns the number of usable queries."""
        return len(self.queries(split))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """Returns all judgments, including documents that the first stage missed.

        If the options limit the number of queries, only judgments of the used ones.
        """
        files = self.opened(split)
        if files.qrels is None:
            return {}
        queries = np.arange(len(files.queries))
        if self.options.limit(split):
            queries = self.queries(split)[: self.size(split)]
        return files.qrels.by_id(queries)

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns a query's candidates in run order, or the candidates for training lists."""
        files = self.opened(split)
        query = int(self.queries(split)[index])
        if training:
            documents = [*self._positives(split, query), *self._negatives(split, query)]
        else:
            documents = files.candidates.of(query).tolist()
        labels = [UNLABELED] * len(documents)
        if files.qrels:
            grades = dict(zip(*files.qrels.of(query), strict=True))
            labels = [max(float(grades.get(document, 0)), 0.0) for document in documents]
        query_id = files.queries.ids[query]
        text = files.queries.text(query)

        def example(index: int) -> Example:
            document = int(documents[index])
            fields = {"query": text, "document": files.documents.text(document)}
            return Example(fields, labels[index], query_id, files.documents.ids[document])

        return Record(labels, example)


def _has_retrieved(files: RankingFiles, query: int) -> bool:
    """Returns True if a relevant document is among the candidates of a query."""
    if not files.qrels.positives[query]:
        return False
    return bool(np.isin(files.candidates.of(query), files.qrels.positives_of(query)).any())


def report_hopeless_queries(
    name: str, judged: np.ndarray, relevant: np.ndarray, has_retrieved: np.ndarray
) -> None:
    """Logs how many queries lack judgments, relevant documents, or relevant candidates.

    Args:
        name: name of the split, for the message.
        judged, relevant: [Q], number of judged and of relevant documents of each query.
        has_retrieved: [Q], True if a relevant document is among the query's candidates.
    """
    is_judged = judged > 0
    is_relevant = relevant > 0
    facts = (
        (~is_judged, "have no judgment and enter no metric"),
        (is_judged & ~is_relevant, "have no relevant document and count as 0"),
        (is_relevant & ~has_retrieved, "have no relevant document among the candidates"),
    )
    parts = [f"{mask.sum()} {text}" for mask, text in facts if mask.any()]
    if parts:
        logging.warning("%s: of %d queries, %s", name, len(judged), "; ".join(parts))


def named_folder(variable: str, task: Task, content: str) -> pathlib.Path:
    """Returns the folder that an environment variable names.

    Args:
        variable: the environment variable.
        task, content: the task that needs it, and the expected files, for the message.

    Raises:
        InputError: the variable is not set.
    """
    if not os.environ.get(variable):
        raise InputError(
            f"task {task.name!r}: {variable} is not set; set it to a folder with {content}"
        )
    return pathlib.Path(os.environ[variable]).expanduser()


def find_file(folder: pathlib.Path, names: Sequence[str], hint: str) -> pathlib.Path:
    """Returns the first existing file of a folder, plain or compressed.

    Args:
        folder: the folder to search.
        names: file names in order of preference.
        hint: expected content of the folder, for the message.

    Raises:
        InputError: the folder has none of the files.
    """
    for name in names:
        for suffix in ("", *COMPRESSED):
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    suffixes = ", ".join(COMPRESSED)
    raise InputError(f"{folder} has no {' or '.join(names)} (or {suffixes}); {hint}")


def run_path(option: str, split: str, find: Callable[[], pathlib.Path]) -> pathlib.Path:
    """Returns the run that `ranking.run` names, or the result of `find` if it is empty.

    Args:
        option: the value of `ranking.run`, in which `{split}` is replaced.
        split: the split's name in file names.
        find: locates the default run.

    Raises:
        InputError: the option names no file.
    """
    if not option:
        return find()
    path = pathlib.Path(option.replace("{split}", split)).expanduser()
    if not path.is_file():
        raise InputError(f"ranking.run={option}: {path} is not a file")
    return path
