"""Three small tasks, and streams over them."""

import itertools

import numpy as np

from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

CLASSES = Task("classes", "classification", Template("{x}"), ("accuracy",), ("a", "b"))
TARGETS = Task("targets", "regression", Template("{x}"), ("spearman",), label_range=(0.0, 10.0))


LISTS = Task(
    "lists", "ranking", Template("{query} {document}", truncation=("document",)), ("mrr@10",)
)


def texts(split):
    rng = np.random.default_rng(0)
    return [
        [Example({"x": f"number {i} " + "and more " * int(rng.integers(0, 6))}, i % 2)]
        for i in range(40)
    ]


def targets(split):
    return [[Example({"x": f"target of {i}"}, float(i % 11))] for i in range(30)]


def lists(split):
    return [
        [
            Example(
                {"query": f"query {i}", "document": f"document {j}"},
                float(j == 0),
                f"q{i}",
                f"d{j}",
            )
            for j in range(4)
        ]
        for i in range(10)
    ]


def sources():
    return [
        MemorySource(task, DataOptions(), make)
        for task, make in ((CLASSES, texts), (TARGETS, targets), (LISTS, lists))
    ]


OPTIONS = StreamOptions(
    BatchShape(rows=8, row_length=64, segments=4, groups=4, list_size=4),
    max_length=48,
    readers=4,
    seed=5,
)
RATES = np.array([0.4, 0.3, 0.3])


def stream(tokenizer, options=OPTIONS, **arguments):
    return TrainStream(sources(), RATES, tokenizer, options, **arguments)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
