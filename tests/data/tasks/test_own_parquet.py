"""Parquet files of users: columns are read as rows are."""

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_encoder.data.files import rows as row_files
from gemma_encoder.data.tasks import own_cells, own_columns
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import source


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
            r"t.parquet: row 1: column 'label' should contain text or a whole number, "
            r"got float '0.5'",
        ),
        (
            "label",
            ["high", "low"],
            "regression",
            r"t.parquet: row 1: column 'label' should contain a number, got 'high'",
        ),
    ],
)
def test_parquet_columns_of_the_wrong_type_are_errors(tmp_path, column, values, kind, message):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]} | {column: values})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        source(tmp_path / "t.parquet", kind=kind)


def test_invalid_unicode_in_parquet_is_an_error(tmp_path):
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
def test_parquet_columns_equal_parquet_rows(tmp_path, monkeypatch, kind, labels):
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
def test_errors_name_rows_of_later_batches(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(row_files, "BATCH", 2)
    table = pa.table({"text": ["a", "b", "c", bad, "d"], "label": [0, 1, 0, 1, 0]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: row 4: column 'text' is (empty|null)"):
        source(tmp_path / "t.parquet")


def test_valid_parquet_columns_are_not_read_by_row(tmp_path, monkeypatch):
    table = pa.table({"text": ["漢字", " b ", "c"] * 10, "label": [0, 1, 2] * 10})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    monkeypatch.setattr(own_cells, "read_text", None)
    made = source(tmp_path / "t.parquet", validation=tmp_path / "t.parquet")
    assert made.examples("train", 1)[0].fields == {"text": " b "}
    assert made.where("train", 29).endswith("t.parquet: row 30")


def test_whitespace_matches_str_strip():
    assert "".join(filter(str.isspace, map(chr, range(0x110000)))) == own_columns.WHITESPACE
