"""The user's own files: each format from file to Batch, what is read off them, and every refusal."""

import gzip
import json
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_encoder.data import cache, registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.files import rows as row_files
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks import own_cells, own_columns
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

FORMATS = ("jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz", "tsv.gz")
AWKWARD = ['she said "no", twice', "a\u2028b — naïve 漢字", " padded ", "it's, fine", "\u00a0x"]


def write(path, rows):
    """Rows (dictionaries) in the format that the path's suffix names."""
    names = list(rows[0])
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if kind == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "tsv":
        content = "".join(
            "\t".join(str(value) for value in values) + "\n"
            for values in [names, *(row.values() for row in rows)]
        )
    else:
        content = "".join(
            ",".join('"' + str(value).replace('"', '""') + '"' for value in values) + "\r\n"
            for values in [names, *(row.values() for row in rows)]
        )
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def source(train, limits=None, **options):
    return registry.get(
        "own",
        DataOptions(
            own={
                "train": str(train),
                **{k: str(v) if k in ("validation", "test") else v for k, v in options.items()},
            },
            **(limits or {}),
        ),
    )


def everything(made, split):
    return [made.examples(split, number) for number in range(made.size(split))]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("small")


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
    for number, row in enumerate(rows[:11]):
        np.testing.assert_array_equal(
            tokens[number], encode(tokenizer, made.task.template, [row], 64)[0].tokens
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
    )  # the id is no text
    assert task.label_range == (0.0, 5.5) and task.metrics == ("spearman", "pearson")
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


RANKED = [
    {
        "query_id": f"q{q}",
        "query": f"query {q}",
        "document_id": f"d{d}",
        "document": f"document {d} of {q}",
        "label": (d == 0) * 2 + (d == 1),
    }
    for d in range(6)
    for q in range(8)
]  # the rows of a query do not stand together


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
        )  # the other positive is no negative
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
    parts = [
        {
            split: {r[0].fields["text"] for r in everything(source(path), split)}
            for split in ("train", "validation")
        }
        for _ in range(2)
    ]
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
    )  # a query is on one side, whole
    with pytest.raises(
        InputError,
        match=r"2 records are too few to hold out 10% for validation; set own.validation",
    ):
        source(
            write(tmp_path / "few.csv", [{"text": "a", "label": "a"}, {"text": "b", "label": "b"}])
        )


def test_what_is_read_off_may_be_said(tmp_path):
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
    assert source(many).task.classes == ("2", "9", "10")  # numbers are sorted as numbers


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


def test_queries_that_cannot_train_are_counted_and_still_evaluated(tmp_path, caplog):
    rows = [
        row | {"label": 0}
        if row["query_id"] == "q2"
        else row | {"label": 1}
        if row["query_id"] == "q5"
        else row
        for row in RANKED
    ]
    path = write(tmp_path / "t.csv", rows)
    made = source(path, kind="ranking", validation=path)
    assert made.size("train") == 6 and made.size("validation") == 8
    assert "2 of 8 train queries have no positive or no negative and are skipped" in caplog.text


def test_a_limit_takes_the_first_records(tmp_path):
    path = write(
        tmp_path / "t.csv", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(30)]
    )
    made = source(path, {"max_train_examples": 4, "max_eval_examples": 2}, validation=path)
    assert [record[0].fields["text"] for record in everything(made, "train")] == [
        f"text {i}" for i in range(4)
    ] and made.size("validation") == 2


def test_a_large_file_is_kept_as_a_table_that_follows_it(tmp_path, monkeypatch):
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


CSV = "text,label\ngood,pos\nbad,neg\n"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.csv", "", {}, r"t.csv is empty; its first line should name the columns"),
        ("t.csv", "text,label\n", {}, r"t.csv has no rows"),
        ("t.csv", "text,label\ngood\n", {}, r"t.csv:2: expected 2 columns \(text, label\), got 1"),
        (
            "t.csv",
            'text,label\n"two\nlines",pos\ngood,pos,more\n',
            {},
            r"t.csv:4: expected 2 columns \(text, label\), got 3",
        ),
        (
            "t.csv",
            'text,label\ngood,pos\n"never closed,pos\n',
            {},
            r"t.csv:3: malformed \(unexpected end of data\)",
        ),
        (
            "t.csv",
            "text,text,label\n",
            {},
            r"t.csv:1: the first line should name every column, and none twice",
        ),
        ("t.csv", "text,,label\n", {}, r"t.csv:1: the first line should name every column"),
        (
            "t.csv",
            b"text,label\ngood,pos\nb\xffd,neg\n",
            {},
            r"t.csv:3: not valid UTF-8 \(invalid start byte at byte 1 of the line\)",
        ),
        (
            "t.csv",
            CSV,
            {"label": "lable"},
            r"t.csv has no column 'lable', which own.label names; it has 'text', 'label'",
        ),
        (
            "t.csv",
            CSV,
            {"fields": ("txt",)},
            r"t.csv has no column 'txt', which own.fields names; it has 'text', 'label'",
        ),
        ("t.csv", "label\npos\n", {}, r"set own.fields to those of a text"),
        ("t.csv", "a b,a-b,label\n", {}, r"'a b', 'a-b' have the same names"),
        (
            "t.csv",
            CSV,
            {"template": "{txt}"},
            r"own.template '\{txt\}' names 'txt', which is not among the fields text",
        ),
        ("t.csv", CSV + " ,pos\n", {}, r"t.csv:4: column 'text' is empty"),
        ("t.csv", CSV + "fine,\n", {}, r"t.csv:4: column 'label' is empty"),
        (
            "t.csv",
            CSV + "fine,positive\n",
            {"classes": ("neg", "pos")},
            r"t.csv:4: unknown class 'positive'; did you mean 'pos'",
        ),
        (
            "t.csv",
            "text,label\na,0\nb,2\n",
            {"classes": ("neg", "pos")},
            r"t.csv:3: unknown class '2'",
        ),
        (
            "t.csv",
            "text,label\na,pos\nb,pos\n",
            {},
            r"t.csv: all labels are 'pos'; a task of kind classification needs at least two classes",
        ),
        (
            "t.csv",
            "text,label\n" + "".join(f"a,{i}\n" for i in range(1001)),
            {},
            r"t.csv has more than 1000 distinct labels; set own.classes",
        ),
        (
            "t.csv",
            CSV,
            {"kind": "regression"},
            r"t.csv:2: column 'label' should contain a number, got 'pos'",
        ),
        (
            "t.csv",
            "text,label\na,1\nb,nan\n",
            {"kind": "regression"},
            r"t.csv:3: column 'label' should contain a number, got 'nan'",
        ),
        (
            "t.csv",
            "text,label\na,1\nb,1\n",
            {"kind": "regression"},
            r"t.csv: all targets are 1; set own.label_range",
        ),
        (
            "t.csv",
            "text,label\na,1\nb,7\n",
            {"kind": "regression", "label_range": (0.0, 5.0)},
            r"t.csv:3: target 7 is out of range; expected 0 to 5",
        ),
        (
            "t.csv",
            "query,document,label\nq,a,1\nq,b,-1\n",
            {"kind": "ranking"},
            r"t.csv:3: column 'label' should contain a number of at least 0, got '-1'",
        ),
        (
            "t.csv",
            "text,label\na,1\n",
            {"kind": "ranking"},
            r"set own.fields to those of a query and a document",
        ),
        (
            "t.csv",
            "query,document,label\nq,a,1\nr,b,1\n",
            {"kind": "ranking", "held_out": 0.5},
            r"t.csv: no query has a positive and a negative",
        ),
        (
            "t.tsv",
            "text\tlabel\ngood pos\n",
            {},
            r"t.tsv:2: expected 2 columns \(text, label\), got 1",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n{"text": "a"\n',
            {},
            r"t.jsonl:2: not a JSON object \(Expecting ',' delimiter\)",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n["a"]\n',
            {},
            r"t.jsonl:2: expected a JSON object, got",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}\n',
            {},
            r"t.jsonl:2: column 'label' is missing; the row has 'text'",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n{"text": null, "label": 0}\n',
            {},
            r"t.jsonl:2: column 'text' is null",
        ),
        (
            "t.jsonl",
            '{"text": 3, "label": 1}\n',
            {},
            r"t.jsonl:1: column 'text' should contain text, got int '3'",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": [1]}\n',
            {},
            r"t.jsonl:1: column 'label' should contain text or a whole number, got list",
        ),
        (
            "t.jsonl",
            '{"text": "a", "label": true}\n',
            {"kind": "regression"},
            r"t.jsonl:1: column 'label' should contain a number, got True",
        ),
        (
            "t.jsonl",
            '{"text": "a\\ud800", "label": 1}\n',
            {},
            r"t.jsonl:1: not valid Unicode: surrogates not allowed",
        ),
        ("t.jsonl", "\n \n", {}, r"t.jsonl is empty"),
        ("t.parquet", "text,label\n", {}, r"t.parquet: not a Parquet file"),
        (
            "t.xlsx",
            "",
            {},
            r"t.xlsx: expected a file that ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
        ),
        ("t.csv", CSV, {"validation": "nowhere.csv"}, r"nowhere.csv is not a file"),
        (
            "t.csv",
            CSV,
            {"kind": "clasification"},
            r"unknown own.kind 'clasification'; did you mean 'classification'",
        ),
        ("t.csv", CSV, {"held_out": 1.0}, r"own.held_out must be between 0 and 1"),
        ("t.csv", CSV, {"classes": ("a", "a")}, r"own.classes must be distinct names"),
        (
            "t.csv",
            CSV,
            {"label_range": (0.0, 1.0)},
            r"own.label_range is \(lowest, highest\) of a task with a range",
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, name, content, options, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        source(path, **options)
    assert "\n" not in str(error.value)


def test_the_training_file_must_be_named():
    with pytest.raises(InputError, match="own.train is not set"):
        registry.get("own", DataOptions(own={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": "another"}, r"t.csv:18: the text of query 'q0' differs from the one at .*t.csv:2"),
        ({"document_id": "d1"}, r"t.csv:18: document 'd1' appears a second time for query 'q0'"),
    ],
)
def test_ids_that_disagree_are_refused(tmp_path, change, message):
    rows = [dict(row) for row in RANKED]
    rows[16].update(change)
    path = write(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match=message):
        source(path, kind="ranking", validation=path)


def test_files_that_lack_a_column_are_named(tmp_path):
    train = write(tmp_path / "t.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(InputError, match=r"v.csv has no column 'text'; it has 'txt', 'label'"):
        source(train, validation=write(tmp_path / "v.csv", [{"txt": "a", "label": "x"}]))
    with pytest.raises(InputError, match=r"v.csv has no column 'label'; it has 'text'"):
        source(train, validation=write(tmp_path / "v.csv", [{"text": "a"}]))
    with pytest.raises(InputError, match=r"v2.csv:2: unknown class 'z'"):
        source(train, validation=write(tmp_path / "v2.csv", [{"text": "a", "label": "z"}]))


@pytest.mark.parametrize(
    ("column", "values", "kind", "message"),
    [
        (
            "text",
            [1, 2],
            "classification",
            r"t.parquet: row 1: column 'text' should contain text, got int '1'",
        ),
        (
            "text",
            [b"a", b"b"],
            "classification",
            r"t.parquet: row 1: column 'text' should contain text, got bytes",
        ),
        ("text", ["a", None], "classification", r"t.parquet: row 2: column 'text' is null"),
        (
            "label",
            [0.5, 1.0],
            "classification",
            r"t.parquet: row 1: column 'label' should contain text or a whole number, got float '0.5'",
        ),
        (
            "label",
            ["high", "low"],
            "regression",
            r"t.parquet: row 1: column 'label' should contain a number, got 'high'",
        ),
    ],
)
def test_a_parquet_column_of_the_wrong_type(tmp_path, column, values, kind, message):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]} | {column: values})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        source(tmp_path / "t.parquet", kind=kind)


def test_invalid_unicode_in_parquet(tmp_path):
    bad = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": bad, "label": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: .*'text' is not valid UTF-8"):
        source(tmp_path / "t.parquet")
    whole = tmp_path / "cut.parquet"
    pa.parquet.write_table(pa.table({"text": ["a" * 100] * 1000, "label": [0, 1] * 500}), whole)
    content = whole.read_bytes()
    whole.write_bytes(content[:20] + bytes(100) + content[120:])
    with pytest.raises(InputError, match=r"cut.parquet"):
        source(whole)


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufefftext,label\n".encode() + b"a,x\nb,y\n" * 10)
    assert source(tmp_path / "t.csv").task.template.text == "{text}"


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("classification", pa.array(["b", " a", "\u2003a\x1c"])),
        ("classification", pa.array(["b", "a", "a"], pa.large_string()).dictionary_encode()),
        ("classification", pa.array([3, 0, 12], pa.uint8())),
        ("classification", pa.array([True, False, True])),
        ("classification", pa.array([-0.0, 1.0, 2.0], pa.float32())),
        ("classification", pa.array([1e19, 1.0, 2.0])),  # beyond int64: read row by row
        ("regression", pa.array([0.1, -2.5, 7.0], pa.float32())),
        ("regression", pa.array([2**53 + 1, 1, 2])),
        ("regression", pa.array([Decimal("0.5"), Decimal("1.5"), Decimal("1.0")])),
        ("multi_label", pa.array([["x", "y"], [], ["y"]])),
    ],
)
def test_parquet_columns_are_read_as_rows_are(tmp_path, monkeypatch, kind, labels):
    monkeypatch.setattr(row_files, "BATCH", 2)
    table = pa.table({"text": ["漢字", " b ", "c"], "label": labels})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    options = {"kind": kind, "validation": tmp_path / "t.parquet"}
    by_columns = source(tmp_path / "t.parquet", **options)
    monkeypatch.setattr(own_columns, "nonblank_texts", lambda column: None)
    by_rows = source(tmp_path / "t.parquet", **options)
    assert by_columns.task == by_rows.task
    tables = [made._files["train"].table for made in (by_columns, by_rows)]
    assert tables[0].arrow.to_pylist() == tables[1].arrow.to_pylist()
    assert tables[0].summary == tables[1].summary


@pytest.mark.parametrize("bad", ["\u2003\x1c", None])
def test_a_parquet_row_of_a_later_batch_is_named(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(row_files, "BATCH", 2)
    table = pa.table({"text": ["a", "b", "c", bad, "d"], "label": [0, 1, 0, 1, 0]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: row 4: column 'text' is (empty|null)"):
        source(tmp_path / "t.parquet")


def test_plain_parquet_columns_are_not_read_by_row(tmp_path, monkeypatch):
    table = pa.table({"text": ["漢字", " b ", "c"] * 10, "label": [0, 1, 2] * 10})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    monkeypatch.setattr(own_cells, "read_text", None)
    made = source(tmp_path / "t.parquet", validation=tmp_path / "t.parquet")
    assert made.examples("train", 1)[0].fields == {"text": " b "}
    assert made.where("train", 29).endswith("t.parquet: row 30")


def test_whitespace_is_what_python_strips():
    assert "".join(filter(str.isspace, map(chr, range(0x110000)))) == own_columns.WHITESPACE


def test_small_tables_need_no_pandas(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    code = (
        "import sys\nfrom gemma_encoder.data import registry\n"
        "from gemma_encoder.data.source import DataOptions\n"
        f"made = registry.get('own', DataOptions(own={{'train': {str(tmp_path / 't.csv')!r}}}))\n"
        "made.examples('train', 3)\n"
        "sys.exit('pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
