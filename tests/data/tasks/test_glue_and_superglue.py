"""Every task of GLUE and SuperGLUE, from official files through TFDS to batches and metrics."""

import dataclasses

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import glue, superglue
from gemma_encoder.data.tfds import TfdsSource
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.template import Template

NAMES = (*glue.TASKS, *superglue.TASKS)
RECORD = "passage: Ann Lee met Bob in Rome. Bob, of Oslo, said no. They left"


OPTIONS = StreamOptions(
    BatchShape(rows=4, row_length=128, segments=6, groups=2, list_size=4), max_length=64, readers=2
)

# One example per task: split, `idx`, text and label. Unlabeled test splits have the label -1.
EXPECTED = {
    "glue_cola": ("validation", 3, "cola sentence: dev sentence 3 .", 1),
    "glue_sst2": ("test", 2, "sst2 sentence: test film 2", -1),
    "glue_mrpc": ("validation", 9, "mrpc sentence1: first 9 sentence2: second 9", 1),
    "glue_qqp": ("validation", 2, "qqp question1: dev first 2 question2: dev second 2", 0),
    "glue_stsb": ("validation", 3, "stsb sentence1: dev first 3 sentence2: dev second 3", 3.75),
    "glue_mnli": (
        "validation_mismatched",
        2,
        "mnli hypothesis: dev_mismatched second 2 premise: dev_mismatched first 2",
        2,
    ),
    "glue_qnli": ("validation", 1, "qnli question: dev first 1 sentence: dev second 1", 1),
    "glue_rte": ("validation", 0, "rte sentence1: dev first 0 sentence2: dev second 0", 0),
    "glue_wnli": ("validation", 1, "wnli sentence1: dev first 1 sentence2: dev second 1", 1),
    "glue_ax": ("test", 3, "mnli hypothesis: ax hypothesis 3 premise: ax premise 3", -1),
    "superglue_boolq": ("validation", 1, "boolq passage: a passage on 1 question: val is 1 odd", 1),
    "superglue_cb": ("validation", 2, "cb hypothesis: claim 2 premise: val premise 2", 2),
    "superglue_copa": ("validation", 1, "copa choice: one 1 premise: val 1 question: effect", 0),
    "superglue_multirc": (
        "validation",
        {"paragraph": 1, "question": 2, "answer": 7},
        "multirc question: val question 0? answer: answer 2 "
        "paragraph: Sent 1: Ann bought a lamp. Sent 2: It was red &amp; old.",
        1,
    ),
    "superglue_record": ("validation", 1, f"record query: Oslo knows Ann Lee {RECORD}", 1),
    "superglue_rte": ("validation", 1, "rte hypothesis: claim 1 premise: val premise 1", 1),
    "superglue_wic": (
        "validation",
        0,
        "wic sentence1: val bank 0 sentence2: a bank 0 word: bank",
        1,
    ),
    "superglue_wsc": (
        "test",
        0,
        "wsc text: The pot did not fit into the box because *it* was too big . noun: The pot",
        -1,
    ),
    "superglue_axb": ("test", 1, "rte hypothesis: axb claim 1 premise: axb premise 1", 1),
    "superglue_axg": (
        "test",
        2,
        "rte hypothesis: The cook paid 1 premise: The cook said he paid 1",
        1,
    ),
}


def labeled_split(name):
    return {
        "glue_mnli": "validation_matched",
        "glue_ax": "test",
        "superglue_axb": "test",
        "superglue_axg": "test",
    }.get(name, "validation")


def test_every_task_has_an_expected_example():
    assert set(NAMES) == set(EXPECTED) and set(NAMES) < set(registry.names())


@pytest.mark.parametrize("name", NAMES)
def test_declarations_match_the_builders(name, benchmarks):
    source: TfdsSource = registry.get(name)
    source.check()
    import tensorflow_datasets as tfds

    info = tfds.builder(source.tfds_name, data_dir=str(benchmarks)).info
    assert set(source.splits) == set(info.splits)
    for split in source.splits:
        records = info.splits[split].num_examples
        for limit, count in (
            (0, records),
            (3, 3),
            (records + 1, records),
        ):  # a limit beyond the split takes all of it
            assert (
                registry.get(
                    name, DataOptions(max_train_examples=limit, max_eval_examples=limit)
                ).size(split)
                == count
            )
    if source.task.classes:
        assert source.task.classes == tuple(info.features["label"].names)
    assert set(source.task.template.truncation) <= set(source.task.template.fields)


@pytest.mark.parametrize("name", NAMES)
def test_texts_have_the_format_of_t5(name, tables, benchmarks):
    split, idx, text, label = EXPECTED[name]
    source = registry.get(name)
    _, table = tables(name, split)
    (example, *_) = [
        e
        for index in range(source.size(split))
        for e in source.examples(split, index)
        if e.info["idx"] == idx
    ]
    assert (source.task.template.render(example.fields)[0], example.label) == (text, label)
    row = next(i for i, info in enumerate(table.infos) if info["idx"] == idx)
    assert (table.labels[row], table.query_ids[row], table.document_ids[row]) == (
        label,
        example.query_id,
        example.document_id,
    )


@pytest.mark.parametrize("name", NAMES)
def test_batches_contain_every_example_once(name, tables, tokenizer, benchmarks):
    source = registry.get(name)
    for split in source.splits:
        batches, table = tables(name, split)
        texts = {}
        for batch in batches:
            for row, slot in zip(*np.nonzero(batch.weight), strict=True):
                tokens = batch.tokens[row][batch.segment_ids[row] == slot + 1]
                example = int(batch.example_id[row, slot])
                assert example not in texts and batch.group_id[row, slot] == -1
                texts[example] = list(tokens[1:-1])
                label = table.labels[example]
                expected = (
                    label
                    if source.task.is_unlabeled(label)
                    else source.task.check_label(label, split)
                )
                assert batch.label[row, slot] == np.float32(expected)
        examples = [e for index in range(source.size(split)) for e in source.examples(split, index)]
        assert sorted(texts) == list(range(len(examples))) and table.counts[name]["cut_texts"] == 0
        assert [texts[i] for i in range(len(examples))] == tokenizer.encode(
            [source.task.template.render(e.fields)[0] for e in examples]
        )


@pytest.mark.parametrize("name", NAMES)
def test_only_some_test_splits_are_unlabeled(name, tables):
    task = registry.get(name).task
    for split in registry.get(name).splits:
        unknown = [task.is_unlabeled(label) for label in tables(name, split)[1].labels]
        assert set(unknown) == {
            split.startswith("test") and name not in ("superglue_axb", "superglue_axg")
        }


def oracle(task, table, wrong=()):
    """Returns correct outputs, except for the examples in `wrong`."""
    labels = np.array(table.labels)
    if task.kind.name != "classification":
        return np.where(np.isin(np.arange(len(labels)), wrong), -labels, labels)
    guesses = np.where(
        np.isin(np.arange(len(labels)), wrong), (labels + 1) % len(task.classes), labels
    ).astype(int)
    return np.eye(len(task.classes))[guesses]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_correct_answers_are_perfect(name, tables):
    task = registry.get(name).task
    _, table = tables(name, labeled_split(name))
    metrics = Predictions(task, labeled_split(name), oracle(task, table), table).metrics()
    # One of four questions of ReCoRD is unanswerable: no entity of the passage is correct.
    expected = {"glue_ax": {}, "superglue_record": {"token_f1": 0.75, "exact_match": 0.75}}.get(
        name, {metric: float(not lowest_is_best(metric)) for metric in task.metrics}
    )
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert list(metrics) == list(expected)  # the main metric first
    for split in registry.get(name).splits:
        if split.startswith("test") and task.is_unlabeled(tables(name, split)[1].labels[0]):
            assert (
                Predictions(
                    task, split, oracle(task, tables(name, split)[1]), tables(name, split)[1]
                ).metrics()
                == {}
            )


def test_evaluation_splits():
    assert registry.get("glue_mnli").evaluation_splits("validation") == {
        "matched": "validation_matched",
        "mismatched": "validation_mismatched",
    }
    assert registry.get("glue_mnli").evaluation_splits("test_matched") == {"": "test_matched"}
    assert registry.get("glue_sst2").evaluation_splits("test") == {"": "test"}
    assert registry.get("glue_ax").evaluation_splits("validation") == {}


def test_diagnostics_share_head_classes_and_template():
    for diagnostic, task in (
        ("glue_ax", "glue_mnli"),
        ("superglue_axb", "superglue_rte"),
        ("superglue_axg", "superglue_rte"),
    ):
        first = registry.get(diagnostic).task
        second = registry.get(task).task
        assert (first.head, first.classes, first.template) == (
            second.head,
            second.classes,
            second.template,
        )


def test_invalid_labels_and_empty_texts_name_the_record(tokenizer, benchmarks):
    def source(**changes):
        task = dataclasses.replace(
            registry.get("superglue_cb").task, template=Template("{premise}")
        )
        return TfdsSource(
            task,
            DataOptions(),
            "super_glue/cb:1.0.2",
            examples=lambda r: [example(r, **changes)],
        )

    def example(r, label=None, premise=None):
        from gemma_encoder.inputs.task import Example

        return Example(
            {"premise": r["premise"] if premise is None else premise},
            r["label"] if label is None else label,
        )

    for changes, message in (
        ({"label": 3.0}, "label 3 is out of range"),
        ({"label": -1.0}, "label -1 is out of range"),
        ({"premise": " "}, "the text is empty"),
    ):
        with pytest.raises(InputError, match=f"validation record 1.*{message}"):
            list(
                evaluation_stream(
                    source(**changes), 0, "validation", tokenizer, OPTIONS, ExampleTable()
                )
            )
    with pytest.raises(InputError, match="test record 1.*label 3 is out of range"):
        list(evaluation_stream(source(label=3.0), 0, "test", tokenizer, OPTIONS, ExampleTable()))


def test_different_classes_of_the_data_are_errors(benchmarks):
    task = registry.get("superglue_cb").task
    other = dataclasses.replace(task, classes=("entailment", "neutral", "contradiction"))
    with pytest.raises(
        InputError,
        match="the data in .*super_glue/cb/1.0.2 have the classes entailment, contradiction, "
        "neutral; expected entailment, neutral",
    ):
        TfdsSource(other, DataOptions(), "super_glue/cb:1.0.2").examples("train", 0)
