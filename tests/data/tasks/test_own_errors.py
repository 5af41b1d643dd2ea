"""Errors in files of users."""

import io

import pandas as pd
import pytest

from gemma_encoder.data import cache, registry
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import RANKED, source, write

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
            r"t.csv:1: the first line should name no column twice; got 'text', 'text', 'label'",
        ),
        ("t.csv", ",,label\na,b,c\n", {}, r"set own.fields to the columns of the text"),
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
        ("t.csv", "label\npos\n", {}, r"set own.fields to the columns of the text"),
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
            r"t.csv:3: label '2' is not an index from 0 to 1",
        ),
        (
            "t.csv",
            "text,label\na,pos\nb,pos\n",
            {},
            r"t.csv: all labels are 'pos'; a task of kind classification needs at least two "
            r"classes",
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
            r"t.csv:3: column 'label' should contain a whole number of at least 0, got '-1'",
        ),
        (
            "t.csv",
            "text,label\na,1\n",
            {"kind": "ranking"},
            r"set own.fields to the columns of the query and the document",
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
            r"own.label_range must be \(lowest, highest\), for a kind of task with a range",
        ),
    ],
)
def test_malformed_input_is_a_one_line_error(tmp_path, name, content, options, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        source(path, **options)
    assert "\n" not in str(error.value)


def test_the_training_file_is_required():
    with pytest.raises(InputError, match="own.train is not set"):
        registry.get("own", DataOptions(own={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": "another"},
            r"t.csv:18: the text of query 'q0' differs from the one at .*t.csv:2",
        ),
        ({"document_id": "d1"}, r"t.csv:18: document 'd1' appears a second time for query 'q0'"),
    ],
)
def test_inconsistent_ids_are_errors(tmp_path, change, message):
    rows = [dict(row) for row in RANKED]
    rows[16].update(change)
    path = write(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match=message):
        source(path, kind="ranking", validation=path)


def test_missing_columns_name_the_file(tmp_path):
    train = write(tmp_path / "t.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(InputError, match=r"v.csv has no column 'text'; it has 'txt', 'label'"):
        source(train, validation=write(tmp_path / "v.csv", [{"txt": "a", "label": "x"}]))
    with pytest.raises(InputError, match=r"v.csv has no column 'label'; it has 'text'"):
        source(train, validation=write(tmp_path / "v.csv", [{"text": "a"}]))
    with pytest.raises(InputError, match=r"v2.csv:2: unknown class 'z'"):
        source(train, validation=write(tmp_path / "v2.csv", [{"text": "a", "label": "z"}]))


GRADES = "query,document,label\na,x,1\na,y,0\nb,z,{}\nb,w,0\n"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_fractional_grade_is_refused_by_its_line(tmp_path, monkeypatch, suffix, cached):
    """Training would use the fraction, evaluators would count the grade as 0."""
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEEP_FROM", 0 if cached else 1 << 30)
    frame = pd.read_csv(io.StringIO(GRADES.format("0.5")))
    path = tmp_path / f"t{suffix}"
    write = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(path),
    }[suffix]
    write()
    options = DataOptions(own={"train": str(path), "kind": "ranking", "held_out": 0.5})
    line = {".csv": ":4", ".jsonl": ":3", ".parquet": ": row 3"}[suffix]
    message = rf"t{suffix}{line}: column 'label' should contain a whole number .*0\.5"
    with pytest.raises(InputError, match=message):
        registry.get("own", options)
    frame["label"] = [1.0, 0.0, 2.0, 0.0]  # whole, whatever their type
    write()
    assert registry.get("own", options).count("train") == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["classification", "multi_label"])
def test_a_class_with_the_separator_of_tables_is_refused(tmp_path, suffix, kind):
    labels = [["a\x1fb"], ["c"]] if kind == "multi_label" else ["a\x1fb", "c"]
    rows = [{"text": f"text {i}", "label": labels[i % 2]} for i in range(20)]
    with pytest.raises(InputError, match=r"1: column 'label' contains a class with the control"):
        source(write(tmp_path / f"t.{suffix}", rows), kind=kind)


@pytest.mark.parametrize("value", ['"' + "a long text " * 99 + '"', "9" * 400])
def test_long_values_are_shortened_in_messages(tmp_path, value):
    (tmp_path / "t.jsonl").write_text(f'{{"text": "a", "label": {value}}}\n')
    with pytest.raises(InputError, match="t.jsonl:1: .*should contain a number, got .*…$") as error:
        source(tmp_path / "t.jsonl", kind="regression")
    assert len(str(error.value)) < 200 + len(str(tmp_path))
