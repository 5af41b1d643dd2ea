"""GLUE from TensorFlow Datasets, one declaration per task."""

from collections.abc import Callable
from typing import Any

from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tfds import declare_t5

_SENTENCES = "sentence1 sentence2"
_NLI = "hypothesis premise"
_NLI_CLASSES = "entailment neutral contradiction"
_SIMILARITY = {"kind": "regression", "label_range": (0.0, 5.0)}
_MNLI_SPLITS = "train validation_matched validation_mismatched test_matched test_mismatched"


def _task(name: str, *names: Any, **more: Any) -> tuple[str, Callable[[DataOptions], Source]]:
    """Declares a task by fields, metrics and classes; other arguments as `declare_t5`."""
    return declare_t5(f"glue_{name}", f"glue/{name}:2.0.0", *names, **more)


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        _task("cola", "sentence", "matthews_correlation accuracy", "unacceptable acceptable"),
        _task("sst2", "sentence", "accuracy", "negative positive"),
        _task("mrpc", _SENTENCES, "f1 accuracy", "not_equivalent equivalent"),
        _task("qqp", "question1 question2", "f1 accuracy", "not_duplicate duplicate"),
        _task("stsb", _SENTENCES, "spearman pearson mae rmse r2", **_SIMILARITY),
        _task("mnli", _NLI, "accuracy", _NLI_CLASSES, splits=_MNLI_SPLITS),
        _task("qnli", "question sentence", "accuracy", "entailment not_entailment"),
        _task("rte", _SENTENCES, "accuracy", "entailment not_entailment"),
        # The validation set is adversarial: a model that memorizes the training sentences falls
        # below chance.
        _task("wnli", _SENTENCES, "accuracy", "not_entailment entailment"),
        # A diagnostic set: only an unlabeled test split, scored by the head of MNLI.
        _task("ax", _NLI, "matthews_correlation", _NLI_CLASSES, head="glue_mnli", splits="test"),
    ]
)
