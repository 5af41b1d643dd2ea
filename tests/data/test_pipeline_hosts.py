"""Streams are the same for any number of hosts, and resume exactly."""

import dataclasses

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream, training_order
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.task import ExampleTable
from tests.data.streams import (
    CLASSES,
    LISTS,
    TARGETS,
    assert_equal,
    lists,
    take,
    targets,
    texts,
)


@st.composite
def streams(draw):
    """Draws (sources, rates, options) with eight readers and any mixture, seed and packing."""
    mixture = draw(
        st.lists(
            st.sampled_from([(CLASSES, texts), (TARGETS, targets), (LISTS, lists)]),
            min_size=1,
            max_size=2,
            unique_by=lambda pair: pair[0],
        )
    )
    rates = np.array([draw(st.floats(0.1, 1)) for _ in mixture])
    segments = draw(st.sampled_from([1, 3]))
    shape = BatchShape(
        rows=8 * draw(st.sampled_from([4, 5])),
        row_length=48 * segments,
        segments=segments,
        groups=8 * draw(st.integers(1, 2)),
        list_size=4,
    )
    options = StreamOptions(
        shape,
        48,
        readers=8,
        seed=draw(st.integers(0, 99)),
        padding=draw(st.sampled_from(["left", "right"])),
    )

    def repeated(make):
        return lambda split: 8 * make(split)

    made = [MemorySource(task, DataOptions(), repeated(make)) for task, make in mixture]
    return made, rates / rates.sum(), options


def joined(parts):
    """Concatenates the processes' parts to global batches."""
    return [
        Batch(*(np.concatenate(field) for field in zip(*blocks, strict=True)))
        for blocks in zip(*parts, strict=True)
    ]


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(streams(), st.integers(0, 3), st.data())
def test_streams_do_not_depend_on_hosts_or_restarts(tokenizer, drawn, done, data):
    mixture, rates, options = drawn
    straight = take(TrainStream(mixture, rates, tokenizer, options), 5)
    processes = data.draw(st.sampled_from([2, 4, 8]))
    parts = []
    for process in range(processes):
        first = TrainStream(
            mixture, rates, tokenizer, options, process=process, processes=processes
        )
        before = take(first, done)
        second = TrainStream(
            mixture, rates, tokenizer, options, process=process, processes=processes
        )
        state = first.state()
        assert sorted(state) == first.names
        second.restore(state)
        parts.append(before + take(second, 5 - done))
        first.close()
        second.close()
    assert_equal(straight, joined(parts))


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(streams(), st.data())
def test_evaluation_yields_each_example_once_on_any_hosts(tokenizer, drawn, data):
    (source, *_), _, options = drawn
    options = dataclasses.replace(
        options, shape=dataclasses.replace(options.shape, groups=8, list_size=1)
    )
    alone = list(evaluation_stream(source, 0, "validation", tokenizer, options, ExampleTable()))
    processes = data.draw(st.sampled_from([2, 4, 8]))
    ids = []
    for process in range(processes):
        table = ExampleTable()
        batches = list(
            evaluation_stream(
                source,
                0,
                "validation",
                tokenizer,
                options,
                table,
                process=process,
                processes=processes,
            )
        )
        ids += [int(i) for batch in batches for i in batch.example_id[batch.weight > 0]]
        assert len(batches) <= len(alone) and all(
            batch.tokens.shape[0] == options.shape.rows // processes for batch in batches
        )
    assert (
        sorted(ids)
        == list(range(len(table.labels)))
        == sorted(int(i) for batch in alone for i in batch.example_id[batch.weight > 0])
    )


@pytest.mark.parametrize("readers", [1, 2, 3, 8, 40, 64])
def test_readers_partition_each_permuted_epoch(readers):
    source = MemorySource(CLASSES, DataOptions(), texts)
    shape = BatchShape(rows=readers, row_length=64, groups=readers)

    def epochs(seed, count=3):
        options = StreamOptions(shape, 48, readers, seed=seed)
        orders = [training_order([source], np.ones(1), options, r) for r in range(readers)]
        taken = [orders[n % readers][n // readers] for n in range(40 * count)]
        return [[p.index for p in taken if p.epoch == epoch] for epoch in range(count)]

    first = epochs(seed=3)
    for order in first:
        assert sorted(order) == list(range(40))
    assert first == epochs(seed=3) and first[0] != first[1] != first[2]
    assert epochs(seed=4)[0] != first[0]
