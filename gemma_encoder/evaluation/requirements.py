"""Requirements of metrics on a task and its labels, which are checked before the first step.

A metric is refused if it is not defined for the task, such as the binary F1 of three classes, or if
its value on the split would be the same for every model, such as a correlation with constant
targets. A class or question that alone lacks what a metric needs is no reason to refuse: it counts
as the metric's docstring says, and is logged.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gemma_encoder.data.source import Source
from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable, Task

# Returns what the task or the labels lack, as "two classes, but there are 3"; "" for nothing.
Check = Callable[[Task, ExampleTable], str]


class Requirement(NamedTuple):
    """A condition for a metric.

    Attributes:
        check: returns what is lacking, "" for nothing.
        of_examples: the check needs query ids and `info` of the examples, not only labels.
        of_task: the check needs no labels at all.
    """

    check: Check
    of_examples: bool = False
    of_task: bool = False


def _two_classes(task: Task, table: ExampleTable) -> str:
    del table
    count = len(task.classes)
    if count == 2:
        return ""
    return f"two classes, but the task has {count} ({', '.join(task.classes)})"


def _second_class(task: Task, table: ExampleTable) -> str:
    if any(label == 1 for label in table.labels):
        return ""
    return f"a label of the class {task.classes[1]!r}, but there is none"


def _two_values(task: Task, table: ExampleTable) -> str:
    values = set(table.labels)
    if len(values) > 1:
        return ""
    label = task.kind.show_label(task, next(iter(values)))
    if len(table.labels) == 1:
        return f"two different labels, but there is one example, with the label {label}"
    return f"two different labels, but all {len(table.labels)} are {label}"


def _any_class(task: Task, table: ExampleTable) -> str:
    del task
    return "" if any(table.labels) else "a label with a class, but no example has one"


def _questions(task: Task, table: ExampleTable) -> str:
    del task
    return "" if all(table.query_ids) else "answers grouped by question, but they have no question"


def _pairs(task: Task, table: ExampleTable) -> str:
    if lack := _questions(task, table):
        return lack.replace("answers grouped by question", "examples in pairs").replace(
            "question", "pair"
        )
    for pair, group in table.groups().items():
        if len(group) != 2:
            return f"pairs of examples, but the pair {pair!r} has {len(group)}"
    return ""


def _right_option(task: Task, table: ExampleTable) -> str:
    del task
    return "" if any(label > 0 for label in table.labels) else "a right option, but all are wrong"


def _answers(task: Task, table: ExampleTable) -> str:
    del task
    for index, info in enumerate(table.infos):
        if not info.get("answers") or "option" not in info:
            query = table.query_ids[index]
            return f"the texts of options and answers, but the question {query!r} has none"
    return ""


BINARY = (Requirement(_two_classes, of_task=True), Requirement(_second_class))
VARYING = (Requirement(_two_values),)
ANY_CLASS = (Requirement(_any_class),)
ANSWERS = (Requirement(_answers, of_examples=True),)

# By kind and metric; a metric that is not listed needs a label and nothing else. Ranking metrics
# need a relevant document, see `_relevant`.
REQUIREMENTS: dict[str, dict[str, tuple[Requirement, ...]]] = {
    "classification": {
        "f1": BINARY,
        "f1a": BINARY,
        "matthews_correlation": VARYING,
        "exact_match": (Requirement(_questions, of_examples=True),),
        "gender_parity": (Requirement(_pairs, of_examples=True),),
    },
    "regression": {"pearson": VARYING, "spearman": VARYING, "r2": VARYING},
    "multi_label": {
        "micro_f1": ANY_CLASS,
        "macro_f1": ANY_CLASS,
        "average_precision": ANY_CLASS,
    },
    "ordinal": {"quadratic_weighted_kappa": VARYING},
    "choice": {
        "accuracy": (Requirement(_right_option),),
        "exact_match": ANSWERS,
        "token_f1": ANSWERS,
    },
}


def check_task_metrics(task: Task) -> None:
    """Raises InputError if a metric is unknown, or is not defined for the task; reads no data."""
    metrics.check_metrics(task.kind, task.metrics)
    for name, requirement in _requirements(task):
        if requirement.of_task:
            _refuse(task, name, "", requirement.check(task, ExampleTable()))


def check_split_metrics(source: Source, split: str) -> bool:
    """Checks the labels of a split that is evaluated, and that they suffice for each metric.

    Labels are read, but no text is tokenized.

    Returns:
        True if the split has labels.

    Raises:
        InputError: there is no example, a label is out of range, some labels are unknown and others
            are not, or a metric cannot be computed.
    """
    task = source.task
    if not source.size(split):
        raise InputError(f"task {task.name!r}: its {split} split has no example to evaluate")
    if task.kind.counts_tokens:
        return True
    if task.kind.ranks:
        return _check_ranking(source, split)
    requirements = [(name, needed) for name, needed in _requirements(task) if not needed.of_task]
    table = _read_labels(source, split, any(needed.of_examples for _, needed in requirements))
    if not metrics.has_labels(task, table):
        return False
    for name, requirement in requirements:
        _refuse(task, name, split, requirement.check(task, table))
    _log_absent_classes(task, split, table)
    return True


def _requirements(task: Task) -> Iterator[tuple[str, Requirement]]:
    by_metric = REQUIREMENTS.get(task.kind.name, {})
    for name in task.metrics:
        for requirement in by_metric.get(name, ()):
            yield name, requirement


def _refuse(task: Task, metric: str, split: str, lack: str) -> None:
    """Raises InputError if something is lacking."""
    if not lack:
        return
    where = f" on its {split} split" if split else ""
    valid = ranking.METRICS if task.kind.ranks else metrics.METRICS[task.kind.name]
    change = f"change the {split} data, or " if split else ""
    raise InputError(
        f"task {task.name!r}: the metric {metric!r} cannot be computed{where}: it needs {lack}; "
        f"{change}choose other metrics, of {', '.join(valid)}"
    )


def _read_labels(source: Source, split: str, complete: bool) -> ExampleTable:
    """Returns the labels of a split, with query ids and infos if `complete`."""
    task = source.task
    table = ExampleTable()
    unlabeled = split.startswith("test")
    any_range = split != "train" and source.range_is_inferred
    for index in range(source.size(split)):
        record = source.record(split, index)
        for label in record.labels:
            if not (any_range or (unlabeled and task.is_unlabeled(label))):
                task.check_label(label, source.where(split, index))
        if complete:
            for example in range(len(record.labels)):
                table.add(record.example(example)._replace(fields={}))
        else:
            table.labels += record.labels
    return table


def _check_ranking(source: Source, split: str) -> bool:
    """Checks that a query has a relevant document; returns False without judgments."""
    task = source.task
    qrels = source.qrels(split)
    if qrels is None:
        grades = _read_labels(source, split, complete=False).labels
    else:
        grades = [grade for of_query in qrels.values() for grade in of_query.values()]
    if not grades:
        return False
    highest = max(grades)
    for name in task.metrics:
        least = ranking.split_name(name)[1]
        if highest < least:
            lack = f"a document of grade {least} or above, but the highest grade is {highest:g}"
            _refuse(task, name, split, lack)
    return True


def _log_absent_classes(task: Task, split: str, table: ExampleTable) -> None:
    """Logs the classes without an example, which metrics that average over classes leave out."""
    averages: Sequence[str] = [
        name for name in task.metrics if name in ("macro_f1", "average_precision")
    ]
    if not averages or not task.kind.has_classes:
        return
    rows = task.kind.metric_labels(task, table.labels)
    classes = rows.astype(int)
    counts = (
        classes.sum(axis=0) if rows.ndim > 1 else np.bincount(classes, minlength=len(task.classes))
    )
    absent = [name for name, count in zip(task.classes, counts, strict=True) if not count]
    if absent:
        logging.warning(
            "%s: no example of the %s split has the class %s: %s averages over the others, and a "
            "class that is predicted without an example counts as 0 in macro_f1",
            task.name,
            split,
            ", ".join(absent[:10]) + (", …" if len(absent) > 10 else ""),
            " and ".join(averages),
        )
