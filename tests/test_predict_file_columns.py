"""Predictions of files: columns to keep, and blank rows."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_encoder import predict_file as bulk
from gemma_encoder.data.files.rows import read_rows
from gemma_encoder.inputs.errors import InputError
from tests.prediction_files import Interruption, interrupt, read


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


@pytest.fixture
def task(predictor):
    return predictor.task("toy_sentiment")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(bulk, "TEXTS_PER_CHUNK", 5)


BLANK_ROWS = {
    "a.txt": "good .\n \nbad .\n",
    "a.csv": "id,sentence\n1,good .\n2,\n3,bad .\n",
    "a.tsv": "id\tsentence\n1\tgood .\n2\t \n3\tbad .\n",
    "a.jsonl": '{"id": 1, "sentence": "good ."}\n{"id": 2, "sentence": null}\n'
    '{"id": 3, "sentence": "bad ."}\n',
    "a.json": '[{"id": 1, "sentence": "good ."}, {"id": 2, "sentence": "\\u3000"}, '
    '{"id": 3, "sentence": "bad ."}]',
}


@pytest.mark.parametrize("source", BLANK_ROWS)
@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_blank_rows_are_refused_or_null(predictor, task, tmp_path, caplog, source, target):
    path = tmp_path / source
    path.write_text(BLANK_ROWS[source])
    output = tmp_path / target
    keep = () if source == "a.txt" else ("id",)
    with pytest.raises(InputError, match=f"{source}:? ?(row )?[23]: the text is empty.*--blank=nu"):
        bulk.predict_file(predictor, task, path, output, keep=keep)
    assert [file.name for file in tmp_path.iterdir()] == [source]
    assert bulk.predict_file(predictor, task, path, output, keep=keep, blank="null") == 3
    assert "1 of 3 texts are blank; their predictions are null" in caplog.text
    rows = read(output)
    null = "" if target == "o.csv" else None
    assert [rows[1][name] for name in rows[1] if name != "id"] == [null] * 3
    expected = predictor.predict(["good .", "bad ."], task.name)[:, 1]
    actual = [float(row["probability_positive"]) for row in (rows[0], rows[2])]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    if keep:
        assert [int(row["id"]) for row in rows] == [1, 2, 3]


def test_a_blank_half_of_a_pair_is_a_blank_row(predictor, tmp_path, capsys):
    task = predictor.task("toy_ranking")
    path = tmp_path / "a.csv"
    path.write_text("query,document\nred box,a red box .\n ,wool .\nred box,\n")
    with pytest.raises(InputError, match="a.csv:3: nothing in 'query'; fill it in"):
        bulk.predict_file(predictor, task, path)
    assert not capsys.readouterr().out
    bulk.predict_file(predictor, task, path, blank="null")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] is None for line in lines] == [False, True, True]


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_whole_chunks_may_be_blank_and_runs_resume(predictor, task, tmp_path, monkeypatch, target):
    """Blank rows fill the first of three chunks, so that no value tells a column's type."""
    path = tmp_path / "a.csv"
    rows = [f"{i if i > 7 else ''},{'good .' if i > 5 else ' '}" for i in range(13)]
    path.write_text("id,sentence\n" + "".join(f"{row}\n" for row in rows))
    options = {"keep": ("id",), "blank": "null"}
    bulk.predict_file(predictor, task, path, tmp_path / f"whole-{target}", **options)
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 1)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, path, tmp_path / target, **options)
    partial = (tmp_path / f"{target}.part").read_bytes()
    with pytest.raises(InputError, match="a.csv:2: the text is empty"):
        bulk.predict_file(predictor, task, path, tmp_path / target, keep=("id",))
    assert (tmp_path / f"{target}.part").read_bytes() == partial and partial.count(b"null") == 18
    assert bulk.predict_file(predictor, task, path, tmp_path / target, **options) == 13
    assert (tmp_path / target).read_bytes() == (tmp_path / f"whole-{target}").read_bytes()


def test_predictions_before_a_blank_row_are_resumed(predictor, task, tmp_path, monkeypatch, capsys):
    """A run that accepts blank rows continues one that refused them."""
    path = tmp_path / "a.txt"
    path.write_text("good .\n" * 12)
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl")
    path.write_text("good .\n" * 12 + " \n")
    assert bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl", blank="null") == 13
    assert "resuming after 10 texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("prediction", None),
        ("prediction", "o.jsonl"),
        ("probabilities", "o.jsonl"),
        ("probabilities", "o.csv"),
        ("probability_positive", "o.csv"),
        ("probability_positive", "o.parquet"),
    ],
)
def test_a_column_to_keep_is_never_overwritten(predictor, task, tmp_path, name, target):
    path = tmp_path / "a.csv"
    path.write_text(f"sentence,{name}\ngood .,mine\n")
    output = tmp_path / target if target else None
    with pytest.raises(InputError, match=f"--keep={name}: that column of .*own column '{name}'"):
        bulk.predict_file(predictor, task, path, output, keep=(name,))
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
    assert bulk.predict_file(predictor, task, path, output) == 1


def test_numbers_to_keep_that_are_not_finite_are_null(predictor, task, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a .", "x": NaN}\n{"sentence": "b .", "x": [1, Infinity]}\n')
    bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl", keep=("x",))
    text = (tmp_path / "o.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [json.loads(line)["x"] for line in text.splitlines()] == [None, [1, None]]


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_values_of_parquet_files_become_text(predictor, task, tmp_path, target):
    dates = [datetime.datetime(2026, 1, 2, 3, 4), None]
    columns = {"d": dates, "t": [datetime.time(3, 4)] * 2, "n": [decimal.Decimal("1.10"), None]}
    table = pa.table({"sentence": ["a .", "b ."], **columns})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    output = tmp_path / target
    bulk.predict_file(predictor, task, tmp_path / "a.parquet", output, keep=tuple(columns))
    null = "" if target == "o.csv" else None
    assert [[row[name] for name in columns] for row in read(output)] == [
        ["2026-01-02T03:04:00", "03:04:00", "1.10"],
        [null, "03:04:00", null],
    ]


@pytest.mark.parametrize(
    ("values", "target", "message"),
    [
        ('{"\\ud800": 1}', "o.jsonl", "a.jsonl:7: a column of --keep cannot .*: surrogates not"),
        ('"\\ud800"', None, "a.jsonl:7: a column of --keep cannot .*: surrogates not allowed"),
        ('"x"', "o.parquet", "--keep=x: the column has values of several types.*use .jsonl"),
        ("[1]", "o.parquet", "--keep=x: the column has values of several types.*use .jsonl"),
        ("123456789012345678901234567890", "o.parquet", "--keep=x: the column .*use .jsonl"),
    ],
)
def test_columns_to_keep_are_refused_first(
    predictor, task, tmp_path, monkeypatch, values, target, message
):
    """Before the first prediction, also where a later chunk has the value."""
    path = tmp_path / "a.jsonl"
    lines = [f'{{"sentence": "a .", "x": {value}}}\n' for value in [*[1] * 6, values]]
    path.write_text("".join(lines))
    interrupt(predictor, monkeypatch, 0)
    output = tmp_path / target if target else None
    with pytest.raises(InputError, match=message):
        bulk.predict_file(predictor, task, path, output, keep=("x",))
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_objects_without_keys_do_not_fit_in_parquet(predictor, task, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a .", "x": {}}\n')
    with pytest.raises(InputError, match="--keep=x: .*no child field.*use .jsonl"):
        bulk.predict_file(predictor, task, path, tmp_path / "o.parquet", keep=("x",))
    path.write_text("".join(f'{{"sentence": "a .", "x": {x}}}\n' for x in ["{}"] * 5 + ['{"k":1}']))
    bulk.predict_file(predictor, task, path, tmp_path / "o.parquet", keep=("x",))
    assert [row["x"]["k"] for row in read(tmp_path / "o.parquet")] == [None] * 5 + [1]


def test_cells_of_csv_files_can_be_read_again(predictor, task, tmp_path):
    values = [{"k": [1, None]}, "a\rb", "a\r\nb", 'a"b', "a,b", True]
    rows = [{"sentence": "a .", "x": value} for value in values]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bulk.predict_file(predictor, task, path, tmp_path / "o.csv", keep=("x",))
    expected = ['{"k": [1, null]}', *values[1:-1], "True"]
    assert [row["x"] for row in read(tmp_path / "o.csv")] == expected
    _, read_again = read_rows(tmp_path / "o.csv")
    assert [row.values["x"] for row in read_again] == expected
    assert b"\r\n" not in (tmp_path / "o.csv").read_bytes().replace(b"a\r\nb", b"")


def test_parquet_columns_have_different_names(predictor, task, tmp_path):
    table = pa.table([pa.array(["a ."]), pa.array(["b ."])], names=["sentence", "sentence"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="should name no column twice; got 'sentence', 'sentenc"):
        bulk.predict_file(predictor, task, tmp_path / "a.parquet")
