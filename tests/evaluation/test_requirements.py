"""Metrics are checked against kind, classes and labels before anything is trained."""

import math
import warnings

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.evaluation.requirements import check_split_metrics, check_task_metrics
from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.training import loop
from gemma_encoder.training.build import build

CLASSES = ("no", "yes")
ANSWERED = {"option": "x", "answers": ["x"]}


def make_task(kind, names, classes=CLASSES):
    has_classes = kinds.get(kind).has_classes
    label_range = (0.0, 5.0) if kinds.get(kind).has_range else (0.0, 1.0)
    return Task(
        "t", kind, Template("{x}"), tuple(names), classes if has_classes else (), label_range
    )


def make_source(task, labels, queries=(), infos=()):
    """Returns a source whose splits all have these labels, an example a record."""
    records = []
    for index, label in enumerate(labels):
        query = queries[index] if queries else ""
        info = infos[index] if infos else {}
        records.append([Example({"x": "x"}, label, query, str(index), info)])
    return MemorySource(task, DataOptions(), lambda split: records)


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        ("classification", "f2", "f1"),
        ("regression", "persons", "pearson"),
        ("ordinal", "mean_abs_error", "mean_absolute_error"),
        ("multi_label", "micro", "micro_f1"),
        ("choice", "accurracy", "accuracy"),
        ("language_model", "perplexities", "perplexity"),
        ("ranking", "mrr@100", "mrr@10"),
    ],
)
def test_an_unknown_metric_names_the_nearest(kind, name, nearest):
    with pytest.raises(InputError, match=f"metric '{name}'; did you mean '{nearest}'"):
        check_task_metrics(make_task(kind, [name]))


@pytest.mark.parametrize("name", ["f1", "f1a"])
def test_f1_needs_two_classes(name):
    check_task_metrics(make_task("classification", [name]))
    with pytest.raises(
        InputError,
        match=rf"task 't': the metric '{name}' cannot be computed: it needs two classes, but the "
        r"task has 3 \(a, b, c\); choose other metrics, of accuracy, .*macro_f1",
    ):
        check_task_metrics(make_task("classification", ["accuracy", name], ("a", "b", "c")))


REFUSED = [
    ("classification", "f1", [0, 0], {}, "a label of the class 'yes', but there is none"),
    ("classification", "f1a", [0, 0], {}, "a label of the class 'yes'"),
    ("classification", "matthews_correlation", [1, 1], {}, "labels, but all 2 are yes"),
    ("classification", "exact_match", [0, 1], {}, "answers grouped by question"),
    ("classification", "gender_parity", [0, 1], {}, "examples in pairs"),
    (
        "classification",
        "gender_parity",
        [0, 1, 1],
        {"queries": ["p", "p", "q"]},
        "pairs of examples, but the pair 'q' has 1",
    ),
    ("regression", "pearson", [3.0], {}, "labels, but there is one example, with the label 3"),
    ("regression", "spearman", [3.0, 3.0, 3.0], {}, "labels, but all 3 are 3"),
    ("ordinal", "quadratic_weighted_kappa", [1, 1], {}, "labels, but all 2 are yes"),
    ("multi_label", "average_precision", [(), ()], {}, "a label with a class"),
    ("multi_label", "micro_f1", [(), ()], {}, "a label with a class"),
    ("multi_label", "macro_f1", [()], {}, "a label with a class"),
    ("choice", "accuracy", [0.0, 0.0], {"queries": "qq"}, "a right option, but all are wrong"),
    ("choice", "exact_match", [1.0, 0.0], {"queries": "qq"}, "the question 'q' has none"),
    (
        "choice",
        "token_f1",
        [1.0, 0.0],
        {"queries": "qr", "infos": [ANSWERED, ANSWERED | {"answers": []}]},
        "the question 'r' has none",
    ),
    ("ranking", "mrr@10", [0.0, 0.0], {"queries": "qq"}, "grade 1 or above, but the highest .* 0"),
    ("ranking", "ndcg@10", [0.0], {"queries": "q"}, "a document of grade 1 or above"),
    ("ranking", "map(rel=2)", [1.0, 0.0], {"queries": "qq"}, "grade 2 or above, .* grade is 1"),
]


@pytest.mark.parametrize(("kind", "name", "labels", "more", "message"), REFUSED)
def test_labels_that_leave_a_metric_undefined_are_refused(kind, name, labels, more, message):
    source = make_source(make_task(kind, [name]), labels, **more)
    check_task_metrics(source.task)
    with pytest.raises(
        InputError,
        match=f"cannot be computed on its validation split: it needs .*{message}.*; change the "
        "validation data, or choose other metrics, of",
    ) as caught:
        check_split_metrics(source, "validation")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in metrics.METRICS for name in metrics.METRICS[kind]]
)
def test_every_metric_is_refused_or_finite(kind, name):
    """On the smallest data: one example, equal labels, two labels. No warning, no traceback."""
    task = make_task(kind, [name])
    labels = {"multi_label": [(), (0,), (0, 1)]}.get(kind, [0, 1])
    for sample in ([labels[0]], [labels[-1]], labels[:1] * 3, labels, labels[::-1] * 2):
        infos = [ANSWERED] * len(sample)
        source = make_source(task, sample, ["q"] * len(sample), infos)
        try:
            assert check_split_metrics(source, "validation")
        except InputError:
            continue
        table = metrics.ExampleTable()
        for index in range(len(sample)):
            table.add(source.examples("validation", index)[0])
        rng = np.random.default_rng(0)
        outputs = rng.random((len(sample), 2)).astype(np.float32)
        if not (task.kind.has_classes or kind == "language_model"):
            outputs = outputs[:, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            [value] = metrics.compute_metrics(task, outputs, table).values()
        assert math.isfinite(value)


def test_every_ranking_metric_has_a_least_grade():
    for name in ranking.METRICS:
        assert ranking.split_name(name)[1] == 1
    assert ranking.split_name("mrr(rel=12)@10")[1] == 12


def test_a_split_without_labels_is_accepted_and_told():
    source = make_source(make_task("classification", ["f1"]), [-1, -1])
    assert not check_split_metrics(source, "test")
    assert check_split_metrics(make_source(source.task, [0, 1]), "test")
    with pytest.raises(InputError, match="1 of 2 examples have no label"):
        check_split_metrics(make_source(source.task, [-1, 1]), "test")
    # Labels of other splits are known, as in the stream of evaluation.
    with pytest.raises(InputError, match="validation record 1: label -1 is out of range"):
        check_split_metrics(source, "validation")
    with pytest.raises(InputError, match="its validation split has no example"):
        check_split_metrics(make_source(source.task, []), "validation")


def test_classes_without_an_example_are_named_and_left_out(caplog):
    task = make_task("multi_label", ["average_precision", "macro_f1"], ("a", "b", "c"))
    check_split_metrics(make_source(task, [(0,), (), (0, 2)]), "validation")
    assert "no example of the validation split has the class b" in caplog.text
    labels = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]], np.float32)
    outputs = np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.3], [0.8, 0.3, 0.7]], np.float32)
    assert metrics.average_precision(labels, outputs, None) == 1
    assert metrics.METRICS["multi_label"]["macro_f1"](labels, outputs, None) == 1
    caplog.clear()
    task = make_task("classification", ["macro_f1"], ("a", "b", "c"))
    check_split_metrics(make_source(task, [0, 2]), "validation")
    assert "has the class b" in caplog.text


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"kind": "classification", "metrics": ("f1",)}, "needs two classes, but the task has 3"),
        ({"kind": "classification", "metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"kind": "regression", "label": "score"}, "'spearman' cannot be computed on its valid"),
    ],
)
def test_training_refuses_before_it_takes_the_workdir(micro, tmp_path, own, message):
    header = "text,label,score\n"
    rows = [f"word {index},{'abc'[index % 3]},{index}\n" for index in range(12)]
    (tmp_path / "train.csv").write_text(header + "".join(rows))
    (tmp_path / "dev.csv").write_text(header + rows[3])
    fields = {f"own__{name}": value for name, value in own.items()}
    fields |= {"own__train": str(tmp_path / "train.csv"), "own__fields": ("text",)}
    fields |= {"own__validation": str(tmp_path / "dev.csv"), "tasks": ("own",)}
    with pytest.raises(InputError, match=message):
        loop.train(micro(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=message):
        build(micro(**fields))  # as `gemma-encoder evaluate` does before it loads the model


def test_early_stopping_and_the_best_metric_need_labels(micro, tmp_path, monkeypatch):
    task = make_task("classification", ["accuracy"])

    def source(options):
        records = {"train": [0, 1] * 20, "test": [-1] * 4}
        return MemorySource(
            task,
            options,
            lambda split: [[Example({"x": "x"}, label)] for label in records[split]],
        )

    monkeypatch.setattr(MemorySource, "splits", ("train", "test"))
    monkeypatch.setitem(registry._TASKS, "t", source)
    fields = {"tasks": ("t",), "evaluate_split": "test", "evaluate_every": "2 steps"}
    assert build(micro(**fields)).unlabeled == ("t",)
    with pytest.raises(InputError, match="best_metric='t/accuracy' needs labels"):
        build(micro(**fields, best_metric="t/accuracy"), for_training=True)
    with pytest.raises(InputError, match="early_stopping.patience needs t/accuracy.*unlabeled"):
        loop.train(micro(**fields, early_stopping__patience=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
