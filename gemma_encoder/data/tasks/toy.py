"""Three synthetic tasks from a seeded generator; no download needed.

`toy_sentiment` (classification), `toy_similarity` (regression) and `toy_ranking` (ten documents per
query, one relevant) can be learned from random weights in a minute.
"""

import functools
from collections.abc import Callable
from typing import Any

from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tasks import toy_text
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template


def _single(_: int, row: tuple[dict[str, str], float]) -> list[Example]:
    return [Example(*row)]


def _documents(index: int, row: tuple[str, list[tuple[str, float]]]) -> list[Example]:
    query, documents = row
    return [
        Example({"query": query, "document": text}, grade, f"q{index}", f"q{index}d{rank}")
        for rank, (text, grade) in enumerate(documents)
    ]


def _declare(
    task: Task, generate: Callable[[str, int], list[Any]], train_size: int, evaluation_size: int
) -> tuple[str, Callable[[DataOptions], Source]]:
    """Declares a task with `train_size` train records and `evaluation_size` in other splits."""

    @functools.cache  # generated once for all sources of the task
    def records(split: str) -> list[list[Example]]:
        rows = generate(split, train_size if split == "train" else evaluation_size)
        examples = _documents if task.is_list else _single
        return [examples(index, row) for index, row in enumerate(rows)]

    return task.name, lambda options: MemorySource(task, options, records)


_SENTIMENT = Task(
    "toy_sentiment",
    "classification",
    Template("{sentence}"),
    ("accuracy",),
    toy_text.SENTIMENT_CLASSES,
)
_SIMILARITY = Task(
    "toy_similarity",
    "regression",
    Template("first {sentence1} second {sentence2}"),
    label_range=(0.0, 5.0),
)
_RANKING = Task(
    "toy_ranking",
    "ranking",
    Template("query {query} document {document}", truncation=("document",)),
    ("mrr@10", "ndcg@10"),
)

TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        _declare(_SENTIMENT, toy_text.sentiment, 16_000, 500),
        _declare(_SIMILARITY, toy_text.similarity, 10_000, 500),
        _declare(_RANKING, toy_text.ranking, 1_600, 100),  # records of ten texts each
    ]
)
