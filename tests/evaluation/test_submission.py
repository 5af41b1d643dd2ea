"""Checks of submissions: complete ones pass, and every fault is named with file and line."""

import io
import json
import tracemalloc
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.cli import submit as program
from gemma_encoder.evaluation import leaderboards, submission
from gemma_encoder.inputs.errors import InputError

LABELS = {
    "CoLA.tsv": "1",
    "SST-2.tsv": "0",
    "MRPC.tsv": "1",
    "STS-B.tsv": "2.500",
    "MNLI-m.tsv": "neutral",
    "MNLI-mm.tsv": "contradiction",
    "QNLI.tsv": "not_entailment",
    "QQP.tsv": "0",
    "RTE.tsv": "entailment",
    "WNLI.tsv": "1",
    "AX.tsv": "entailment",
    "BoolQ.jsonl": "true",
    "CB.jsonl": "contradiction",
    "COPA.jsonl": 1,
    "ReCoRD.jsonl": "New York",
    "RTE.jsonl": "entailment",
    "WiC.jsonl": "false",
    "WSC.jsonl": "True",
    "AX-b.jsonl": "not_entailment",
    "AX-g.jsonl": "entailment",
}


def content(name, count):
    if name.endswith(".tsv"):
        return "index\tprediction\n" + "".join(f"{i}\t{LABELS[name]}\n" for i in range(count))
    if name == "MultiRC.jsonl":
        answers = [{"idx": i, "label": i % 2} for i in range(count)]
        questions = [{"idx": 0, "answers": answers}]
        return json.dumps({"idx": 0, "passage": {"questions": questions}}) + "\n"
    return "".join(json.dumps({"idx": i, "label": LABELS[name]}) + "\n" for i in range(count))


def archive(benchmark, count=3, **changes):
    """Builds a submission with `count` predictions per file, or the real number if None.

    Changes replace the contents of files; None removes the file.
    """
    files = {
        file.name: content(file.name, count or file.count)
        for file in leaderboards.BENCHMARKS[benchmark]
    }
    files |= {name.replace("__", "."): text for name, text in changes.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, text in files.items():
            if text is not None:
                zipped.writestr(name, text)
    return buffer.getvalue()


def sizes(benchmark, count=3):
    return {file.name: count for file in leaderboards.BENCHMARKS[benchmark]}


@pytest.mark.parametrize("benchmark", leaderboards.BENCHMARKS)
@pytest.mark.parametrize("count", [1, 5])
def test_a_complete_submission_passes(benchmark, count):
    expected = sizes(benchmark, count)
    counts = submission.check_submission(archive(benchmark, count), benchmark, expected)
    assert counts == expected


@pytest.mark.parametrize(
    ("benchmark", "changes", "message"),
    [
        ("glue", {"CoLA__tsv": None}, "CoLA.tsv is missing"),
        (
            "glue",
            {"folder/CoLA__tsv": "x"},
            "folder/CoLA.tsv is unexpected; expected top-level files named CoLA.tsv",
        ),
        (
            "glue",
            {"CoLA__tsv": "id\tlabel\n0\t1\n"},
            r"CoLA.tsv line 1: expected the header 'index\\tprediction', got 'id\\tlabel'",
        ),
        ("glue", {"CoLA__tsv": ""}, "CoLA.tsv line 1: expected the header"),
        ("glue", {"a\n\x1b[31mb": ""}, r"^a\\n\\x1b\[31mb is unexpected; expected top-level"),
        (
            "glue",
            {"CoLA__tsv": "index\tprediction\n0\t1\n0\t1\n"},
            "CoLA.tsv line 3: index 0 appears a second time",
        ),
        (
            "glue",
            {"CoLA__tsv": "index\tprediction\n0\t2\n"},
            "CoLA.tsv line 2: label '2' of index 0: expected 0 or 1",
        ),
        (
            "glue",
            {"CoLA__tsv": "index\tprediction\n0 1\n"},
            "CoLA.tsv line 2: expected a whole number, a tab and the prediction, got '0 1'",
        ),
        (
            "glue",
            {"CoLA__tsv": "index\tprediction\n-1\t1\n"},
            "CoLA.tsv line 2: expected a whole number",
        ),
        ("glue", {"CoLA__tsv": b"index\tprediction\n\xff"}, "CoLA.tsv is not valid UTF-8"),
        (
            "glue",
            {"STS-B__tsv": "index\tprediction\n0\t5.001\n"},
            "STS-B.tsv line 2: label '5.001' of index 0: expected a number from 0 to 5",
        ),
        ("glue", {"STS-B__tsv": "index\tprediction\n0\tnan\n"}, "label 'nan'"),
        (
            "glue",
            {"MNLI-m__tsv": "index\tprediction\n0\t1\n"},
            "label '1' of index 0: expected one of entailment, neutral, contradiction",
        ),
        ("glue", {"AX__tsv": content("AX.tsv", 2)}, "AX.tsv holds 2 predictions, expected 3"),
        (
            "glue",
            {"AX__tsv": content("AX.tsv", 3).replace("2\t", "3\t")},
            "AX.tsv: index 2 is missing; expected 0 to 2",
        ),
        (
            "superglue",
            {"BoolQ__jsonl": '{"idx": 0, "label": "True"}\n'},
            "BoolQ.jsonl line 1: label 'True' of index 0: expected one of false, true",
        ),
        (
            "superglue",
            {"WSC__jsonl": '{"idx": 0, "label": "true"}\n'},
            "expected one of False, True",
        ),
        (
            "superglue",
            {"COPA__jsonl": '{"idx": 0, "label": true}\n'},
            "COPA.jsonl line 1: label True of index 0: expected 0 or 1",
        ),
        (
            "superglue",
            {"ReCoRD__jsonl": '{"idx": 0, "label": ""}\n'},
            "label '' of index 0: expected an entity",
        ),
        (
            "superglue",
            {"CB__jsonl": '{"idx": "0", "label": "neutral"}\n'},
            "CB.jsonl line 1: idx must be a whole number from 0, got '0'",
        ),
        (
            "superglue",
            {"CB__jsonl": '{"idx": 0}\n'},
            'CB.jsonl line 1: expected an object {"idx", "label"}',
        ),
        ("superglue", {"CB__jsonl": "{\n"}, "CB.jsonl line 1: expected an object"),
        ("superglue", {"CB__jsonl": "[]\n"}, "CB.jsonl line 1: expected an object"),
        (
            "superglue",
            {"MultiRC__jsonl": '{"idx": 0, "label": 1}\n'},
            'MultiRC.jsonl line 1: expected an object {"idx", "passage"',
        ),
        (
            "superglue",
            {"MultiRC__jsonl": content("MultiRC.jsonl", 3) * 2},
            r"MultiRC.jsonl line 2: index \(0, 0, 0\) appears a second time",
        ),
    ],
)
def test_each_fault_is_named_on_one_line(benchmark, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        submission.check_submission(archive(benchmark, **changes), benchmark, sizes(benchmark))
    assert "\n" not in str(caught.value)


def test_all_faulty_files_are_named_at_once():
    with pytest.raises(InputError, match="AX.tsv is missing; CoLA.tsv line 1.*; QQP.tsv line 2"):
        submission.check_submission(
            archive("glue", AX__tsv=None, CoLA__tsv="", QQP__tsv="index\tprediction\n0\tyes\n"),
            "glue",
            sizes("glue"),
        )
    with pytest.raises(InputError, match="not a zip file"):
        submission.check_submission(b"no zip", "glue")


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, unique=True
    ),
    st.randoms(),
)
def test_nested_labels_survive_a_round_trip(ids, random):
    labels = {idx: random.randint(0, 1) for idx in ids}
    nested = submission._nest(
        [(dict(zip(leaderboards.IDS, idx, strict=True)), label) for idx, label in labels.items()]
    )
    lines = "".join(json.dumps(entry) + "\n" for entry in nested)
    restored = submission.read_submission(archive("superglue", MultiRC__jsonl=lines), "superglue")
    assert restored["MultiRC.jsonl"] == labels
    assert len(nested) == len({idx[0] for idx in ids})  # one line per paragraph


def test_the_program_checks_a_file(tmp_path, capsys):
    path = tmp_path / "submission.zip"
    path.write_bytes(archive("superglue"))
    assert program.main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: BoolQ.jsonl holds 3 predictions, expected 3245; ")
    assert error.count("\n") == 1
    path.write_bytes(archive("superglue", None))
    assert program.main(["check", str(path)]) == 0
    assert "is a complete superglue submission" in capsys.readouterr().out
    path.write_bytes(b"")
    assert program.main(["check", str(path)]) == 2
    assert "not a zip file" in capsys.readouterr().err
    assert program.main(["check", str(tmp_path / "none.zip")]) == 2
    assert "none.zip does not exist" in capsys.readouterr().err
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("other.txt", "")
    assert program.main(["check", str(path)]) == 2
    assert "holds no file of glue or superglue" in capsys.readouterr().err


DAMAGES = {
    "a flipped bit": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "a cut": lambda data, at: data[:at],
    "a deleted byte": lambda data, at: data[:at] + data[at + 1 :],
    "zeros": lambda data, at: data[:at] + bytes(len(data[at : at + 40])) + data[at + 40 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
)
def test_a_damaged_submission_is_right_or_one_line(damage, compression):
    names = sizes("glue", 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as zipped:
        for name in names:
            zipped.writestr(name, content(name, 20))
    data = buffer.getvalue()
    outcomes = set()
    for position in range(0, len(data), max(len(data) // 120, 1)):
        try:
            submission.check_submission(DAMAGES[damage](data, position), "glue", names)
            outcomes.add("right")
        except InputError as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
    assert "refused" in outcomes


def test_encrypted_and_too_large_files_are_refused(monkeypatch):
    data = bytearray(archive("glue"))
    data[6] |= 1  # the flag of encryption, in the local header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InputError, match="CoLA.tsv is damaged: .*encrypted"):
        submission.check_submission(bytes(data), "glue", sizes("glue"))
    monkeypatch.setattr(submission, "LARGEST_FILE", 20)
    with pytest.raises(InputError, match="CoLA.tsv has more than 0 MiB, more than any submission"):
        submission.check_submission(archive("glue"), "glue", sizes("glue"))


BOMBS = {
    "zeros": (b"\0" * (1 << 28), "CoLA.tsv has more than 16 MiB"),
    "empty lines": (
        b"index\tprediction\n" + b"\n" * (1 << 23),
        "CoLA.tsv line 2: expected a whole",
    ),
    "one line": (b"index\tprediction\n" + b"0" * (1 << 23), "CoLA.tsv has a line of 8388608 bytes"),
    "rows": (
        b"index\tprediction\n" + b"".join(b"%d\t1\n" % index for index in range(9_000)),
        "CoLA.tsv holds more than twice the 1063 examples",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_archive_that_decompresses_hugely_is_refused(bomb):
    content, message = BOMBS[bomb]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("CoLA.tsv", content)
    del content
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        submission.check_submission(buffer.getvalue(), "glue", sizes("glue"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_an_archive_of_another_method_or_size_is_refused(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as zipped:  # may ask for 4 GB of memory
        zipped.writestr("CoLA.tsv", "index\tprediction\n")
    with pytest.raises(InputError, match="CoLA.tsv is compressed by another method than deflate"):
        submission.check_submission(buffer.getvalue(), "glue", sizes("glue"))
    path = tmp_path / "s.zip"
    path.write_bytes(archive("glue"))
    assert submission.read_archive(path) == archive("glue")
    monkeypatch.setattr(submission, "LARGEST_ARCHIVE", 20)
    with pytest.raises(InputError, match="s.zip has more than 0 MiB, unlike a submission"):
        submission.read_archive(path)


@pytest.mark.parametrize("row", ["9" * 5_000 + "\t1", "0" * 30 + "\t1"])
def test_an_index_of_many_digits_is_refused(row):
    data = archive("glue", CoLA__tsv=f"index\tprediction\n{row}\n")
    with pytest.raises(InputError, match="CoLA.tsv line 2: expected a whole number, a tab"):
        submission.check_submission(data, "glue", sizes("glue"))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"idx": ' + "9" * 5_000 + ', "label": 1}'])
def test_extreme_json_is_refused(line):
    data = archive("superglue", BoolQ__jsonl=line + "\n")
    with pytest.raises(InputError, match="BoolQ.jsonl line 1: expected an object"):
        submission.check_submission(data, "superglue", sizes("superglue"))
