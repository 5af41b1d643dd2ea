"""Lists for training and candidates for evaluation, from files of texts, judgements and first-stage runs.

Training draws lists: one of a query's positives and `list_size − 1` negatives from a range of ranks of the run, anew each epoch;
its other positives are never among them. Evaluation scores every candidate of the run. A record is the number of a query.
"""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data.memory import NumberedSource
from gemma_encoder.data.passages import Texts
from gemma_encoder.data.runs import Candidates, Judgements
from gemma_encoder.data.source import DataOptions, sample_list
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task


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


class RankingSource(NumberedSource):
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
        self.files = functools.cache(self._open)  # of a split
        self.queries = functools.cache(self._choose_queries)  # of a split

    @abc.abstractmethod
    def _open(self, split: str) -> RankingFiles:
        """The files of a split, checked."""

    def _choose_queries(self, split: str) -> np.ndarray:
        """The queries that records number: for training those that have a positive and a negative, else all that have candidates."""
        files = self.files(split)
        counts = files.candidates.counts()
        kept = counts > 0
        if split == "train":
            if files.judgements is None:
                raise InputError(f"task {self.task.name!r}: its {split} split has no judgements")
            low, high = self.options.negative_ranks
            in_range = np.clip(counts, low - 1, high) - (low - 1)
            positives = files.judgements.positives()
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
        chosen = np.flatnonzero(kept).astype(np.int32)
        return chosen[: self.options.limit(split) or None]

    def _positives(self, split: str, query: int) -> np.ndarray:
        documents, grades = self.files(split).judgements.of(query)
        return documents[grades > 0]

    def _negatives(self, split: str, query: int) -> np.ndarray:
        low, high = self.options.negative_ranks
        candidates = self.files(split).candidates.of(query)[low - 1 : high]
        return candidates[~np.isin(candidates, self._positives(split, query))]

    def count(self, split: str) -> int:
        """How many queries a split has."""
        return len(self.queries(split))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """All judgements, documents that the first stage missed included; of the chosen queries when only some are used."""
        files = self.files(split)
        if files.judgements is None:
            return {}
        return files.judgements.by_id(
            self.queries(split) if self.options.limit(split) else np.arange(len(files.queries))
        )

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """Training: a positive and sampled negatives, the positive first. Evaluation: every candidate in the run's order."""
        query, files = int(self.queries(split)[int(record["number"])]), self.files(split)
        grades = (
            dict(zip(*(values.tolist() for values in files.judgements.of(query)), strict=True))
            if files.judgements
            else {}
        )
        if rng is None:
            chosen = files.candidates.of(query)
        else:
            chosen = sample_list(
                self._positives(split, query),
                self._negatives(split, query),
                self.options.list_size,
                rng,
            )
        unjudged = 0.0 if files.judgements else -1.0
        name, text = files.queries.ids[query], files.queries.text(query)
        return [
            Example(
                {"query": text, "document": files.documents.text(document)},
                float(max(grades[int(document)], 0)) if int(document) in grades else unjudged,
                query_id=name,
                document_id=files.documents.ids[document],
            )
            for document in chosen
        ]


def find_file(folder: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """The first of those files that a folder holds, plain or gz.

    Args:
        folder: where to look.
        names: in the order of preference.
        what: says what the folder should be, for the message.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise InputError(f"{folder} holds no {' or '.join(names)} (or .gz); {what}")


def run_path(option: str, split: str, found: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The run that `ranking.run` names, `{split}` standing for the files' name of the split; else the one that `found` looks up."""
    if not option:
        return found()
    path = pathlib.Path(option.replace("{split}", split)).expanduser()
    if not path.is_file():
        raise InputError(f"ranking.run={option}: {path} is not a file")
    return path
