"""Files of users with several classes per row, or ordinal classes, from file to batch."""

import json

import numpy as np
import pandas
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable

TOPICS = [["sport"], [], ["news", "sport"], ["art, music", "news"]]
STARS = ["1", "10", "2", "3"]


def source(train, **options):
    own = {"train": str(train), "held_out": 0.25} | options
    return registry.get("own", DataOptions(own=own))


def labels(made, split="train"):
    return [made.examples(split, i)[0].label for i in range(made.size(split))]


def write_topics(folder, form):
    """Writes the same rows with lists in various forms; "art, music" has the default separator."""
    texts = [f"text {i}" for i in range(8)]
    names = TOPICS * 2
    if form == "jsonl":
        path = folder / "t.jsonl"
        rows = [{"text": text, "label": label} for text, label in zip(texts, names, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path, {}
    frame = pandas.DataFrame({"text": texts, "label": names})
    if form == "parquet":
        frame.to_parquet(folder / "t.parquet")
        return folder / "t.parquet", {}
    if form == "csv of python lists":
        frame.to_csv(folder / "t.csv", index=False)
        return folder / "t.csv", {}
    if form == "csv of json":
        frame["label"] = [json.dumps(label) for label in names]
        frame.to_csv(folder / "t.csv", index=False)
        return folder / "t.csv", {}
    frame["label"] = ["|".join(label) for label in names]
    frame.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv", {"separator": "|"}


@pytest.mark.parametrize(
    "form", ["jsonl", "parquet", "csv of python lists", "csv of json", "csv with a separator"]
)
def test_several_classes_from_every_format(tmp_path, form):
    path, options = write_topics(tmp_path, form)
    made = source(path, kind="multi_label", validation=str(path), **options)
    assert made.task.classes == ("art, music", "news", "sport")
    assert made.task.metrics == ("micro_f1", "macro_f1", "average_precision")
    assert labels(made) == [(2,), (), (1, 2), (0, 1)] * 2


def test_several_classes_are_targets_of_the_batch(tmp_path, tokenizer):
    path, _ = write_topics(tmp_path, "jsonl")
    made = source(
        path, kind="multi_label", validation=str(path), classes=("sport", "news", "art, music")
    )
    options = StreamOptions(BatchShape(2, 32, 4, targets=4), 32)
    table = ExampleTable()
    batches = list(evaluation_stream(made, 0, "validation", tokenizer, options, table))
    assert table.labels == [(0,), (), (0, 1), (1, 2)] * 2
    seen = {}
    for batch in batches:
        assert batch.targets.shape == (2, 4, 4)
        for row, slot in zip(*np.nonzero(batch.weight), strict=True):
            seen[int(batch.example_id[row, slot])] = batch.targets[row, slot].tolist()
            assert batch.label[row, slot] == 0
    assert [seen[i] for i in range(4)] == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    stream = TrainStream([made], np.ones(1), tokenizer, options)
    batch = next(stream)
    stream.close()
    assert batch.targets[batch.weight > 0].sum() > 0


def test_ordinal_classes_are_sorted_or_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{STARS[i % 4]}\n" for i in range(8)))
    made = source(path, kind="ordinal", validation=str(path))
    assert made.task.classes == ("1", "2", "3", "10")
    assert labels(made) == [0, 3, 1, 2] * 2
    assert made.task.metrics == ("quadratic_weighted_kappa", "mean_absolute_error")
    words = tmp_path / "w.csv"
    words.write_text("text,label\n" + "a,good\nb,bad\nc,fair\nd,bad\n")
    named = source(words, kind="ordinal", validation=str(words), classes=("bad", "fair", "good"))
    assert labels(named) == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("kind", "content", "options", "message"),
    [
        ("ordinal", "a,good\nb,bad\n", {}, r"t.csv: the order of an ordinal task's classes"),
        (
            "ordinal",
            "a,good\nb,awful\n",
            {"classes": ("bad", "good")},
            r"t.csv:3: unknown class 'awful'",
        ),
        ("multi_label", '"a","x,,y"\nb,x\n', {}, r"t.csv:2: column 'label' is empty"),
        ("multi_label", '"a","x,x"\nb,y\n', {}, r"t.csv:2: .* names a class twice: x, x"),
        ("multi_label", 'a,"[""x"""\nb,y\n', {}, r"t.csv:2: .* contains a malformed list"),
        (
            "multi_label",
            'a,"x,z"\nb,y\n',
            {"classes": ("x", "y")},
            r"t.csv:2: unknown class 'z'",
        ),
        ("multi_label", "a,x\nb,x\n", {}, "all labels are 'x'; a task of kind multi_label needs"),
        ("multi_label", "a,x\nb,y\n", {"separator": ""}, "own.separator must be at least one"),
    ],
)
def test_invalid_labels_name_file_and_line(tmp_path, kind, content, options, message):
    path = tmp_path / "t.csv"
    path.write_text(f"text,label\n{content}")
    with pytest.raises(InputError, match=message):
        source(path, kind=kind, validation=str(path), **options)


def test_a_null_class_is_an_error(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "label": ["x", null]}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(
        InputError, match=r"t.jsonl:1: column 'label' should contain text or a whole"
    ):
        source(path, kind="multi_label", validation=str(path))
