"""Streams of batches: complete, repeatable, packed, with errors of records."""

import json
from collections import Counter

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import Reader, TrainStream, average_examples, training_order
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable
from tests.data.streams import (
    CLASSES,
    LISTS,
    OPTIONS,
    RATES,
    assert_equal,
    lists,
    sources,
    stream,
    take,
)


def test_mixtures_interleave_tasks_at_their_rates(tokenizer):
    order = training_order(sources(), RATES, OPTIONS, 0)
    tasks = np.array([order[index].task for index in range(4000)])
    assert np.bincount(tasks) / 4000 == pytest.approx(RATES, abs=1e-3)
    window = np.array([np.bincount(part, minlength=3) for part in np.split(tasks, 100)]) / 40
    assert np.abs(window - RATES).max() <= 0.05, "in every forty records"
    rare = training_order(sources(), np.array([0.001, 0.0, 0.999]), OPTIONS, 0)
    assert {rare[index].task for index in range(3000)} == {0, 2}


def test_state_is_small_and_leaves_the_stream_unchanged(tokenizer):
    first = stream(tokenizer)
    assert_equal([], take(first, 0))
    for _ in range(3):
        states = first.state()
        assert all(
            set(json.loads(state)) == {"drawn", "waiting", "counts"} for state in states.values()
        )
        assert all(len(state) < 1000 for state in states.values())
        next(first)
    first.close()
    with pytest.raises(StopIteration):
        next(first)


@pytest.mark.parametrize("segments", [1, 4])
def test_packing_does_not_change_the_examples_drawn(tokenizer, segments):
    """Batches and waiting texts together are the first draws of the epoch order.

    Hence the weight of a text does not depend on its row.
    """
    drawn = []
    for reader_segments in (segments, 1):
        shape = BatchShape(rows=8, row_length=64, segments=reader_segments, groups=4, list_size=4)
        reader = Reader(sources(), RATES, tokenizer, StreamOptions(shape, 48, seed=5), 0)
        out = []
        for _ in range(12):
            (block,) = next(reader)
            for row, slot in zip(*np.nonzero(block.weight), strict=True):
                assert block.weight[row, slot] == 1
                out.append(
                    (
                        int(block.task_id[row, slot]),
                        float(block.label[row, slot]),
                        tuple(block.tokens[row][block.segment_ids[row] == slot + 1]),
                    )
                )
        waiting = [
            (s.task_id, float(np.float32(s.label)), tuple(s.tokens))
            for unit in reader._packer.waiting
            for s in unit.segments
        ]
        drawn.append((out, waiting))
    (packed, packed_waiting), (plain, plain_waiting) = drawn
    longer = Counter(packed + packed_waiting)
    shorter = Counter(plain + plain_waiting)
    assert len(packed) >= len(plain)
    assert shorter <= longer, "the longer stream begins with the shorter one"


@pytest.mark.parametrize(("rows", "row_length"), [(16, 128), (16, 512)])
def test_at_least_95_percent_of_tokens_are_real_on_sst2(
    tokenizer, shared_data, monkeypatch, rows, row_length
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    shape = BatchShape(rows, row_length, segments=row_length // 8)
    stream = TrainStream(
        [registry.get("glue_sst2")], np.ones(1), tokenizer, StreamOptions(shape, 128)
    )
    real = [np.mean(batch.segment_ids > 0) for batch in take(stream, 40)]
    stream.close()
    assert np.mean(real) >= 0.95 and np.min(real) >= 0.9


def test_streams_depend_on_the_seed_only(tokenizer):
    assert_equal(take(stream(tokenizer), 3), take(stream(tokenizer), 3))
    other = take(stream(tokenizer, StreamOptions(OPTIONS.shape, 48, 4, seed=6)), 3)
    assert any(
        not np.array_equal(a.tokens, b.tokens)
        for a, b in zip(take(stream(tokenizer), 3), other, strict=True)
    )


def test_every_epoch_contains_each_text_once(tokenizer):
    options = StreamOptions(BatchShape(2, 64, 4), 48, readers=1)
    alone = TrainStream(sources()[:1], np.ones(1), tokenizer, options)
    seen = []
    for batch in take(alone, 40):
        for row in range(2):
            seen += [
                tuple(batch.tokens[row][batch.segment_ids[row] == s + 1])
                for s in range(4)
                if batch.weight[row, s]
            ]
    counts = {text: seen.count(text) for text in seen}
    # The packer holds some texts back, so the count of one text may run ahead or behind by one.
    assert len(counts) == 40 and max(counts.values()) - min(counts.values()) <= 2


def test_lists_are_complete_and_labels_scaled(tokenizer):
    for batch in take(stream(tokenizer), 6):
        for group in range(OPTIONS.shape.groups):
            slots = batch.list_slot[batch.group_id == group]
            assert sorted(slots) in ([], [0, 1, 2, 3])
        assert set(np.unique(batch.label[batch.task_id == 1])) <= {
            np.float32(i / 10) for i in range(11)
        }
        assert (batch.group_id >= 0).sum() == ((batch.task_id == 2) & (batch.weight > 0)).sum()


def test_average_examples_counts_a_list_once(tokenizer):
    batches = take(stream(tokenizer), 16)
    measured = average_examples(sources(), RATES, tokenizer, OPTIONS)
    counts = [
        ((b.weight > 0) & (b.group_id < 0)).sum() + len(np.unique(b.group_id[b.group_id >= 0]))
        for b in batches
    ]
    assert measured == pytest.approx(np.mean(counts), rel=0.25)  # measured on reader 0 of four


def test_truncated_texts_are_counted(tokenizer):
    table = ExampleTable()
    options = StreamOptions(BatchShape(4, 64, 4), max_length=8)
    list(evaluation_stream(sources()[0], 0, "validation", tokenizer, options, table))
    counts = table.counts["classes"]
    assert (
        counts["texts"] == 40
        and 0 < counts["cut_texts"] < 40
        and counts["cut_tokens"] >= counts["cut_texts"]
    )


def broken(example):
    return MemorySource(
        CLASSES, DataOptions(), lambda split: [[Example({"x": "fine"}, 0)], [example]]
    )


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example({"x": "  "}, 0), "the text is empty"),
        (Example({"x": "good"}, 2), "label 2 is out of range; expected a class index from 0 to 1"),
        (Example({"y": "good"}, 0), "needs the field 'x'"),
    ],
)
def test_malformed_records_name_the_record(tokenizer, example, message):
    options = StreamOptions(BatchShape(2, 64, 4), 48)
    with pytest.raises(InputError, match=f"train record .*{message}"):
        next(TrainStream([broken(example)], np.ones(1), tokenizer, options))
    with pytest.raises(InputError, match=f"validation record 2.*{message}"):
        list(
            evaluation_stream(broken(example), 0, "validation", tokenizer, options, ExampleTable())
        )


def test_invalid_stream_options_are_errors(tokenizer):
    with pytest.raises(InputError, match="multiple of the number of processes"):
        stream(tokenizer, process=0, processes=3)
    with pytest.raises(InputError, match="max_length=99 exceeds batch.row_length=64"):
        stream(tokenizer, StreamOptions(OPTIONS.shape, 99, 4))
    with pytest.raises(InputError, match="max_length=2 leaves no room"):
        stream(tokenizer, StreamOptions(OPTIONS.shape, 2, 4))
    with pytest.raises(InputError, match="cannot share"):
        stream(tokenizer, StreamOptions(OPTIONS.shape, 48, 3))
    none = MemorySource(CLASSES, DataOptions(), lambda split: [])
    with pytest.raises(InputError, match="'classes' has no train record"):
        stream_of(none, tokenizer)


def stream_of(source, tokenizer):
    options = StreamOptions(BatchShape(2, 64, 4, groups=2, list_size=4), 48, readers=2)
    return TrainStream([source], np.ones(1), tokenizer, options)


def test_a_task_may_have_fewer_records_than_readers(tokenizer):
    one = MemorySource(CLASSES, DataOptions(), lambda split: [[Example({"x": "one"}, 0)]])
    batch = next(stream_of(one, tokenizer))
    assert (batch.weight > 0).all()


def test_lists_without_both_labels_are_skipped(tokenizer):
    def mixed(split):
        made = lists(split)
        return [
            [e._replace(label=0.0) for e in record] if i % 2 else record
            for i, record in enumerate(made)
        ]

    def wrong(split):
        return [[e._replace(label=0.0) for e in record] for record in lists(split)]

    def one(split):
        return [lists(split)[0], *wrong(split)[1:]]

    batch = next(stream_of(MemorySource(LISTS, DataOptions(), one), tokenizer))
    assert (batch.group_id >= 0).any(), "even if only one has both"
    batch = next(stream_of(MemorySource(LISTS, DataOptions(), mixed), tokenizer))
    assert (batch.group_id >= 0).any()
    with pytest.raises(
        InputError, match="'lists': no train record has both a positive and a negative"
    ):
        next(stream_of(MemorySource(LISTS, DataOptions(), wrong), tokenizer))
