"""GLUE through TensorFlow Datasets: each task is one declaration. Names in the text are T5's (arXiv 1910.10683, appendix D)."""

from collections.abc import Callable

from gemma_encoder.data.source import DataOptions, Source, TfdsSource
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template


def _declare(task: Task, tfds_name: str) -> Callable[[DataOptions], Source]:
    return lambda options: TfdsSource(task, options, tfds_name, {field: field for field in task.template.fields})


_PAIR_CUT = ("sentence2", "sentence1")

TASKS: dict[str, Callable[[DataOptions], Source]] = {
    "glue_cola": _declare(
        Task(
            "glue_cola",
            "classification",
            Template("cola sentence: {sentence}"),
            metrics=("matthews_correlation", "accuracy"),
            classes=("unacceptable", "acceptable"),
            chance=0.0,
        ),
        "glue/cola:2.0.0",
    ),
    "glue_sst2": _declare(
        Task(
            "glue_sst2",
            "classification",
            Template("sst2 sentence: {sentence}"),
            metrics=("accuracy",),
            classes=("negative", "positive"),
            chance=0.5,
        ),
        "glue/sst2:2.0.0",
    ),
    "glue_mrpc": _declare(
        Task(
            "glue_mrpc",
            "classification",
            Template("mrpc sentence1: {sentence1} sentence2: {sentence2}", cut=_PAIR_CUT),
            metrics=("f1", "accuracy"),
            classes=("not_equivalent", "equivalent"),
        ),
        "glue/mrpc:2.0.0",
    ),
    "glue_stsb": _declare(
        Task(
            "glue_stsb",
            "regression",
            Template("stsb sentence1: {sentence1} sentence2: {sentence2}", cut=_PAIR_CUT),
            metrics=("spearman", "pearson"),
            label_range=(0.0, 5.0),
            chance=0.0,
        ),
        "glue/stsb:2.0.0",
    ),
}
