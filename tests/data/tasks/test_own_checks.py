"""Columns of users' files that are no text: indices, ids, and words for missing values."""

import json

import pandas as pd
import pytest

from gemma_encoder.data.files.rows import read_rows
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import RANKED, source, write

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(30)]
INDICES = ("", "Unnamed: 0", "__index_level_0__", "index", "id", "ID", "level_0", "row_names")


def fields(made):
    return list(made.examples("train", 0)[0].fields)


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_index_columns_are_left_out_and_named(tmp_path, caplog, name, suffix):
    rows = [{name: str(i), **row} for i, row in enumerate(ROWS)]
    made = source(write(tmp_path / f"t.{suffix}", rows))
    assert fields(made) == ["text"]
    shown = name or ("Unnamed: 0" if suffix in ("csv", "tsv") else "")
    assert f"the columns {shown!r} are taken for indices and left out of the text" in caplog.text


def test_files_that_pandas_writes_with_their_index(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "t.csv")
    frame[::2].to_csv(tmp_path / "v.csv", index=False)
    assert fields(source(tmp_path / "t.csv", validation=tmp_path / "v.csv")) == ["text"]
    frame[1:].to_parquet(tmp_path / "t.parquet")  # as __index_level_0__
    assert fields(source(tmp_path / "t.parquet")) == ["text"]
    pd.read_csv(tmp_path / "t.csv").to_csv(tmp_path / "twice.csv")
    assert fields(source(tmp_path / "twice.csv")) == ["text"]


def test_an_index_that_the_options_name_is_used(tmp_path, caplog):
    rows = [{"id": f"word {i}", "label": "ab"[i % 2]} for i in range(30)]
    assert fields(source(write(tmp_path / "t.csv", rows), fields=("id",))) == ["id"]
    assert "left out" not in caplog.text


def test_files_of_a_split_may_differ_in_an_index(tmp_path):
    write(tmp_path / "part-0.csv", ROWS)
    write(tmp_path / "part-1.csv", [{"": i, **row} for i, row in enumerate(ROWS)])
    assert len(source(tmp_path / "part-*.csv", validation=tmp_path / "part-0.csv")._files["train"])
    write(tmp_path / "part-1.csv", [{"note": "n", **row} for row in ROWS])
    with pytest.raises(InputError, match="differ in the column 'note'"):
        source(tmp_path / "part-*.csv")


def test_columns_without_a_name_do_not_matter_in_prediction(tmp_path):
    path = write(tmp_path / "t.csv", [{"": 0, "text": "a"}, {"": 1, "text": "b"}])
    names, rows = read_rows(path)
    assert names == ("Unnamed: 0", "text") and [row.values["text"] for row in rows] == ["a", "b"]


@pytest.mark.parametrize(
    "value",
    ["T-{:04}", "{}", "user_{}", "2024-01-{:02}T10:00", "0.{}", "-{}", "{:032x}", "AB/{}.7"],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_ids_are_asked_about(tmp_path, value, suffix):
    rows = [{"ticket_id": value.format(i + 1), **row, "body": "b c"} for i, row in enumerate(ROWS)]
    path = write(tmp_path / f"t.{suffix}", rows)
    message = (
        f"t.{suffix}: column 'ticket_id' has another value in every row, such as "
        f"{value.format(1)!r}, as ids have; set own.fields to the columns of the text, e.g. "
        "--config.own.fields=\"('text','body')\", and name 'ticket_id' there if it is text"
    )
    with pytest.raises(InputError) as error:
        source(path)
    assert str(error.value).endswith(message)
    assert fields(source(path, fields=("text", "body"))) == ["text", "body"]
    assert fields(source(path, fields=("ticket_id", "text"))) == ["ticket_id", "text"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_numbers_as_text_name_the_option(tmp_path, suffix):
    rows = [{"ticket_id": i, **row} for i, row in enumerate(ROWS)]
    with pytest.raises(InputError, match="'ticket_id' should contain text.*own.fields names the"):
        source(write(tmp_path / f"t.{suffix}", rows))


@pytest.mark.parametrize(
    "values",
    [
        [f"number {i}" for i in range(30)],  # words
        [f"漢{i}字" for i in range(30)],
        [f"size{i % 7}" for i in range(30)],  # repeated: a feature
        ["word" + "xyzab"[i % 5] * (i + 1) for i in range(30)],  # no digits
        [f"https://example.org/{i}" for i in range(30)],
    ],
)
def test_texts_are_not_taken_for_ids(tmp_path, values):
    rows = [{"title": value, **row} for value, row in zip(values, ROWS, strict=True)]
    assert fields(source(write(tmp_path / "t.csv", rows))) == ["title", "text"]


@pytest.mark.parametrize("name", ["text", "Text", "sentence"])
def test_a_column_called_text_is_text(tmp_path, name):
    rows = [{name: f"code{i}", "label": "ab"[i % 2]} for i in range(30)]
    assert fields(source(write(tmp_path / "t.csv", rows))) == [name]


@pytest.mark.parametrize("name", ["id", "ticket id"])
def test_columns_that_the_template_names_are_used(tmp_path, caplog, name):
    rows = [{"index": i, name: f"T{i}", "code": f"C{i}", **row} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "t.csv", rows)
    made = source(path, template=f"{{{name.replace(' ', '_')}}}: {{text}}")
    assert fields(made) == [name.replace(" ", "_"), "text"]
    assert f"{name!r} are taken for indices" not in caplog.text


def test_the_label_is_no_field(tmp_path):
    path = write(tmp_path / "t.csv", ROWS)
    with pytest.raises(InputError, match="own.fields names 'label', which is the label"):
        source(path, fields=("text", "label"))
    ranked = write(tmp_path / "r.csv", RANKED)
    with pytest.raises(InputError, match="own.fields names 'query_id', which is taken for the ids"):
        source(ranked, kind="ranking", fields=("query_id", "document"))
    made = source(
        ranked, kind="ranking", fields=("query", "document"), query_id="query", validation=ranked
    )
    assert made.size("validation") == 8  # queries grouped by their texts


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_words_for_missing_values_are_reported(tmp_path, caplog, suffix):
    rows = [dict(row) for row in ROWS]
    for index, text in ((4, "nan"), (7, "NULL"), (9, " nan "), (11, "nan or none, as a text")):
        rows[index]["text"] = text
    rows[3]["label"] = rows[5]["label"] = "None"
    path = write(tmp_path / f"t.{suffix}", rows)
    source(path, validation=write(tmp_path / f"v.{suffix}", ROWS))
    first = {"csv": ":{}", "jsonl": ":{}", "parquet": ": row {}"}[suffix]
    lines = [first.format(index + 1 + (suffix == "csv")) for index in (4, 7, 3)]
    messages = [record.getMessage() for record in caplog.records if "missing" in record.msg]
    assert messages == [
        f"own: column 'text' contains 'nan' in 2 of 30 rows, the first {path}{lines[0]}; 'NULL' in "
        f"1 of 30 rows, the first {path}{lines[1]}: is a value missing there? It is read as it is",
        f"own: column 'label' contains 'None' in 2 of 30 rows, the first {path}{lines[2]}: "
        "is a value missing there? It is read as it is",
    ]


@pytest.mark.parametrize("word", ["nan", "None", "NULL", "N/A", "null", "NaN", "NA", "<NA>"])
def test_each_word_is_noticed_in_several_classes(tmp_path, caplog, word):
    rows = [{"text": f"text {i}", "label": ["x", "y"][: i % 3]} for i in range(40)]
    rows[6]["label"] = [word, "x"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source(path, kind="multi_label")
    assert f"'label' contains {word!r} in 1 of 40 rows, the first {path}:7" in caplog.text


def test_ids_that_only_another_file_has_are_noted(tmp_path, caplog):
    plain = [{name: row[name] for name in ("query", "document", "label")} for row in RANKED]
    train = write(tmp_path / "train.csv", plain)
    other = write(tmp_path / "other.csv", RANKED)
    source(train, validation=other, kind="ranking")
    for name in ("query_id", "document_id"):
        assert f"other.csv: the column {name!r} is not used, since {train} lacks it" in caplog.text
    with pytest.raises(
        InputError, match=r"train.csv has no column 'query_id'; .* is a column of .*other.csv"
    ):
        source(other, validation=train, kind="ranking")
