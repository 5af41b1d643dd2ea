"""Sources over files of texts, judgments and first-stage runs: a record is a query.

Training draws lists: one of a query's positives and `list_size - 1` negatives from a range of ranks
of the run, anew each epoch; its other positives are never among them. Evaluation scores every
candidate of the run.
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
    """What one split is made of.

    Attributes:
        queries: their texts.
        documents: the collection.
        candidates: the first stage's run.
        judgements: relevance grades; None where they are not published.
    """

    queries: Corpus
    documents: Corpus
    candidates: Candidates
    qrels: Qrels | None


class RankingSource(Source):
    """A ranking task over files; a benchmark says where they lie.

    Args:
        task: what is learnt.
        options: what the config says about sources.
    """

    first_stage = True

    def __init__(self, task: Task, options: DataOptions):
        super().__init__(task, options)
        low, high = options.negative_ranks
        if not 1 <= low <= high:
            raise InputError(
                "ranking.negative_ranks must be (first, last) with 1 <= first <= last, got "
                f"{options.negative_ranks}"
            )
        if options.list_size < 2:
            raise InputError(f"ranking.list_size must be at least 2, got {options.list_size}")
        self.opened = functools.cache(self._open)  # the files of a split
        self.queries = functools.cache(self._choose_queries)  # the usable queries of a split

    @abc.abstractmethod
    def _open(self, split: str) -> RankingFiles:
        """The files of a split, checked."""

    def _choose_queries(self, split: str) -> np.ndarray:
        """[n] int32, the queries that have candidates; of train, a positive and a negative."""
        files, needed = self.opened(split), "candidates"
        counts = files.candidates.counts()
        is_usable = counts > 0
        if split == "train":
            if files.qrels is None:
                raise InputError(f"task {self.task.name!r}: its {split} split has no judgements")
            low, high = self.options.negative_ranks
            in_range = np.clip(counts, low - 1, high) - (low - 1)
            positives, needed = files.qrels.positives, "a positive and a negative"
            is_usable = (positives > 0) & (in_range > positives)
            # Few: so many positives that they may fill the range.
            for query in np.flatnonzero((positives > 0) & (in_range > 0) & ~is_usable):
                is_usable[query] = len(self._negatives(split, query)) > 0
            if not is_usable.all():
                logging.warning(
                    "%s: %d of %d train queries have no positive or no negative and are skipped",
                    self.task.name,
                    (~is_usable).sum(),
                    len(is_usable),
                )
        if not is_usable.any():
            raise InputError(
                f"{files.candidates.path}: no query of {files.queries.path.name} has {needed}"
            )
        return np.flatnonzero(is_usable).astype(np.int32)

    def _positives(self, split: str, query: int) -> np.ndarray:
        documents, grades = self.opened(split).qrels.of(query)
        return documents[grades > 0]

    def _negatives(self, split: str, query: int) -> np.ndarray:
        low, high = self.options.negative_ranks
        candidates = self.opened(split).candidates.of(query)[low - 1 : high]
        return candidates[~np.isin(candidates, self._positives(split, query))]

    def files(self, split: str) -> list[pathlib.Path]:
        """Queries, collection, candidates and judgments."""
        files = self.opened(split)
        paths = [files.queries.path, files.documents.path, files.candidates.path]
        return [*paths, *([files.qrels.path] if files.qrels else [])]

    def count(self, split: str) -> int:
        """Usable queries."""
        return len(self.queries(split))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """All judgments, documents that the first stage missed included.

        Where the options limit the queries, those of the used ones alone.
        """
        files = self.opened(split)
        if files.qrels is None:
            return {}
        queries = np.arange(len(files.queries))
        if self.options.limit(split):
            queries = self.queries(split)[: self.size(split)]
        return files.qrels.by_id(queries)

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """A query's candidates in the run's order; or what training lists are drawn from."""
        query, files = int(self.queries(split)[index]), self.opened(split)
        if training:
            documents = [*self._positives(split, query), *self._negatives(split, query)]
        else:
            documents = files.candidates.of(query).tolist()
        labels = [UNLABELED] * len(documents)
        if files.qrels:
            grades = dict(zip(*files.qrels.of(query), strict=True))
            labels = [max(float(grades.get(document, 0)), 0.0) for document in documents]
        name, text = files.queries.ids[query], files.queries.text(query)

        def example(index: int) -> Example:
            document = int(documents[index])
            fields = {"query": text, "document": files.documents.text(document)}
            return Example(fields, labels[index], name, files.documents.ids[document])

        return Record(labels, example)


def named_folder(variable: str, task: Task, content: str) -> pathlib.Path:
    """The folder that an environment variable names; raises InputError where it is not set."""
    if not os.environ.get(variable):
        raise InputError(
            f"task {task.name!r}: {variable} is not set; it names a folder with {content}"
        )
    return pathlib.Path(os.environ[variable]).expanduser()


def find_file(folder: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """The first of those files that a folder holds, plain or compressed.

    Args:
        folder: where to look.
        names: in the order of preference.
        what: says what the folder should be, for the message.
    """
    for name in names:
        for ending in ("", *COMPRESSED):
            path = folder / f"{name}{ending}"
            if path.is_file():
                return path
    raise InputError(f"{folder} holds no {' or '.join(names)} (or {', '.join(COMPRESSED)}); {what}")


def run_path(option: str, split: str, find: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The run that `ranking.run` names; else the one that `find` looks up.

    In the option `{split}` stands for the files' name of the split.
    """
    if not option:
        return find()
    path = pathlib.Path(option.replace("{split}", split)).expanduser()
    if not path.is_file():
        raise InputError(f"ranking.run={option}: {path} is not a file")
    return path
