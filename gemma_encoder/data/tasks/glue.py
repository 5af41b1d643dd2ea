"""GLUE through TensorFlow Datasets: each task is one declaration. Names in the text are T5's (arXiv 1910.10683, appendix D)."""

from collections.abc import Callable

from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.data.tfds import declare_tfds
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template

_NLI = Template("mnli hypothesis: {hypothesis} premise: {premise}", cut=("premise", "hypothesis"))
_NLI_CLASSES = ("entailment", "neutral", "contradiction")


def _pair(name: str) -> Template:
    return Template(
        f"{name} sentence1: {{sentence1}} sentence2: {{sentence2}}", cut=("sentence2", "sentence1")
    )


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        declare_tfds(
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
        declare_tfds(
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
        declare_tfds(
            Task(
                "glue_mrpc",
                "classification",
                _pair("mrpc"),
                metrics=("f1", "accuracy"),
                classes=("not_equivalent", "equivalent"),
            ),
            "glue/mrpc:2.0.0",
        ),
        declare_tfds(
            Task(
                "glue_qqp",
                "classification",
                Template(
                    "qqp question1: {question1} question2: {question2}",
                    cut=("question2", "question1"),
                ),
                metrics=("f1", "accuracy"),
                classes=("not_duplicate", "duplicate"),
            ),
            "glue/qqp:2.0.0",
        ),
        declare_tfds(
            Task(
                "glue_stsb",
                "regression",
                _pair("stsb"),
                metrics=("spearman", "pearson"),
                label_range=(0.0, 5.0),
                chance=0.0,
            ),
            "glue/stsb:2.0.0",
        ),
        declare_tfds(
            Task(
                "glue_mnli",
                "classification",
                _NLI,
                metrics=("accuracy",),
                classes=_NLI_CLASSES,
                chance=0.33,
            ),
            "glue/mnli:2.0.0",
            splits=(
                "train",
                "validation_matched",
                "validation_mismatched",
                "test_matched",
                "test_mismatched",
            ),
        ),
        declare_tfds(
            Task(
                "glue_qnli",
                "classification",
                Template(
                    "qnli question: {question} sentence: {sentence}", cut=("sentence", "question")
                ),
                metrics=("accuracy",),
                classes=("entailment", "not_entailment"),
                chance=0.5,
            ),
            "glue/qnli:2.0.0",
        ),
        declare_tfds(
            Task(
                "glue_rte",
                "classification",
                _pair("rte"),
                metrics=("accuracy",),
                classes=("entailment", "not_entailment"),
                chance=0.5,
            ),
            "glue/rte:2.0.0",
        ),
        # Its validation set is adversarial: a model that learns the training sentences by heart falls below chance there.
        declare_tfds(
            Task(
                "glue_wnli",
                "classification",
                _pair("wnli"),
                metrics=("accuracy",),
                classes=("not_entailment", "entailment"),
                chance=0.5,
            ),
            "glue/wnli:2.0.0",
        ),
        # Diagnostics: only a test split, without labels; scored by the head that MNLI trains.
        declare_tfds(
            Task(
                "glue_ax",
                "classification",
                _NLI,
                metrics=("matthews_correlation",),
                classes=_NLI_CLASSES,
                head="glue_mnli",
                chance=0.0,
            ),
            "glue/ax:2.0.0",
            splits=("test",),
        ),
    ]
)
