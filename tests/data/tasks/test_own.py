"""Files of users: each format from file to batch, and inferred options."""

import subprocess
import sys

import numpy as np
import pytest

from gemma_encoder.data import cache
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import own_cells
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.template import encode
from tests.data.tasks.own_files import RANKED, everything, source, write

FORMATS = ("jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz", "tsv.gz")
AWKWARD = ['she said "no", twice', "a\u2028b — naïve 漢字", " padded ", "it's, fine", "\u00a0x"]


def batches(made, tokenizer, split="validation"):
    table = ExampleTable()
    return list(
        evaluation_stream(made, 0, split, tokenizer, StreamOptions(BatchShape(4, 64, 4), 64), table)
    ), table


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_file_to_batch(tmp_path, tokenizer, kind):
    rows = [
        {"text": text, "label": label}
        for text, label in zip(AWKWARD * 6, ["pos", "neg", "neutral"] * 10, strict=True)
    ]
    made = source(
        write(tmp_path / f"train.{kind}", rows),
        validation=write(tmp_path / f"dev.{kind}", rows[:11]),
    )
    assert (
        made.task.classes == ("neg", "neutral", "pos")
        and made.task.template.text == "{text}"
        and made.task.metrics == ("accuracy", "macro_f1")
    )
    assert [[(e.fields, e.label) for e in record] for record in everything(made, "train")] == [
        [({"text": row["text"]}, ["neg", "neutral", "pos"].index(row["label"]))] for row in rows
    ]
    read, table = batches(made, tokenizer)
    assert table.labels == [["neg", "neutral", "pos"].index(row["label"]) for row in rows[:11]]
    tokens = {}
    for batch in read:
        for row, slot in zip(*np.nonzero(batch.weight), strict=True):
            tokens[int(batch.example_id[row, slot])] = batch.tokens[row][
                batch.segment_ids[row] == slot + 1
            ]
            assert batch.label[row, slot] == table.labels[batch.example_id[row, slot]]
    for index, row in enumerate(rows[:11]):
        np.testing.assert_array_equal(
            tokens[index], encode(tokenizer, made.task.template, [row], 64)[0].tokens
        )
    assert (
        next(
            TrainStream([made], np.ones(1), tokenizer, StreamOptions(BatchShape(4, 64, 4), 64))
        ).weight.sum()
        == 16
    )


@pytest.mark.parametrize("kind", FORMATS[:4])
def test_pairs_and_targets(tmp_path, kind):
    rows = [
        {"id": i, "Premise text": f"first {i}", "hypothesis": f"second {i}", "score": i / 2}
        for i in range(12)
    ]
    made = source(
        write(tmp_path / f"t.{kind}", rows), kind="regression", label="score", held_out=0.25
    )
    task = made.task
    assert (
        task.template.text == "Premise_text: {Premise_text} hypothesis: {hypothesis}"
    )  # the id is not part of the text
    assert task.label_range == (0.0, 5.5) and task.metrics[:3] == ("spearman", "pearson", "mae")
    assert made.size("train") == 9 and made.size("validation") == 3
    both = [
        e for split in ("train", "validation") for record in everything(made, split) for e in record
    ]
    assert sorted(e.label for e in both) == [i / 2 for i in range(12)]
    assert all(
        e.fields
        == {
            "Premise_text": f"first {round(e.label * 2)}",
            "hypothesis": f"second {round(e.label * 2)}",
        }
        for e in both
    )


@pytest.mark.parametrize("kind", FORMATS[:4])
@pytest.mark.parametrize("ids", [True, False])
def test_ranking_rows_become_lists(tmp_path, tokenizer, kind, ids):
    rows = (
        RANKED
        if ids
        else [
            {name: value for name, value in row.items() if not name.endswith("_id")}
            for row in RANKED
        ]
    )
    made = source(
        write(tmp_path / f"t.{kind}", rows),
        {"list_size": 4},
        kind="ranking",
        validation=write(tmp_path / f"v.{kind}", rows),
    )
    assert (
        made.task.template.text == "Query: {query} Document: {document}"
        and made.task.template.truncation == ("document",)
    )
    validation = everything(made, "validation")
    assert [[e.fields["document"] for e in record] for record in validation] == [
        [f"document {d} of {q}" for d in range(6)] for q in range(8)
    ]
    assert len({(e.query_id, e.document_id) for record in validation for e in record}) == 48
    if ids:
        assert [(e.query_id, e.document_id, e.label) for e in validation[3]] == [
            ("q3", f"d{d}", [2, 1, 0, 0, 0, 0][d]) for d in range(6)
        ]
    firsts = set()
    for draw in range(20):
        drawn = made.examples("train", 3, np.random.default_rng(draw))
        assert (
            len(drawn) == 4 and drawn[0].label > 0 and all(e.label == 0 for e in drawn[1:])
        )  # the other positive is not used as a negative
        firsts.add(drawn[0].fields["document"])
    assert firsts == {"document 0 of 3", "document 1 of 3"}
    _, table = batches(made, tokenizer)
    assert len(table.labels) == 48
    batch = next(
        TrainStream([made], np.ones(1), tokenizer, StreamOptions(BatchShape(8, 64, 4, 2, 4), 64))
    )
    assert sorted(batch.list_slot[batch.group_id == 0]) == [0, 1, 2, 3]


def test_held_out_records_are_fixed_and_disjoint(tmp_path, caplog):
    path = write(
        tmp_path / "t.csv", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(50)]
    )

    def texts(split):
        return {record[0].fields["text"] for record in everything(source(path), split)}

    parts = [{split: texts(split) for split in ("train", "validation")} for _ in range(2)]
    assert parts[0] == parts[1] and not parts[0]["train"] & parts[0]["validation"]
    assert len(parts[0]["train"]) == 45 and len(parts[0]["validation"]) == 5
    assert (
        "5 of 50 records" in caplog.text
        and "classes a, b" in caplog.text
        and "template '{text}'" in caplog.text
    )
    ranked = source(write(tmp_path / "r.csv", RANKED), kind="ranking", held_out=0.5)
    queries = [
        {e.query_id for record in everything(ranked, split) for e in record}
        for split in ("train", "validation")
    ]
    assert (
        len(queries[0]) == len(queries[1]) == 4 and not queries[0] & queries[1]
    )  # queries are not split
    with pytest.raises(
        InputError,
        match=r"2 records are too few to hold out 10% for validation; set own.validation",
    ):
        source(
            write(tmp_path / "few.csv", [{"text": "a", "label": "a"}, {"text": "b", "label": "b"}])
        )


def test_options_override_inferred_values(tmp_path):
    rows = [{"a": f"x {i}", "b": f"y {i}", "note": "n", "gold": i % 2} for i in range(20)]
    path = write(tmp_path / "t.jsonl", rows)
    made = source(
        path,
        fields=("b", "a"),
        label="gold",
        classes=("no", "yes"),
        template="is {b} like {a} ?",
        truncation=("b",),
        metrics=("f1",),
    )
    assert made.task.template.text == "is {b} like {a} ?" and made.task.template.truncation == (
        "b",
    )
    assert made.task.classes == ("no", "yes") and made.task.metrics == ("f1",)
    assert {(e.fields["a"][2:], e.label) for (e,) in everything(made, "train")} <= {
        (str(i), i % 2) for i in range(20)
    }
    inferred = source(path, fields=("a",), label="gold")
    assert inferred.task.classes == ("0", "1")
    many = write(tmp_path / "many.csv", [{"text": "t", "label": i} for i in (10, 9, 2)] * 8)
    assert source(many).task.classes == ("2", "9", "10")  # sorted numerically


def test_a_test_file_needs_no_labels(tmp_path):
    train = write(
        tmp_path / "t.csv", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    )
    made = source(train, test=write(tmp_path / "test.csv", [{"text": "unknown"}]))
    assert [
        [(e.fields["text"], e.label) for e in record] for record in everything(made, "test")
    ] == [[("unknown", -1)]]
    assert made.splits == ("train", "validation", "test")


def test_a_test_file_of_queries_needs_no_grades(tmp_path):
    unjudged = [{name: value for name, value in row.items() if name != "label"} for row in RANKED]
    made = source(
        write(tmp_path / "t.csv", RANKED),
        kind="ranking",
        test=write(tmp_path / "test.csv", unjudged),
    )
    assert {e.label for record in everything(made, "test") for e in record} == {-1}
    assert made.qrels("test") == {} and made.qrels("validation") is None


def test_untrainable_queries_are_counted_and_evaluated(tmp_path, caplog):
    same_label = {"q2": 0, "q5": 1}
    rows = [row | {"label": same_label.get(row["query_id"], row["label"])} for row in RANKED]
    path = write(tmp_path / "t.csv", rows)
    made = source(path, kind="ranking", validation=path)
    assert made.size("train") == 6 and made.size("validation") == 8
    assert "2 of 8 train queries have no positive or no negative and are skipped" in caplog.text


def test_a_limit_selects_the_first_records(tmp_path):
    path = write(
        tmp_path / "t.csv", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(30)]
    )
    made = source(path, {"max_train_examples": 4, "max_eval_examples": 2}, validation=path)
    assert [record[0].fields["text"] for record in everything(made, "train")] == [
        f"text {i}" for i in range(4)
    ] and made.size("validation") == 2


def test_the_cached_table_of_a_large_file_follows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEEP_FROM", 0)
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(30)]
    path = write(tmp_path / "t.csv", rows)
    first = everything(source(path, validation=path), "train")
    with monkeypatch.context() as patch:
        patch.setattr(own_cells, "read_text", None)  # not parsed again
        assert everything(source(path, validation=path), "train") == first
    write(path, [row | {"text": row["text"].upper()} for row in rows])
    assert everything(source(path, validation=path), "train")[0][0].fields["text"] == "TEXT 0"


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufefftext,label\n".encode() + b"a,x\nb,y\n" * 10)
    assert source(tmp_path / "t.csv").task.template.text == "{text}"


def test_small_tables_do_not_import_pandas(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    code = (
        "import sys\nfrom gemma_encoder.data import registry\n"
        "from gemma_encoder.data.source import DataOptions\n"
        f"made = registry.get('own', DataOptions(own={{'train': {str(tmp_path / 't.csv')!r}}}))\n"
        "made.examples('train', 3)\n"
        "sys.exit('pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
