"""Prepared tasks: what training and evaluation read is what they would read raw, to the bit; and what does not fit is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from gemma_encoder.data import prepared
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import TrainStream, average_examples
from gemma_encoder.data.prepared import Part, PreparedSource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer

TASKS = {
    "classes": Task("classes", "classification", Template("{x}"), ("accuracy",), ("a", "b")),
    "targets": Task(
        "targets", "regression", Template("a {x}"), ("spearman",), label_range=(0.0, 10.0)
    ),
    "lists": Task(
        "lists", "ranking", Template("{query} {document}", cut=("document",)), ("mrr@10",)
    ),
}
DATA = DataOptions(list_size=3)  # the lists hold five documents: three are sampled
OPTIONS = StreamOptions(
    BatchShape(rows=8, row_length=64, segments=4, groups=4, list_size=3),
    max_length=12,
    readers=4,
    seed=5,
)
RATES = np.array([0.4, 0.3, 0.3])
EPOCHS = 6


def records(split):
    """Of each task: texts, of which some are cut; targets; lists, of which one in seven has nothing to learn from."""
    size = 40 if split == "train" else 21
    rng = np.random.default_rng(size)
    return {
        "classes": [
            [
                Example(
                    {"x": f"número {i} " + "and more " * int(rng.integers(0, 9))},
                    i % 2,
                    info={"idx": i},
                )
            ]
            for i in range(size)
        ],
        "targets": [[Example({"x": f"target of {i}"}, i / 4)] for i in range(size)],
        "lists": [
            [
                Example(
                    {"query": f"query {i}", "document": f"document {j}"},
                    float(j < 2),
                    f"q{i}",
                    f"d{j}",
                )
                for j in range(5)
            ]
            for i in range(size)
        ],
    }


class Lists(MemorySource):
    """With judgements, and with records that training skips."""

    def expand(self, record, split, rng):
        if rng is not None and int(record["number"]) % 7 == 0:
            return []
        return super().expand(record, split, rng)

    def qrels(self, split):
        return {"q0": {"d0": 2.0, "unseen": 1.0}}


def raw(name, options=DATA):
    return (Lists if name == "lists" else MemorySource)(
        TASKS[name], options, lambda split: records(split)[name]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("small")


def write(source, tokenizer, root, options=OPTIONS, epochs=EPOCHS):
    folder = root / source.task.name
    if prepared.begin(folder, prepared.describe(source, tokenizer, options, epochs)):
        for part in prepared.parts(source, options.readers, epochs):
            prepared.write(source, part, tokenizer, options, folder)
        prepared.finish(folder)
    return folder


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory):
    """A folder with the three tasks prepared."""
    root = tmp_path_factory.mktemp("prepared")
    for name in TASKS:
        write(raw(name), tokenizer, root)
    return root


def read(root):
    return [PreparedSource(name, root, DATA) for name in TASKS]


def take(sources, tokenizer, count, **arguments):
    return list(
        itertools.islice(TrainStream(sources, RATES, tokenizer, OPTIONS, **arguments), count)
    )


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_training_sees_the_same_batches(root, tokenizer, process, processes):
    straight = take(
        [raw(name) for name in TASKS], tokenizer, 8, process=process, processes=processes
    )
    assert_equal(straight, take(read(root), tokenizer, 8, process=process, processes=processes))
    assert len({int(i) for batch in straight for i in np.unique(batch.task_id)}) == 3


def test_counts_and_the_measured_batch_are_the_same(root, tokenizer):
    streams = [
        TrainStream(sources, RATES, tokenizer, OPTIONS, prefetch=1)
        for sources in ([raw(name) for name in TASKS], read(root))
    ]
    for stream in streams:
        list(itertools.islice(stream, 5))
        stream.close()
        stream._thread.join()
    assert streams[0].counts == streams[1].counts and streams[0].counts["classes"]["cut_texts"]
    assert average_examples(
        [raw(name) for name in TASKS], RATES, tokenizer, OPTIONS, 4
    ) == average_examples(read(root), RATES, tokenizer, OPTIONS, 4)


def test_a_restored_stream_goes_on_exactly(root, tokenizer):
    straight = take(read(root), tokenizer, 8)
    first = TrainStream(read(root), RATES, tokenizer, OPTIONS)
    before = list(itertools.islice(first, 3))
    second = TrainStream(read(root), RATES, tokenizer, OPTIONS)
    second.restore(first.state())
    assert_equal(straight, before + list(itertools.islice(second, 5)))


def test_restoring_does_not_read_from_the_start(tokenizer, tmp_path):
    long = MemorySource(
        TASKS["classes"],
        DATA,
        lambda split: [[Example({"x": f"{i} " + "word " * 60}, 0)] for i in range(4000)],
    )
    options = StreamOptions(BatchShape(2, 64, 1), max_length=64)
    folder = write(long, tokenizer, tmp_path, options, epochs=1)
    first = TrainStream([PreparedSource("classes", tmp_path, DATA)], np.ones(1), tokenizer, options)
    list(itertools.islice(first, 1600))
    second = TrainStream(
        [PreparedSource("classes", tmp_path, DATA)], np.ones(1), tokenizer, options
    )
    state, after = first.state(), list(itertools.islice(first, 20))
    file = folder / "train/epoch_000/reader_00000"
    content = file.read_bytes()
    file.write_bytes(
        b"\0" * (len(content) // 2) + content[len(content) // 2 :]
    )  # whoever reads this finds that it is broken
    second.restore(state)
    assert_equal(after, list(itertools.islice(second, 20)))


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_sees_the_same_batches_and_the_same_table(root, tokenizer, name):
    found = []
    for source in (raw(name), PreparedSource(name, root, DATA)):
        table = ExampleTable()
        found.append(
            (
                list(evaluation_stream(source, 0, "validation", tokenizer, OPTIONS, table)),
                table,
                source.qrels("validation"),
            )
        )
    (batches, table, qrels), (again, table_again, qrels_again) = found
    assert_equal(batches, again)
    assert dataclasses.replace(table, infos=[dict(info) for info in table.infos]) == table_again
    assert qrels == qrels_again


def test_a_prepared_task_needs_no_raw_data(root):
    for source in read(root):
        assert source.task == TASKS[source.task.name]
        assert (
            source.num_records("train") == 40
            and source.seqio_task("train").num_input_examples("train") == 40
        )


def test_writing_goes_on_where_it_stopped(tokenizer, tmp_path):
    source = raw("classes")
    folder, description = tmp_path / "classes", prepared.describe(source, tokenizer, OPTIONS, 1)
    assert prepared.begin(folder, description)
    assert prepared.write(source, Part("train", 0, 1), tokenizer, OPTIONS, folder)["texts"] == 10
    (folder / "train/epoch_000/reader_00002.part").write_bytes(b"half a")
    with pytest.raises(InputError, match="is not whole: the program that prepares it did not end"):
        PreparedSource("classes", tmp_path, DATA)
    kept = (folder / "train/epoch_000/reader_00001").stat().st_mtime_ns
    write(source, tokenizer, tmp_path, epochs=1)
    assert (folder / "train/epoch_000/reader_00001").stat().st_mtime_ns == kept
    assert PreparedSource("classes", tmp_path, DATA).info["epochs"] == 1
    assert not prepared.begin(folder, description), "it is whole"
    write(source, tokenizer, tmp_path, epochs=2)  # more epochs are added to what is there
    assert PreparedSource("classes", tmp_path, DATA).info["epochs"] == 2
    assert (folder / "train/epoch_000/reader_00001").stat().st_mtime_ns == kept


def test_what_does_not_fit_is_refused(root, tokenizer, tmp_path):
    with pytest.raises(
        InputError,
        match="'nothing': the prepared folder .* does not exist; run gemma-encoder prepare",
    ):
        PreparedSource("nothing", root, DATA)
    for change, message in (
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"readers": 2}, "readers: 4 -> 2"),
        ({"max_length": 13}, "max_length: 12 -> 13"),
    ):
        with pytest.raises(InputError, match=f"prepared for another config: {message}"):
            prepared.check_prepared(read(root), tokenizer, dataclasses.replace(OPTIONS, **change))
    other = PreparedSource("classes", root, DataOptions(list_size=4))
    with pytest.raises(InputError, match="options.list_size: 3 -> 4"):
        prepared.check_prepared([other], tokenizer, OPTIONS)
    with pytest.raises(InputError, match="prepared differently .*seed: 5 -> 6"):
        prepared.begin(
            root / "classes",
            prepared.describe(raw("classes"), tokenizer, dataclasses.replace(OPTIONS, seed=6), 1),
        )
    with pytest.raises(
        InputError, match="holds 6 epochs and training wants another; prepare more with --epochs=7"
    ):
        read(root)[0].training_epoch(5, EPOCHS, 0, 4)
    with pytest.raises(InputError, match="has no dev split"):
        read(root)[0].dataset("dev")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepared.begin(tmp_path / "file" / "classes", {})


def test_a_mixture_whose_tasks_disagree_on_a_tokenizer_is_refused(root, tokenizer, tmp_path):
    info = json.loads((root / "classes" / prepared.INFO).read_text())
    info["tokenizer"] = {"name": "other", "sha256": "0" * 64}
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info))
    sources = [read(root)[1], PreparedSource("classes", tmp_path, DATA)]
    with pytest.raises(
        InputError,
        match="share one tokenizer; prepared were 'targets' with 'small' .* and 'classes' with 'other'",
    ):
        prepared.check_prepared(sources, tokenizer, OPTIONS)
    (tmp_path / "classes" / prepared.INFO).write_text(json.dumps(info | {"version": 0}))
    with pytest.raises(InputError, match="is of version 0, this program reads 1; prepare it anew"):
        PreparedSource("classes", tmp_path, DATA)


def test_a_bad_record_is_named(tokenizer, tmp_path):
    broken = MemorySource(
        TASKS["classes"],
        DATA,
        lambda split: [[Example({"x": "fine"}, 0)], [Example({"x": " "}, 0)]],
    )
    with pytest.raises(InputError, match="validation record 2: the text is empty"):
        prepared.write(broken, Part("validation"), tokenizer, OPTIONS, tmp_path)
    assert not (tmp_path / "validation").exists()
