"""`toy_retrieval`: the queries and documents of `toy_ranking`, as a retrieval task."""

from collections.abc import Callable

from gemma_encoder.data.list_retrieval import ListRetrievalSource
from gemma_encoder.data.retrieval import retrieval_task
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tasks import toy


def _make(options: DataOptions) -> Source:
    task = retrieval_task("toy_retrieval", options)
    return ListRetrievalSource(task, options, toy.TASKS["toy_ranking"](options))


TASKS: dict[str, Callable[[DataOptions], Source]] = {"toy_retrieval": _make}
