"""Splits of several files; JSON, Zstandard and other less common formats."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.files import rows
from gemma_encoder.data.files.paths import named_files
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.errors import InputError

ROWS = [{"text": f"text {i} — naïve", "label": "abc"[i % 3]} for i in range(30)]


def jsonl(part):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)


def zstandard(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def own(train, **options):
    return registry.get("own", DataOptions(own={"train": train, **options}))


def contents(source):
    examples = {
        split: [source.examples(split, i)[0] for i in range(source.size(split))]
        for split in source.splits
    }
    return {split: [(e.fields["text"], e.label) for e in part] for split, part in examples.items()}


@pytest.fixture
def parts(tmp_path):
    """Three files, of ten rows each."""
    for index in range(3):
        (tmp_path / f"part-{index}.jsonl").write_text(jsonl(ROWS[10 * index : 10 * index + 10]))
    return tmp_path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_of_files_need_not_be_utf_8(tmp_path, suffix):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    content = {
        "csv": "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS),
        "jsonl": jsonl(ROWS),
        "parquet": pa.BufferOutputStream(),
    }[suffix]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), content)
    else:
        content = content.encode()
    path = tmp_path / f"\udcff 日\n.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.getvalue().to_pybytes())
    assert own(str(path)).size("train") == 27


def test_a_pattern_and_a_list_read_like_one_file(parts):
    (parts / "whole.jsonl").write_text(jsonl(ROWS))
    whole = contents(own(str(parts / "whole.jsonl")))
    names = [str(parts / f"part-{index}.jsonl") for index in range(3)]
    for train in (str(parts / "part-*.jsonl"), tuple(names), repr(tuple(names)), json.dumps(names)):
        assert contents(own(train)) == whole
    pair = own(tuple(names[:2]), validation=(names[2],))
    assert (pair.size("train"), pair.size("validation")) == (20, 10)
    names = [name for name, _ in pair.fingerprints("train")]
    assert names == ["part-0.jsonl", "part-1.jsonl"]


def test_errors_name_the_file_of_the_row(parts):
    (parts / "part-1.jsonl").write_text(jsonl(ROWS[:4]) + '{"text": " ", "label": "a"}\n')
    with pytest.raises(InputError, match="part-1.jsonl:5: column 'text' is empty"):
        own(str(parts / "part-*.jsonl"))
    source = own(
        (str(parts / "part-0.jsonl"), str(parts / "part-2.jsonl")),
        validation=str(parts / "part-2.jsonl"),
    )
    assert source.where("train", 12).endswith("part-2.jsonl:3")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("()", "own.train: ..? is not a file|own.train names no file"),
        ("[]", "own.train names no file|is not a file"),
        ("(5)", r"own.train: \(5\) is not a file"),
        ("('a.json')", r"own.train: .'a.json'. is not a file"),
        ("a" * 300 + ".csv", "own.train: a{300}.csv is not a file"),
        ("part-9*.jsonl", "own.train: no file matches .*part-9"),
        ("nothing.csv", "own.train: .*nothing.csv is not a file"),
        (("part-0.jsonl", "part-?.jsonl"), "own.train: .*part-0.jsonl is named twice"),
        (
            ("part-0.jsonl", "other.csv"),
            "other.csv and .*part-0.jsonl differ in the column 'extra'",
        ),
    ],
)
def test_invalid_file_options_are_errors(parts, monkeypatch, train, message):
    monkeypatch.chdir(parts)
    (parts / "other.csv").write_text("text,label,extra\na,b,c\n")
    with pytest.raises(InputError, match=message):
        own(train)


def test_an_existing_name_with_brackets_is_no_pattern(tmp_path):
    (tmp_path / "rows[1].csv").write_text("text,label\na,b\n")
    assert named_files(str(tmp_path / "rows[1].csv"), "own.train") == [tmp_path / "rows[1].csv"]


ARRAY = json.dumps(ROWS, ensure_ascii=False)
NESTED = json.dumps([{**row, "more": {"a": [1, {"b": "]"}]}} for row in ROWS], indent=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", ARRAY.encode()),
        ("t.json", NESTED.encode()),
        ("t.json", jsonl(ROWS).encode()),
        ("t.json", ("\ufeff " + ARRAY + "\n").encode()),
        ("t.json", "".join(json.dumps(row) for row in ROWS).encode()),
        ("t.json.gz", gzip.compress(ARRAY.encode())),
        ("t.json.zst", zstandard(ARRAY.encode())),
        ("t.jsonl.zst", zstandard(jsonl(ROWS).encode())),
        (
            "t.csv.zst",
            zstandard(
                ("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS)).encode()
            ),
        ),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_json_and_compressed_files_have_the_same_rows(tmp_path, monkeypatch, name, content, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    path = tmp_path / name
    path.write_bytes(content)
    columns, records = rows.read_rows(path)
    assert {"text", "label"} <= set(columns)
    assert [{k: r.values[k] for k in ("text", "label")} for r in records] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"", "t.json is empty"),
        ("t.json", b"[]", "t.json is empty"),
        ("t.json", b'[{"text": "a", "label": "b"}, {"text": ', "t.json: row 2: not a JSON object"),
        ("t.json", b'[{"text": "a", "label": "b"}', "t.json: row 2: not a JSON object"),
        ("t.json", b'[{"text": "a", "label": "b"}] x', "t.json: row 2: not a JSON object"),
        ("t.json", b'[{"text": "a", "label": "b"}, 3]', "row 2: expected a JSON object, got '3'"),
        ("t.json", b'{"text": "a", "label": "b"} nonsense', "t.json: row 2: not a JSON object"),
        ("t.json", '[{"text": "naïve"}]'.encode("latin-1"), "t.json: not valid UTF-8"),
        ("t.jsonl.zst", b"no such thing", "t.jsonl.zst: damaged or truncated Zstandard file"),
        (
            "t.jsonl.zst",
            zstandard(jsonl(ROWS * 99).encode())[:-20],
            "damaged or truncated Zstandard file",
        ),
        (
            "t.jsonl.gz",
            gzip.compress(jsonl(ROWS * 99).encode())[:-20],
            "damaged or truncated gzip file",
        ),
    ],
)
def test_damaged_files_are_one_line_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        own(str(path))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000], ids=["deep", "long number"])
def test_values_beyond_python_limits_are_one_line_errors(tmp_path, ending, value):
    path = tmp_path / f"t.{ending}"
    path.write_text('{"text": "a", "label": "b", "more": ' + value + "}\n")
    with pytest.raises(InputError, match=r"(:1|row 1): not a JSON object"):
        own(str(path))


def test_json_is_strict_about_commas(tmp_path):
    path = tmp_path / "t.json"
    row = json.dumps(ROWS[0])
    for content in (f"[{row},]", f"[{row},,{row}]", f"[,{row}]", f"[{row} {row}]", f"[{row}]]"):
        path.write_text(content)
        with pytest.raises(InputError, match="t.json: row [12]: not a JSON object"):
            own(str(path))


def test_documents_of_a_query_may_span_files(tmp_path):
    for index in range(2):
        (tmp_path / f"r-{index}.jsonl").write_text(
            "".join(
                json.dumps({"query": f"q {q}", "document": f"d {index}", "label": index}) + "\n"
                for q in range(8)
            )
        )
    source = own(str(tmp_path / "r-*.jsonl"), kind="ranking")
    for index in range(source.size("validation")):
        examples = source.examples("validation", index)
        assert len({e.document_id for e in examples}) == 2


def test_parquet_parts_of_many_row_groups(tmp_path):
    for index in range(3):
        part = pa.Table.from_pylist(ROWS[10 * index : 10 * index + 10])
        pa.parquet.write_table(part, tmp_path / f"p{index}.parquet", row_group_size=3)
    source = own(str(tmp_path / "p*.parquet"))
    together = contents(source)
    assert sorted(text for part in together.values() for text, _ in part) == sorted(
        row["text"] for row in ROWS
    )


def test_held_out_rows_are_repeatable_and_complete(parts):
    first, second = (own(str(parts / "part-*.jsonl"), held_out=0.3) for _ in range(2))
    assert contents(first) == contents(second)
    together = [text for part in contents(first).values() for text, _ in part]
    assert sorted(together) == sorted(row["text"] for row in ROWS) and first.size("validation") == 9
    held_out = [int(text.split()[1]) for text, _ in contents(first)["validation"]]
    assert not np.array_equal(np.diff(held_out), np.ones(8)), "not the end of the file"


def test_fingerprints_are_of_the_content_that_was_read(parts):
    source = own(str(parts / "part-0.jsonl"))
    before = source.fingerprints("train")
    (parts / "part-0.jsonl").write_text(jsonl(ROWS[10:20]))
    assert source.fingerprints("train") == before
    assert own(str(parts / "part-0.jsonl")).fingerprints("train") != before
