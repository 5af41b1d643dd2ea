"""Predictions of files: formats, resuming after an interruption, and refused inputs."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from gemma_encoder import activity
from gemma_encoder import predict_file as bulk
from gemma_encoder.data.files.texts import read_texts
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.uncertainty import Calibration
from tests.prediction_files import TEXTS, Interruption, interrupt, read, write


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


@pytest.fixture
def task(predictor):
    return predictor.task("toy_sentiment")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(bulk, "TEXTS_PER_CHUNK", 5)


@pytest.mark.parametrize(
    "source", ["a.txt", "a.txt.gz", "a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.parquet"]
)
@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_every_format_is_read_and_written(predictor, task, tmp_path, source, target):
    keep = () if ".txt" in source else ("id",)
    count = bulk.predict_file(
        predictor, task, write(tmp_path, source), tmp_path / target, keep=keep
    )
    assert count == len(TEXTS)
    rows = read(tmp_path / target)
    expected = predictor.predict(TEXTS, task.name)
    np.testing.assert_allclose(
        [float(row["probability_positive"]) for row in rows], expected[:, 1], rtol=1e-5, atol=1e-6
    )
    assert [row["prediction"] for row in rows] == [task.classes[i] for i in expected.argmax(axis=1)]
    if keep:
        assert [int(row["id"]) for row in rows] == list(range(len(TEXTS)))
    # No temporary file remains.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source, target])


@pytest.mark.parametrize("target", ["o.jsonl", "o.csv", "o.parquet"])
def test_names_of_outputs_need_not_be_utf_8(predictor, task, tmp_path, target):
    source = write(tmp_path, "a.parquet").rename(tmp_path / "\udcff.parquet")
    output = tmp_path / f"\udcff\n{target}"
    bulk.predict_file(predictor, task, source, output)
    assert len(read(output.rename(tmp_path / target))) == len(TEXTS)


def test_columns_of_a_pair_may_have_other_names(predictor, tmp_path):
    (tmp_path / "p.csv").write_text("a,b,note\none .,two .,x\nthree .,four .,y\n")
    task = predictor.task("toy_similarity")
    bulk.predict_file(
        predictor,
        task,
        tmp_path / "p.csv",
        tmp_path / "o.jsonl",
        columns=("a", "b"),
        keep=("note", "a"),
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        [row["prediction"] for row in rows],
        predictor.predict([("one .", "two ."), ("three .", "four .")], task.name),
        rtol=1e-5,
    )
    assert [(row["note"], row["a"]) for row in rows] == [("x", "one ."), ("y", "three .")]


def test_columns_may_have_the_names_of_the_training_file(task, tmp_path):
    """A template spells the column "my text" as my_text."""
    renamed = dataclasses.replace(task, template=Template("{my_text}"))
    (tmp_path / "t.csv").write_text("my text,note\na dull one .,x\n")
    (text,) = read_texts(tmp_path / "t.csv", renamed, (), ())
    assert text.fields == {"my_text": "a dull one ."}
    (tmp_path / "t.csv").write_text("my text,my-text\na,b\n")
    with pytest.raises(InputError, match="t.csv has no column 'my_text'"):
        read_texts(tmp_path / "t.csv", renamed, (), ())


def test_predictions_are_printed_without_an_output(predictor, task, tmp_path, capsys):
    bulk.predict_file(predictor, task, write(tmp_path, "a.txt"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(TEXTS) and lines[0].keys() == {"prediction", "probabilities"}


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("target", ["o.jsonl", "o.parquet"])
def test_an_interrupted_run_resumes(predictor, task, tmp_path, monkeypatch, capsys, chunks, target):
    source = write(tmp_path, "a.csv")
    bulk.predict_file(predictor, task, source, tmp_path / f"whole-{target}", keep=("id",))
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, chunks)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, source, tmp_path / target, keep=("id",))
    assert not (tmp_path / target).exists()
    part = tmp_path / f"{target}.part"
    with part.open("ab") as file:
        file.write(b'{"prediction": "half a li')  # as if killed in the middle of a write
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 5 - chunks)  # only the remaining texts are predicted
        bulk.predict_file(predictor, task, source, tmp_path / target, keep=("id",))
    assert (tmp_path / target).read_bytes() == (tmp_path / f"whole-{target}").read_bytes()
    assert (f"resuming after {5 * chunks} texts" in capsys.readouterr().err) == bool(chunks)
    assert not part.exists() and not (tmp_path / f"{target}.part.json").exists()


def test_progress_is_named_where_no_bar_is(predictor, task, tmp_path, monkeypatch):
    activities = []
    records = bulk._records

    def recorded(*arguments):
        activities.append(str(activity.current()._activities[-1]))
        return records(*arguments)

    monkeypatch.setattr(bulk, "_records", recorded)
    with activity.reporting():
        bulk.predict_file(predictor, task, write(tmp_path, "in.txt"), tmp_path / "out.csv")
    assert activities == [f"predicting, {done} texts done" for done in range(0, 24, 5)]


def test_a_partial_output_is_not_mixed_with_other_texts(predictor, task, tmp_path, monkeypatch):
    source = write(tmp_path, "a.txt")
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, source, output)
    partial = (tmp_path / "o.jsonl.part").read_bytes()
    fields = {"name": "toy_other", "template": task.template, "head": task.head}
    other_task = type(task)(**{**task.to_dict(), **fields})
    with pytest.raises(
        InputError, match=r"left by another command \(task: 'toy_sentiment' -> 'toy_other'"
    ):
        bulk.predict_file(predictor, other_task, source, output)
    source.write_text("another text .\n" * 30)
    with pytest.raises(InputError, match="was made from other texts"):
        bulk.predict_file(predictor, task, source, output)
    assert (tmp_path / "o.jsonl.part").read_bytes() == partial


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.csv",
            "text\na\n",
            {},
            "a.csv has no column 'sentence'; its columns: text. Task 'toy_sentiment' needs "
            "sentence; name their columns with --columns",
        ),
        ("a.csv", "sentence\na\n", {"keep": ("id",)}, "a.csv has no column 'id'"),
        (
            "a.csv",
            "sentence\na\n",
            {"columns": ("sentence", "b")},
            "--columns names 2 columns; task 'toy_sentiment' needs 1",
        ),
        ("a.csv", "sentence\n", {}, "a.csv has no text"),
        ("a.csv", "", {}, "a.csv is empty"),
        ("a.txt", "", {}, "a.txt has no text"),
        ("a.txt", "good\n\ngood\n", {}, "a.txt:2: the text is empty"),
        ("a.txt", "good\n", {"keep": ("id",)}, "a .txt file has one text a line and no columns"),
        (
            "a.jsonl",
            '{"sentence": "a"}\n{"text": "b"}\n',
            {},
            "a.jsonl:2: .*needs the field 'sentence'",
        ),
        ("a.jsonl", '{"sentence": "a"}\n{"sentence": 3}\n', {}, "a.jsonl:2: .*got int"),
        ("a.jsonl", '{"sentence": "a"\n', {}, "a.jsonl:1: not a JSON object"),
        (
            "a.jsonl",
            '{"sentence": "a", "id": 1}\n{"sentence": "a"}\n',
            {"keep": ("id",)},
            "a.jsonl:2: there is no 'id'",
        ),
        ("a.doc", "x", {}, "expected a file that ends in"),
        ("a.txt", b"\xff\xfe", {}, "not valid UTF-8"),
    ],
)
def test_refusals_name_the_file_and_line(
    predictor, task, tmp_path, name, content, options, message
):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "o.jsonl").exists()


def test_a_corrected_input_resumes_after_its_valid_chunks(predictor, task, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("good .\n" * 12 + " \n")
    with pytest.raises(InputError, match="a.txt:13: the text is empty"):
        bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl")
    path.write_text("good .\n" * 12 + "corrected .\n")
    assert bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl") == 13
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 13


def test_invalid_outputs_are_refused(predictor, task, tmp_path):
    source = write(tmp_path, "a.txt")
    with pytest.raises(InputError, match=r"expected a file that ends in .jsonl, .csv, .parquet"):
        bulk.predict_file(predictor, task, source, tmp_path / "o.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        bulk.predict_file(predictor, task, source, tmp_path / "no" / "o.csv")
    with pytest.raises(InputError, match="is not a file"):
        bulk.predict_file(predictor, task, tmp_path / "none.txt", tmp_path / "o.csv")
    with pytest.raises(InputError, match="no columns"):
        bulk.predict_file(predictor, predictor.task("toy_similarity"), source)


def test_scores_that_are_not_finite_keep_earlier_work(predictor, task, tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt")
    run = predictor._encoder.run

    def damaged(template, texts, names, progress):
        pooled, scores = run(template, texts, names, progress)
        if names[0].endswith(":11"):
            scores[task.head][1] = np.nan
        return pooled, scores

    with monkeypatch.context() as patch:
        patch.setattr(predictor._encoder, "run", damaged)
        with pytest.raises(InputError, match=r"a.txt:12: the model's scores are NaN .* 1 of 5"):
            bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl")
    assert len((tmp_path / "o.jsonl.part").read_text().splitlines()) == 10
    assert bulk.predict_file(predictor, task, path, tmp_path / "o.jsonl") == len(TEXTS)


def test_a_run_resumes_only_with_its_checkpoint(predictor, task, tmp_path, monkeypatch):
    source = write(tmp_path, "a.csv")
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, source, output)
    others = []
    for part in ("heads", "backbone"):
        changed = jax.tree.map(lambda values: values + 1, predictor.parameters[part])
        others.append(type(predictor)(predictor.spec, {**predictor.parameters, part: changed}))
    hotter = dataclasses.replace(task, calibration=Calibration(temperature=2.0))
    tasks = tuple(hotter if each == task else each for each in predictor.spec.tasks)
    spec = dataclasses.replace(predictor.spec, tasks=tasks)
    calibrated = type(predictor)(spec, predictor.parameters)
    for changed in (*others, calibrated):
        with pytest.raises(InputError, match=r"left by another command \(checkpoint: "):
            bulk.predict_file(changed, changed.task(task.name), source, output)
    assert bulk.predict_file(predictor, task, source, output) == len(TEXTS)


def test_the_input_may_be_named_in_another_way(predictor, task, tmp_path, monkeypatch):
    write(tmp_path, "a.csv")
    output = tmp_path / "o.jsonl"
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, pathlib.Path("a.csv"), output)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "a.csv")
    monkeypatch.chdir("other")
    with pytest.raises(InputError, match=r"left by another command \(input: .*/other/a.csv'\)"):
        bulk.predict_file(predictor, task, pathlib.Path("a.csv"), output)
    assert bulk.predict_file(predictor, task, pathlib.Path("../a.csv"), output) == len(TEXTS)


@pytest.mark.parametrize("damage", ["no state", "no bytes", "no lines", "short lines"])
def test_damaged_partial_outputs_are_refused(predictor, task, tmp_path, monkeypatch, damage):
    source = write(tmp_path, "a.csv")
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        interrupt(predictor, patch, 2)
        with pytest.raises(Interruption):
            bulk.predict_file(predictor, task, source, output)
    part, state = tmp_path / "o.jsonl.part", tmp_path / "o.jsonl.part.json"
    if damage == "no lines":
        part.unlink()
    elif damage == "short lines":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        state.write_text({"no state": "{tru", "no bytes": "{}"}[damage])
    with pytest.raises(InputError, match="o.jsonl.part and o.jsonl.part.json do not match"):
        bulk.predict_file(predictor, task, source, output)


def test_the_input_is_never_replaced(predictor, task, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a ."}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="is the input, which it would replace"):
            bulk.predict_file(predictor, task, path, output)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="folder.csv is a folder; name a file"):
        bulk.predict_file(predictor, task, path, tmp_path / "folder.csv")
    assert path.read_text() == '{"sentence": "a ."}\n'
