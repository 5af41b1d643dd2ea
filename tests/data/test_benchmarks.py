"""Every GLUE and SuperGLUE task, from raw official files through TFDS's own builders to batches, metrics and submissions."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

from gemma_encoder.cli import submit
from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.pipeline import Reader, TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import glue, superglue
from gemma_encoder.data.tfds import TfdsSource
from gemma_encoder.evaluation import leaderboards, submission
from gemma_encoder.evaluation.predictions import Predictions, predict_split
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer
from tests import official

NAMES = (*glue.TASKS, *superglue.TASKS)
OPTIONS = StreamOptions(
    BatchShape(rows=4, row_length=128, segments=6, groups=2, list_size=4), max_length=64, readers=2
)
TRAINING = StreamOptions(
    BatchShape(rows=2, row_length=128, segments=4, groups=2, list_size=4), max_length=64
)
RECORD = "passage: Ann Lee met Bob in Rome. Bob, of Oslo, said no. They left"

# One example of each task by its `idx`, as the model reads it, with its label. Test splits that have no labels say -1.
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
        "multirc question: val question 0? answer: answer 2 paragraph: Sent 1: Ann bought a lamp. Sent 2: It was red &amp; old.",
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


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("small")


@pytest.fixture(scope="module")
def tables(prepared, tokenizer):
    """`tables(name, split)`: the batches and the table of a split, read once."""
    read = {}

    def get(name, split):
        if (name, split) not in read:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TFDS_DATA_DIR", str(prepared))
                table = ExampleTable()
                read[name, split] = (
                    list(
                        evaluation_stream(registry.get(name), 0, split, tokenizer, OPTIONS, table)
                    ),
                    table,
                )
        return read[name, split]

    return get


def labeled_split(name):
    return {
        "glue_mnli": "validation_matched",
        "glue_ax": "test",
        "superglue_axb": "test",
        "superglue_axg": "test",
    }.get(name, "validation")


def test_every_task_is_expected_here():
    assert set(NAMES) == set(EXPECTED) and set(NAMES) < set(registry.names())


@pytest.mark.parametrize("name", NAMES)
def test_the_declaration_fits_the_builder(name, benchmarks):
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
def test_a_raw_record_becomes_the_text_that_t5_names(name, tables, benchmarks):
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
    place = next(i for i, info in enumerate(table.infos) if info["idx"] == idx)
    assert (table.labels[place], table.query_ids[place], table.document_ids[place]) == (
        label,
        example.query_id,
        example.document_id,
    )


@pytest.mark.parametrize(
    ("record", "marked"),
    zip(
        official.WSC,
        [
            "The pot did not fit into the box because *it* was too big .",
            "The pot did not fit into the box because *it* was too big .",
            'Ann asked Ida "why?" and "*she*" said nothing; she left .',
            "Itself a jar , *it* broke .",
        ],
        strict=True,
    ),
)
def test_the_pronoun_that_is_meant_is_marked(record, marked):
    text, (_, noun), (place, pronoun), right = record
    (example,) = superglue._wsc(
        {
            "text": text,
            "noun": noun,
            "pronoun": pronoun,
            "pronoun_index": place,
            "label": float(right),
            "idx": 0,
        }
    )
    assert example.fields == {"text": marked, "noun": noun} and example.label == right


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_table_knows_questions_options_answers_and_pairs(split, benchmarks):
    def examples(name):
        source = registry.get(name)
        return [
            example
            for index in range(source.size(split))
            for example in source.examples(split, index)
        ]

    gaps = {0: "{} met someone", 1: "Oslo knows {}", 2: "nobody fits {}"}
    answers = {0: ["Ann Lee"], 1: ["Ann Lee", "Bob"], 2: ["Zed"]}
    for example in examples("superglue_record"):
        info, kind = example.info, int(example.query_id) % 3
        assert (
            example.fields["query"] == gaps[kind].format(info["option"])
            and info["option"] == ["Ann Lee", "Bob", "Oslo", "Rome"][int(example.document_id)]
        )
        assert (info["idx"], info["answers"]) == (
            int(example.query_id),
            [] if split == "test" else answers[kind],
        )
    for example in examples("superglue_copa"):
        assert example.fields[
            "choice"
        ] == f"{('one', 'two')[int(example.document_id)]} {example.query_id}" and example.info == {
            "idx": int(example.query_id)
        }
    for example in examples("superglue_multirc"):
        assert (
            example.query_id
            == f"{example.info['idx']['paragraph']}-{example.info['idx']['question']}"
        )
    if split == "test":
        assert sorted(
            (example.query_id, example.info["idx"]) for example in examples("superglue_axg")
        ) == [("0", 0), ("0", 1), ("1", 2), ("1", 3)]


@pytest.mark.parametrize("name", NAMES)
def test_batches_hold_every_example_of_every_split_once(name, tables, tokenizer, benchmarks):
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
def test_only_some_test_splits_are_unlabelled(name, tables):
    task = registry.get(name).task
    for split in registry.get(name).splits:
        unknown = [task.is_unlabeled(label) for label in tables(name, split)[1].labels]
        assert set(unknown) == {
            split.startswith("test") and name not in ("superglue_axb", "superglue_axg")
        }


def oracle(task, table, wrong=()):
    """Outputs that are right but for the examples in `wrong`."""
    labels = np.array(table.labels)
    if task.kind.name != "classification":
        return np.where(np.isin(np.arange(len(labels)), wrong), -labels, labels)
    guesses = np.where(
        np.isin(np.arange(len(labels)), wrong), (labels + 1) % len(task.classes), labels
    ).astype(int)
    return np.eye(len(task.classes))[guesses]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_right_answers_are_one_and_of_unlabelled_splits_none(name, tables):
    task = registry.get(name).task
    _, table = tables(name, labeled_split(name))
    found = Predictions(task, labeled_split(name), oracle(task, table), table).metrics()
    # ReCoRD's question that no entity of the passage answers stays wrong: one of four.
    expected = {"glue_ax": {}, "superglue_record": {"token_f1": 0.75, "exact_match": 0.75}}.get(
        name, dict.fromkeys(task.metrics, 1.0)
    )
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)  # the main metric first
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
        first, second = registry.get(diagnostic).task, registry.get(task).task
        assert (first.head, first.classes, first.template) == (
            second.head,
            second.classes,
            second.template,
        )


# Choice tasks are lists


def train_lists(name, tokenizer, options=TRAINING, batches=6, **data):
    """The lists of the first training batches: for each, the (label, text) of its options in order."""
    source = registry.get(name, DataOptions(list_size=options.shape.list_size, **data))
    stream, lists = TrainStream([source], np.ones(1), tokenizer, options), []
    try:
        for _ in range(batches):
            batch = next(stream)
            for group in range(options.shape.groups):
                rows, slots = np.nonzero(batch.group_id == group)
                order = np.argsort(batch.list_slot[rows, slots])
                assert sorted(batch.list_slot[rows, slots]) == list(
                    range(len(rows))
                )  # a list is never split
                texts = [
                    "".join(tokenizer.pieces(batch.tokens[row][batch.segment_ids[row] == slot + 1]))
                    for row, slot in zip(rows, slots, strict=True)
                ]
                if len(rows):
                    lists.append([(batch.label[rows[i], slots[i]], texts[i]) for i in order])
    finally:
        stream.close()
    return lists


def test_training_lists_hold_one_right_option_and_a_sample_of_wrong_ones(tokenizer, benchmarks):
    copa = train_lists("superglue_copa", tokenizer)
    assert copa and all([label for label, _ in options] == [1, 0] for options in copa)
    shape = dataclasses.replace(TRAINING.shape, list_size=3)
    record = train_lists(
        "superglue_record", tokenizer, dataclasses.replace(TRAINING, shape=shape), batches=8
    )
    for options in record:
        assert [label for label, _ in options] in (
            [1, 0, 0],
            [1, 0],
        )  # four entities, one or two of them right
        assert len({text for _, text in options}) == len(options)
        assert not any("nobody" in text for _, text in options)  # no entity answers that one
    two_right = [options for options in record if "Oslo▁knows" in options[0][1]]
    assert {"Bob" in options[0][1].partition("passage")[0] for options in two_right} == {
        True,
        False,
    }  # sampled, never called wrong
    assert all(
        "Ann▁Lee▁" not in text.partition("passage")[0] and "Bob" not in text.partition("passage")[0]
        for options in two_right
        for _, text in options[1:]
    )


def test_questions_without_a_right_option_are_skipped_and_said_once(tokenizer, benchmarks, caplog):
    source = registry.get("superglue_record")
    reader = Reader([source], np.ones(1), tokenizer, TRAINING, 0)
    for _ in range(12):
        next(reader)
    lines = [
        record.getMessage() for record in caplog.records if "are skipped" in record.getMessage()
    ]
    assert lines == [
        "superglue_record: train records without a positive or without a negative are skipped"
    ]
    again = Reader([source], np.ones(1), tokenizer, TRAINING, 0)
    again.set_state(reader.get_state())
    np.testing.assert_array_equal(next(again)[0].tokens, next(reader)[0].tokens)


def test_nothing_to_learn_from_is_an_error(tokenizer, benchmarks):
    source = TfdsSource(
        dataclasses.replace(registry.get("superglue_record").task, name="unanswerable"),
        DataOptions(),
        "super_glue/record:1.0.2",
        columns={name: name for name in ("passage", "query", "entities", "answers")}
        | {"idx": "idx/query"},
        label=None,
        examples=lambda row: superglue._record(row | {"answers": ["Nobody"]}),
    )
    with pytest.raises(
        InputError,
        match="task 'unanswerable': no train record has both a positive and a negative",
    ):
        next(Reader([source], np.ones(1), tokenizer, TRAINING, 0))


# What mixtures do with tasks that have nothing to train on


def test_mixtures_are_named_lists_of_registered_tasks():
    assert mixtures.expand_mixtures(("glue", "toy_ranking")) == (*glue.TASKS, "toy_ranking")
    assert all(set(tasks) <= set(registry.names()) for tasks in mixtures.MIXTURES.values())
    assert not set(mixtures.MIXTURES) & set(registry.names())


def test_a_task_without_a_train_split_has_no_share_and_needs_its_head_trained(benchmarks):
    sources = [registry.get(name) for name in ("glue_mnli", "glue_ax", "superglue_copa")]
    for mixing in mixtures.RATES:
        np.testing.assert_allclose(
            mixtures.rates(sources, mixing), [0.5, 0, 0.5]
        )  # eight records each
    with pytest.raises(
        InputError,
        match="'glue_ax' has no train split, and no other task trains its head 'glue_mnli'",
    ):
        mixtures.rates(sources[1:], "equal")
    with pytest.raises(InputError, match="no task has a train split to learn from: glue_ax"):
        mixtures.rates(sources[1:2], "proportional")
    with pytest.raises(InputError, match="task 'glue_ax' has no train split; it has test"):
        sources[1].size("train")


def test_a_stream_passes_over_a_task_that_has_no_share(tokenizer, benchmarks):
    sources = [registry.get(name) for name in ("superglue_axb", "superglue_rte", "superglue_axg")]
    stream = TrainStream(sources, mixtures.rates(sources, "equal"), tokenizer, TRAINING, prefetch=1)
    batch = next(stream)
    state = stream.state()
    expected = next(stream)
    stream.close()
    assert set(batch.task_id[batch.weight > 0]) == {1}
    resumed = TrainStream(
        sources, mixtures.rates(sources, "equal"), tokenizer, TRAINING, prefetch=1
    )
    resumed.restore(state)
    np.testing.assert_array_equal(next(resumed).tokens, expected.tokens)
    resumed.close()


# Bad input


class OneRow:
    """A table whose only row has every column, some of them changed."""

    def __init__(self, **changes):
        self._values = {
            "idx": 7,
            "text": b"It broke .",
            "span1_text": b"It",
            "span2_text": b"it",
            "span2_index": 0,
            "label": 1,
            "query": b"who is @placeholder",
            "passage": b"Bob",
            "idx/query": 7,
            "entities": [b"Bob"],
            "answers": [b"Bob"],
            "premise": b"p",
            "hypothesis": b"h",
        } | changes

    def row(self, index):
        return self._values


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "superglue_wsc",
            {"span2_text": b"she"},
            "task 'superglue_wsc', train record 1 idx=7 pronoun_index=0: the field 'text' does not "
            "hold the pronoun 'she'",
        ),
        ("superglue_wsc", {"span2_text": b""}, "does not contain the pronoun ''"),
        (
            "superglue_record",
            {"query": b"who"},
            "task 'superglue_record', train record 1 idx=7: the field 'query' has no @placeholder",
        ),
        ("superglue_record", {"entities": []}, "the field 'entities' is empty"),
        (
            "superglue_rte",
            {"premise": b"\xff"},
            "task 'superglue_rte', train record 1 idx=7: field 'premise' is not valid UTF-8",
        ),
    ],
)
def test_bad_records_are_named(name, changes, message, monkeypatch):
    source = registry.get(name)
    monkeypatch.setattr(source, "table", lambda split: OneRow(**changes))
    with pytest.raises(InputError, match=message):
        source.examples("train", 0)


def test_labels_out_of_range_and_empty_texts_are_named(tokenizer, benchmarks):
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


def test_classes_that_the_data_name_otherwise_are_refused(benchmarks):
    task = registry.get("superglue_cb").task
    other = dataclasses.replace(task, classes=("entailment", "neutral", "contradiction"))
    with pytest.raises(
        InputError,
        match="the data in .*super_glue/cb/1.0.2 have the classes entailment, contradiction, neutral; expected entailment, neutral",
    ):
        TfdsSource(other, DataOptions(), "super_glue/cb:1.0.2").examples("train", 0)


# From raw records to a submission


@pytest.fixture(scope="module")
def predicted(tables, tmp_path_factory):
    """A workdir with the predictions of a stand-in model for all test splits, and what it said: by task and split, (idx, output)."""
    workdir, said = tmp_path_factory.mktemp("predicted"), {}
    for name in NAMES:
        task = registry.get(name).task
        for split in [split for split in registry.get(name).splits if split.startswith("test")]:
            batches, table = tables(name, split)
            scores = (
                np.random.default_rng(len(said))
                .standard_normal((len(table.labels), task.num_outputs))
                .astype(np.float32)
                * 2
            )

            def forward(batch, task=task, scores=scores):
                return {task.head: scores[batch.example_id]}, batch.example_id, batch.weight

            outputs = predict_split(task, iter(batches), forward)
            Predictions(task, split, outputs, table).write(workdir / "predictions")
            said[name, split] = [
                (info, table.query_ids[i], outputs[i]) for i, info in enumerate(table.infos)
            ]
    return workdir, said


SIZES = {
    "glue": {file.name: official.TEST for file in leaderboards.BENCHMARKS["glue"]},
    "superglue": {file.name: official.TEST for file in leaderboards.BENCHMARKS["superglue"]}
    | {"MultiRC.jsonl": 10},
}


@pytest.mark.parametrize("benchmark", ["glue", "superglue"])
def test_a_submission_says_what_the_model_said(benchmark, predicted):
    workdir, said = predicted
    content = submission.make_submission(benchmark, [workdir])
    assert submission.check_submission(content, benchmark, SIZES[benchmark]) == SIZES[benchmark]
    read = submission.read_submission(content, benchmark)
    words = {
        "CoLA.tsv": ("0", "1"),
        "SST-2.tsv": ("0", "1"),
        "MRPC.tsv": ("0", "1"),
        "QQP.tsv": ("0", "1"),
        "WNLI.tsv": ("0", "1"),
        "MNLI-m.tsv": ("entailment", "neutral", "contradiction"),
        "MNLI-mm.tsv": ("entailment", "neutral", "contradiction"),
        "AX.tsv": ("entailment", "neutral", "contradiction"),
        "QNLI.tsv": ("entailment", "not_entailment"),
        "RTE.tsv": ("entailment", "not_entailment"),
        "RTE.jsonl": ("entailment", "not_entailment"),
        "AX-b.jsonl": ("entailment", "not_entailment"),
        "AX-g.jsonl": ("entailment", "not_entailment"),
        "BoolQ.jsonl": ("false", "true"),
        "WiC.jsonl": ("false", "true"),
        "WSC.jsonl": ("False", "True"),
        "CB.jsonl": ("entailment", "contradiction", "neutral"),
        "MultiRC.jsonl": (0, 1),
    }
    for file in leaderboards.BENCHMARKS[benchmark]:
        lines = said[file.task, file.split]
        if file.name == "STS-B.tsv":
            expected = {info["idx"]: f"{min(max(output, 0), 5):.3f}" for info, _, output in lines}
        elif file.name in ("COPA.jsonl", "ReCoRD.jsonl"):
            expected = {}
            for question in {query for _, query, _ in lines}:
                options = [
                    (output, -place, info)
                    for place, (info, query, output) in enumerate(
                        i for i in lines if i[1] == question
                    )
                ]
                _, place, info = max(options, key=lambda option: option[:2])
                expected[info["idx"]] = -place if file.name == "COPA.jsonl" else info["option"]
        else:
            expected = {
                tuple(info["idx"].values())
                if isinstance(info["idx"], dict)
                else info["idx"]: words[file.name][int(output.argmax())]
                for info, _, output in lines
            }
        assert read[file.name] == expected, file.name


def test_the_files_look_as_the_leaderboards_want_them(predicted):
    workdir, _ = predicted
    with zipfile.ZipFile(io.BytesIO(submission.make_submission("glue", [workdir]))) as archive:
        assert set(archive.namelist()) == {
            f"{name}.tsv"
            for name in [
                "CoLA",
                "SST-2",
                "MRPC",
                "STS-B",
                "MNLI-m",
                "MNLI-mm",
                "QNLI",
                "QQP",
                "RTE",
                "WNLI",
                "AX",
            ]
        }
        lines = archive.read("AX.tsv").decode().splitlines()
        assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [
            "0",
            "1",
            "2",
            "3",
        ]
    with zipfile.ZipFile(io.BytesIO(submission.make_submission("superglue", [workdir]))) as archive:
        assert set(archive.namelist()) == {
            f"{name}.jsonl"
            for name in [
                "BoolQ",
                "CB",
                "COPA",
                "MultiRC",
                "ReCoRD",
                "RTE",
                "WiC",
                "WSC",
                "AX-b",
                "AX-g",
            ]
        }
        first = json.loads(archive.read("MultiRC.jsonl").decode().splitlines()[0])
        assert first.keys() == {"idx", "passage"} and [
            question["idx"] for question in first["passage"]["questions"]
        ] == [0, 1]
        assert [answer["idx"] for answer in first["passage"]["questions"][1]["answers"]] == [3, 4]
        assert all(
            json.loads(line).keys() == {"idx", "label"}
            for line in archive.read("ReCoRD.jsonl").decode().splitlines()
        )


def test_missing_and_ambiguous_predictions_are_named(predicted, tmp_path):
    workdir, _ = predicted
    with pytest.raises(InputError, match="two workdirs"):
        submission.make_submission("glue", [workdir, workdir])
    with pytest.raises(
        InputError,
        match=r"no predictions of glue_cola.test, .*glue_mnli.test_matched.*--config.evaluate_split=test",
    ):
        submission.make_submission("glue", [tmp_path])
    with pytest.raises(InputError, match="did you mean 'superglue'"):
        submission.make_submission("superglu", [workdir])


def test_the_real_sizes_are_asked_of_a_submission(predicted, tmp_path, capsys):
    workdir, _ = predicted
    assert (
        submit.main(["make", "--benchmark=superglue", f"--output={tmp_path}/s.zip", str(workdir)])
        == 2
    )
    assert "BoolQ.jsonl holds 4 predictions, expected 3245" in capsys.readouterr().err
    assert not (tmp_path / "s.zip").exists()
