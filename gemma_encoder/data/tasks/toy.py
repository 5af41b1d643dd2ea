"""Three embedded tasks, one of each kind, written by a seeded generator: no download, learnable from random weights in a minute.

`toy_sentiment` (classification), `toy_similarity` (regression) and `toy_ranking` (ten documents a query, one relevant).
"""

import functools
from collections.abc import Callable

from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tasks import toy_text
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

# Records of a split; a ranking record is ten texts.
SIZES = {
    "toy_sentiment": {"train": 16_000, "validation": 500, "test": 500},
    "toy_similarity": {"train": 10_000, "validation": 500, "test": 500},
    "toy_ranking": {"train": 1_600, "validation": 100, "test": 100},
}


def _sentiment(split: str) -> list[list[Example]]:
    return [
        [Example(fields, label)]
        for fields, label in toy_text.sentiment(split, SIZES["toy_sentiment"][split])
    ]


def _similarity(split: str) -> list[list[Example]]:
    return [
        [Example(fields, label)]
        for fields, label in toy_text.similarity(split, SIZES["toy_similarity"][split])
    ]


def _ranking(split: str) -> list[list[Example]]:
    return [
        [
            Example({"query": query, "document": text}, grade, f"q{number}", f"q{number}d{place}")
            for place, (text, grade) in enumerate(documents)
        ]
        for number, (query, documents) in enumerate(
            toy_text.ranking(split, SIZES["toy_ranking"][split])
        )
    ]


def _declare(
    task: Task, records: Callable[[str], list[list[Example]]]
) -> Callable[[DataOptions], Source]:
    drawn = functools.cache(records)  # once for all sources of the task
    return lambda options: MemorySource(task, options, drawn)


TASKS: dict[str, Callable[[DataOptions], Source]] = {
    "toy_sentiment": _declare(
        Task(
            "toy_sentiment",
            "classification",
            Template("{sentence}"),
            metrics=("accuracy",),
            classes=toy_text.SENTIMENT_CLASSES,
            chance=0.5,
        ),
        _sentiment,
    ),
    "toy_similarity": _declare(
        Task(
            "toy_similarity",
            "regression",
            Template("first {sentence1} second {sentence2}"),
            metrics=("spearman", "pearson"),
            label_range=(0.0, 5.0),
            chance=0.0,
        ),
        _similarity,
    ),
    "toy_ranking": _declare(
        # One relevant document among ten, in random order: MRR@10 is (1 + 1/2 + … + 1/10) / 10.
        Task(
            "toy_ranking",
            "ranking",
            Template("query {query} document {document}", cut=("document",)),
            metrics=("mrr@10", "ndcg@10"),
            chance=round(sum(1 / rank for rank in range(1, 11)) / 10, 3),
        ),
        _ranking,
    ),
}
