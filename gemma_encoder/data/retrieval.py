"""Retrieval tasks on the files of ranking tasks: queries, a collection, qrels, and maybe a run.

A training record is a query. In each epoch its list is drawn anew: the query, some of its
positives, and hard negatives from a range of ranks of a run, which excludes all positives. All
other documents of the batch are negatives as well, see `training.retrieval_losses`.

In evaluation a record is a query or a document, and every query searches all documents: those of
the collection, or a stated part of it.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.ranking import RankingFiles, RankingSource
from gemma_encoder.data.retrieval_options import REPRESENTATIONS, check_template
from gemma_encoder.data.searched_documents import searched_documents
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

SUFFIX = "_retrieval"  # of the name of a ranking task, for retrieval on the same files
METRICS = ("ndcg@10", "mrr@10", "recall@100")


def retrieval_task(
    name: str,
    options: DataOptions,
    metrics: tuple[str, ...] = METRICS,
    document: Template | None = None,
) -> Task:
    """Returns the declaration of a retrieval task, with the templates of the options.

    All dense tasks share one head, and so do all sparse tasks.

    Args:
        name: name of the task.
        options: the data options of the config.
        metrics: the task's metrics.
        document: template of documents, if they have other fields than "document".

    Raises:
        InputError: the template of the options has other fields.
    """
    retrieval = options.retrieval
    if document is None:
        check_template("document", retrieval.document_template)
        document = Template(retrieval.document_template)
    kind = REPRESENTATIONS[retrieval.representation]
    templates = (("query", Template(retrieval.query_template)), ("document", document))
    return Task(name, kind, document, metrics, head=kind, role_templates=templates)


class Searched(NamedTuple):
    """Records of an evaluation: the queries, then the documents.

    Attributes:
        queries, documents: [n] int32, indices into the collections.
    """

    queries: np.ndarray
    documents: np.ndarray


class RetrievalSource(Source):
    """A retrieval task on the files of a ranking task.

    Args:
        name: name of the task.
        options: the data options of the config.
        ranking: the ranking task whose files are read.
    """

    def __init__(self, name: str, options: DataOptions, ranking: RankingSource):
        super().__init__(retrieval_task(name, options), options)
        self._ranking = ranking
        self.splits = ranking.splits
        self.searched = functools.cache(self._searched)  # split -> its records
        self.trainable = functools.cache(self._trainable)

    def check(self) -> None:
        """Raises InputError if files are missing."""
        self._ranking.check()

    def located(self, split: str) -> RankingFiles:
        """Returns the files of a split; the run is opened when it is first read."""
        return self._ranking.located(split)

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the files of queries, collection and qrels; in training, of the run."""
        files = self.located(split)
        paths = [files.queries.path, files.documents.path]
        paths += [files.qrels.path] if files.qrels else []
        if split == "train" and self.options.retrieval.negatives:
            paths.append(files.candidates.path)
        return paths

    def _trainable(self) -> np.ndarray:
        """Returns [n] int32, the training queries with a positive."""
        files = self.located("train")
        if self.options.retrieval.negatives and self.options.retrieval.max_negative_share:
            files.candidates.scores_of(0)  # refuses a run without scores
        has_positive = files.positives() > 0
        if not has_positive.any():
            raise InputError(
                f"task {self.task.name!r}: no query of {files.queries.path.name} has a positive"
            )
        skipped = (~has_positive).sum()
        if skipped:
            logging.warning(
                "%s: %d of %d train queries have no positive and are skipped",
                self.task.name,
                skipped,
                len(has_positive),
            )
        return np.flatnonzero(has_positive).astype(np.int32)

    def _searched(self, split: str) -> Searched:
        """Returns the judged queries, and the documents that they search; logs their numbers."""
        files = self.located(split)
        judged = np.arange(len(files.queries))
        if files.qrels is not None:
            judged = np.flatnonzero(files.qrels.judged > 0)
        queries = judged[: self.options.limit(split) or None].astype(np.int32)
        relevant = [files.qrels.positives_of(query) for query in queries] if files.qrels else []
        relevant = np.concatenate([np.zeros(0, np.int32), *relevant])
        documents = searched_documents(self, split, len(queries), relevant, len(files.documents))
        return Searched(queries, documents)

    def count(self, split: str) -> int:
        """Returns the number of training queries, or of queries and documents to evaluate."""
        if split == "train":
            return len(self.trainable())
        return sum(map(len, self.searched(split)))

    def size(self, split: str) -> int:
        """Returns the number of records that are used; limits of evaluation limit the queries."""
        return super().size(split) if split == "train" else self.count(split)

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """Returns the judgments of the evaluated queries."""
        files = self.located(split)
        if files.qrels is None:
            return {}
        queries = self.trainable() if split == "train" else self.searched(split).queries
        return files.qrels.by_id(queries)

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns a query or a document; for training a query, its positives and its negatives."""
        files = self.located(split)
        if training:
            return self._list(int(self.trainable()[index]))
        queries, documents = self.searched(split)
        if index < len(queries):
            return Record.of([_query(files.queries, int(queries[index]))])
        return Record.of([_document(files.documents, int(documents[index - len(queries)]), 0.0)])

    def _list(self, query: int) -> Record:
        """Returns a query, all of its positives, and its hard negatives."""
        files = self.located("train")
        positives, grades = files.qrels.of(query)
        is_usable = (grades > 0) & (positives < len(files.documents))
        positives, grades = positives[is_usable], grades[is_usable].tolist()
        negatives = np.zeros(0, np.int32)
        if self.options.retrieval.negatives:
            negatives = self._hard_negatives(query, positives)
        documents = [*positives, *negatives]
        labels = [0.0, *grades, *[0.0] * len(negatives)]

        def example(index: int) -> Example:
            if not index:
                return _query(files.queries, query)
            return _document(files.documents, int(documents[index - 1]), labels[index])

        return Record(labels, example)

    def _hard_negatives(self, query: int, positives: np.ndarray) -> np.ndarray:
        """Returns the documents in the range of ranks, without positives and those too similar.

        The limit by `max_negative_share` needs the score of a positive: without any in the run,
        all documents are used.
        """
        candidates = self.located("train").candidates
        documents = candidates.of(query)
        is_positive = np.isin(documents, positives)
        is_used = ~is_positive
        share = self.options.retrieval.max_negative_share
        if share and is_positive.any():
            scores = candidates.scores_of(query)
            best = float(scores[is_positive].max())
            is_used &= scores <= min(share * best, best)  # of negative scores, a share is more
        low, high = self.options.negative_ranks
        return documents[low - 1 : high][is_used[low - 1 : high]]


def _query(queries: Corpus, index: int) -> Example:
    fields = {"query": queries.text(index)}
    return Example(fields, 0.0, queries.ids[index], role="query", key=index)


def _document(documents: Corpus, index: int, label: float) -> Example:
    fields = {"document": documents.text(index)}
    document_id = documents.ids[index]
    return Example(fields, label, document_id=document_id, role="document", key=index)


def on_files_of(
    ranking: Mapping[str, Callable[[DataOptions], RankingSource]],
) -> dict[str, Callable[[DataOptions], Source]]:
    """Returns a retrieval task for each of these ranking tasks, on the same files."""

    def declare(name: str, make: Callable[[DataOptions], RankingSource]):
        return lambda options: RetrievalSource(f"{name}{SUFFIX}", options, make(options))

    return {f"{name}{SUFFIX}": declare(name, make) for name, make in ranking.items()}
