"""SuperGLUE's special texts, its options as lists, and errors in its records."""

import dataclasses

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.pipeline import Reader, TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import superglue
from gemma_encoder.data.tfds import TfdsSource
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from tests import official

TRAINING = StreamOptions(
    BatchShape(rows=2, row_length=128, segments=4, groups=2, list_size=4), max_length=64
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
def test_the_intended_pronoun_is_marked(record, marked):
    text, (_, noun), (pronoun_index, pronoun), right = record
    (example,) = superglue._wsc(
        {
            "text": text,
            "noun": noun,
            "pronoun": pronoun,
            "pronoun_index": pronoun_index,
            "label": float(right),
            "idx": 0,
        }
    )
    assert example.fields == {"text": marked, "noun": noun} and example.label == right


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_examples_identify_questions_options_and_pairs(split, benchmarks):
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
        info = example.info
        kind = int(example.query_id) % 3
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


def train_lists(name, tokenizer, options=TRAINING, batches=6, **data):
    """Returns the lists of the first training batches, as (label, text) of their options."""
    source = registry.get(name, DataOptions(list_size=options.shape.list_size, **data))
    stream = TrainStream([source], np.ones(1), tokenizer, options)
    lists = []
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


def test_training_lists_have_one_correct_option_first(tokenizer, benchmarks):
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
        )  # of four entities, one or two are correct
        assert len({text for _, text in options}) == len(options)
        assert not any("nobody" in text for _, text in options)  # unanswerable
    two_right = [options for options in record if "Oslo▁knows" in options[0][1]]
    assert {"Bob" in options[0][1].partition("passage")[0] for options in two_right} == {
        True,
        False,
    }  # both are sampled, neither is a negative
    assert all(
        "Ann▁Lee▁" not in text.partition("passage")[0] and "Bob" not in text.partition("passage")[0]
        for options in two_right
        for _, text in options[1:]
    )


def test_unanswerable_questions_are_skipped_with_a_warning(tokenizer, benchmarks, caplog):
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


def test_only_unanswerable_questions_are_an_error(tokenizer, benchmarks):
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
            "contain the pronoun 'she'",
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
def test_malformed_records_are_named(name, changes, message, monkeypatch):
    source = registry.get(name)
    monkeypatch.setattr(source, "table", lambda split: OneRow(**changes))
    with pytest.raises(InputError, match=message):
        source.examples("train", 0)
