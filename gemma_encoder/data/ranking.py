"""Sources over files of texts, judgments and first-stage runs: a record is a query.

Training draws lists: one of a query's positives and `list_size - 1` negatives from a range of ranks
of the run, anew each epoch; its other positives are never among them. Evaluation scores every
candidate of the run.
"""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data.files.lines import COMPRESSED
from gemma_encoder.data.files.passages import Texts
from gemma_encoder.data.files.runs import Candidates, Judgements
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.kind import UNLABELLED
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

TEMPLATE = Template("Query: {query} Document: {document}", cut=("document",))


@dataclasses.dataclass(frozen=True)
class RankingFiles:
    """What one split is made of.

    Attributes:
        queries: their texts.
        documents: the collection.
        candidates: the first stage's run.
        judgements: relevance grades; None where they are not published.
    """

    queries: Texts
    documents: Texts
    candidates: Candidates
    judgements: Judgements | None


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
                f"ranking.negative_ranks must be (first, last) with 1 <= first <= last, got {options.negative_ranks}"
            )
        if options.list_size < 2:
            raise InputError(f"ranking.list_size must be at least 2, got {options.list_size}")
        self.opened = functools.cache(self._open)  # the files of a split
        self.queries = functools.cache(self._choose_queries)  # the usable queries of a split

    @abc.abstractmethod
    def _open(self, split: str) -> RankingFiles:
        """The files of a split, checked."""

    def _choose_queries(self, split: str) -> np.ndarray:
        """The queries that records number: for training those that have a positive and a negative, else all that have candidates."""
        files = self.opened(split)
        counts = files.candidates.counts()
        kept = counts > 0
        if split == "train":
            if files.judgements is None:
                raise InputError(f"task {self.task.name!r}: its {split} split has no judgements")
            low, high = self.options.negative_ranks
            in_range = np.clip(counts, low - 1, high) - (low - 1)
            positives = files.judgements.positives
            kept = (positives > 0) & (in_range > positives)
            for query in np.flatnonzero(
                (positives > 0) & (in_range > 0) & ~kept
            ):  # few: so many positives that they may fill the range
                kept[query] = len(self._negatives(split, query)) > 0
            if not kept.all():
                logging.warning(
                    "%s: %d of %d train queries have no positive or no negative and are skipped",
                    self.task.name,
                    (~kept).sum(),
                    len(kept),
                )
        if not kept.any():
            wanted = "a positive and a negative" if split == "train" else "candidates"
            raise InputError(
                f"{files.candidates.path}: no query of {files.queries.path.name} has {wanted}"
            )
        return np.flatnonzero(kept).astype(np.int32)

    def _positives(self, split: str, query: int) -> np.ndarray:
        documents, grades = self.opened(split).judgements.of(query)
        return documents[grades > 0]

    def _negatives(self, split: str, query: int) -> np.ndarray:
        low, high = self.options.negative_ranks
        candidates = self.opened(split).candidates.of(query)[low - 1 : high]
        return candidates[~np.isin(candidates, self._positives(split, query))]

    def files(self, split: str) -> list[pathlib.Path]:
        """Queries, collection, candidates and judgments."""
        files = self.opened(split)
        paths = [files.queries.path, files.documents.path, files.candidates.path]
        return [*paths, *([files.judgements.path] if files.judgements else [])]

    def size(self, split: str) -> int:
        """As many queries as the options allow."""
        return self.options.limited(split, len(self.queries(split)))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """All judgments, documents that the first stage missed included.

        Where the options limit the queries, those of the used ones alone.
        """
        files = self.opened(split)
        if files.judgements is None:
            return {}
        if self.options.limit(split):
            return files.judgements.by_id(self.queries(split)[: self.size(split)])
        return files.judgements.by_id(np.arange(len(files.queries)))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """A query's candidates in the run's order; or what training lists are drawn from."""
        query, files = int(self.queries(split)[index]), self.opened(split)
        judged = files.judgements.of(query) if files.judgements else ((), ())
        grades = {int(document): float(grade) for document, grade in zip(*judged, strict=True)}
        if training:
            documents = np.concatenate(
                [self._positives(split, query), self._negatives(split, query)]
            )
        else:
            documents = files.candidates.of(query)
        unjudged = 0.0 if files.judgements else UNLABELLED
        labels = [
            max(grades[document], 0.0) if document in grades else unjudged
            for document in documents.tolist()
        ]
        name, text = files.queries.ids[query], files.queries.text(query)

        def example(place: int) -> Example:
            document = int(documents[place])
            fields = {"query": text, "document": files.documents.text(document)}
            return Example(fields, labels[place], name, files.documents.ids[document])

        return Record(labels, example)


def find_file(folder: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """The first of those files that a folder holds, plain or compressed.

    Args:
        folder: where to look.
        names: in the order of preference.
        what: says what the folder should be, for the message.
    """
    for name in names:
        for path in (folder / name, *(folder / f"{name}{ending}" for ending in COMPRESSED)):
            if path.is_file():
                return path
    raise InputError(f"{folder} holds no {' or '.join(names)} (or {', '.join(COMPRESSED)}); {what}")


def run_path(option: str, split: str, found: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The run that `ranking.run` names, `{split}` standing for the files' name of the split; else the one that `found` looks up."""
    if not option:
        return found()
    path = pathlib.Path(option.replace("{split}", split)).expanduser()
    if not path.is_file():
        raise InputError(f"ranking.run={option}: {path} is not a file")
    return path
