"""Best constant predictions on the training labels: what metrics and regression heads start from.

They depend on the training data alone, so that all processes compute the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Task
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.heads import head_class

SAMPLE = 10_000  # records whose labels are read
RUNS = 20  # of consecutive records, in a split with more


def best_constants(sources: Sequence[Source]) -> dict[str, Any]:
    """Returns the constant output that fits the training labels best, JSON-ready, by task.

    A task that is only evaluated has the constant of a task that trains its head. Tasks without
    such an output, such as lists of documents, are absent.
    """
    trained = {}
    for source in sources:
        task = source.task
        if "train" in source.splits and not (task.is_list or task.kind.counts_tokens):
            constant = task.kind.baseline(task, training_labels(source))
            if constant is not None:
                trained[task.name] = np.asarray(constant, float).tolist()
    tasks = [source.task for source in sources]
    return constants_of(tasks, tasks, trained)


def constants_of(
    tasks: Sequence[Task], trained: Sequence[Task], constants: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the constant of each task: its own, else that of a task with the same head.

    Args:
        tasks: tasks to predict.
        trained: tasks of a training mixture.
        constants: constant outputs of these, by name.
    """
    return {
        task.name: constants[owner.name]
        for task in tasks
        for owner in sorted(trained, key=lambda owner: owner.name == task.name)
        if owner.name in constants
        and task.head == owner.head
        and not task.output_differences(owner)
    }


def training_labels(source: Source) -> list[Label]:
    """Returns the labels of the train split, checked: all, or in large splits a fixed sample.

    The sample is `RUNS` runs of consecutive records at equal distances, which is cheap to read from
    files in parts and covers a file that is sorted by label.
    """
    labels: list[Label] = []
    for index in _sampled(source.size("train")):
        where = source.where("train", index)
        for label in source.record("train", index, training=True).labels:
            source.task.check_label(label, where)
            labels.append(label)
    return labels


def _sampled(size: int) -> Iterator[int]:
    if size <= SAMPLE:
        yield from range(size)
        return
    length = SAMPLE // RUNS
    for start in np.linspace(0, size - length, RUNS).astype(int).tolist():
        yield from range(start, start + length)


def head_constants(
    tasks: Sequence[Task],
    rates: np.ndarray,
    constants: Mapping[str, Any],
    encoder: EncoderConfig,
) -> dict[str, float]:
    """Returns the initial value of parameters of heads that start at a constant score, by path.

    The bias of such a head is that score and its kernel is 0: the random scores of a random kernel
    vary by about 1, as much as all targets.

    Args:
        tasks: tasks of the mixture.
        rates: share of each task; a head that several tasks share starts at their weighted mean.
        constants: constant outputs by task, of `best_constants`.
        encoder: config of the encoder.
    """
    totals: dict[str, tuple[float, float]] = {}
    for task, rate in zip(tasks, rates.tolist(), strict=True):
        if not rate or task.name not in constants:
            continue
        score = task.kind.initial_score(task, constants[task.name])
        if score is not None:
            total, weight = totals.get(task.head, (0.0, 0.0))
            totals[task.head] = total + rate * score, weight + rate
    values = {}
    for head, (total, weight) in totals.items():
        if output := head_class(encoder.heads[head]).output:
            values[f"heads/{head}/{output}/bias"] = total / weight
            values[f"heads/{head}/{output}/kernel"] = 0.0
    return values
