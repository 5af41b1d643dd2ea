"""One rule for lines and numbers, whatever the format of the file."""

import gzip
import json
import math

import numpy as np
import pytest

from gemma_encoder.data.files import lines
from gemma_encoder.data.files.corpus import Corpus, TsvLayout
from gemma_encoder.data.files.lines import Spans, read_lines
from gemma_encoder.data.files.rows import read_rows
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.tasks.beir import JsonLayout
from gemma_encoder.data.tasks.text import UnlabeledTexts
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import source

LAYOUT = TsvLayout("pid", "passage")


def collections(folder):
    """Writes the queries q and r and the documents a, b and c; returns both collections."""
    for name, ids in (("queries", "qr"), ("documents", "abc")):
        (folder / name).write_text("".join(f"{text_id}\ttext\n" for text_id in ids))
    return [Corpus(folder / name, LAYOUT) for name in ("queries", "documents")]


def corpus_of(layout):
    def read(path):
        corpus = Corpus(path, layout)
        return [(corpus.ids[i], corpus.text(i)) for i in range(len(corpus))]

    return read


def table_of(path):
    return [dict(row.values) for row in read_rows(path)[1]]


def qrels_of(path):
    return Qrels(path, *collections(path.parent)).by_id(np.arange(2))


def run_of(path):
    queries, documents = collections(path.parent)
    run = Candidates(path, queries, documents)
    return [[documents.ids[d] for d in run.of(query)] for query in range(2)]


# Name of a file -> its reader, and the lines of three rows, with a header where there is one.
READERS = {
    "collection.tsv": (corpus_of(LAYOUT), ["a\tone", "b\ttwo", "c\tthree"]),
    "corpus.jsonl": (
        corpus_of(JsonLayout(may_be_empty=True)),
        [json.dumps({"_id": text_id, "text": f"text {text_id}"}) for text_id in "abc"],
    ),
    "qrels.tsv": (qrels_of, ["q 0 a 1", "q 0 b 2", "r 0 a 1"]),
    "beir.tsv": (qrels_of, ["query-id\tcorpus-id\tscore", "q\ta\t1", "q\tb\t2", "r\ta\t1"]),
    "run.tsv": (run_of, ["q\ta\t1", "q\tb\t2", "r\ta\t1"]),
    "run.trec": (run_of, ["q Q0 a 1 3.5 x", "q Q0 b 2 2.5 x", "r Q0 a 1 1.5 x"]),
    "top1000.tsv": (run_of, ["q\ta\tquery\ttext", "q\tb\tquery\ttext", "r\ta\tquery\ttext"]),
    "t.csv": (table_of, ["text,label", "one,1", '"two\n \nlines",2', "three,3"]),
    "t.tsv": (table_of, ["text\tlabel", "one\t1", "two\t2", "three\t3"]),
    "t.jsonl": (table_of, ['{"text": "one"}', '{"text": "two"}', '{"text": "three"}']),
    "t.json": (table_of, ["[", '{"text": "one"},', '{"text": "two"}', "]"]),
    "texts.txt": (lambda path: list(UnlabeledTexts([str(path)])), ["one", "two", "three"]),
}


def contents(rows):
    """Yields (name, content) of the same rows with other line ends and blank lines."""
    yield "plain", "\n".join(rows) + "\n"
    yield "no last line break", "\n".join(rows)
    yield "mark", "\ufeff" + "\n".join(rows) + "\n"
    for name, blank in {"empty": "", "spaces": "  ", "tab": "\t", "wide": "\u3000 \u2003"}.items():
        yield f"{name} first", "\n".join([blank, *rows]) + "\n"
        yield f"{name} between", f"\n{blank}\n".join(rows) + "\n"
        yield f"{name} last", "\n".join(rows) + f"\n{blank}\n{blank}"
        yield f"{name} returns", f"\r\n{blank}\r\n".join(rows) + f"\r\n{blank}\r\n"


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("name", READERS)
def test_blank_lines_and_line_ends_change_nothing(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    read, rows = READERS[name]
    path = tmp_path / name
    expected = None
    for kind, content in contents(rows):
        if name == "t.json" and "wide" in kind:
            continue  # not a blank of JSON
        path.write_bytes(content.encode())
        expected = expected or read(path)
        assert read(path) == expected, kind
        last = content
    if name != "texts.txt":
        zipped = path.with_name(f"{name}.gz")
        zipped.write_bytes(gzip.compress(last.encode()))
        assert read(zipped) == expected


@pytest.mark.parametrize("name", READERS)
def test_bad_bytes_are_named_by_their_line(tmp_path, name):
    read, rows = READERS[name]
    path = tmp_path / name
    content = "\n\n".join(rows).encode()
    path.write_bytes(content.replace(rows[1].encode(), rows[1].encode() + b"\xff", 1))
    where = "in line 3" if name == "t.json" else ""
    location = "" if name == "t.json" else ":3"
    with pytest.raises(InputError, match=f"{name}{location}: not valid UTF-8 {where}"):
        read(path)
    path.write_bytes("\ufeff".encode("utf-16-le") + "\n".join(rows).encode("utf-16-le"))
    with pytest.raises(InputError, match="not valid UTF-8"):
        read(path)


@pytest.mark.parametrize("name", [name for name in READERS if name != "texts.txt"])
def test_errors_count_blank_lines(tmp_path, name):
    read, rows = READERS[name]
    path = tmp_path / name
    path.write_text("\n" + "\n \n".join(rows[:2]) + '\n\n"broken\n')
    location = "row 2" if name == "t.json" else "6"
    with pytest.raises(InputError, match=rf"{name}: ?{location}: "):
        read(path)


def test_repeated_ids_are_named_by_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 8)
    path = tmp_path / "c.tsv"
    path.write_text("\na\tone\n\n\nb\ttwo\n \nc\tx\n" + "\n" * 20 + "b\tthree\n")
    with pytest.raises(InputError, match=r"c.tsv:28: pid 'b' appears a second time"):
        Corpus(path, LAYOUT)


@pytest.mark.parametrize("name", ["collection.tsv", "qrels.tsv", "run.tsv", "t.csv", "t.tsv"])
def test_files_of_old_macs_are_refused(tmp_path, name):
    read, rows = READERS[name]
    (tmp_path / name).write_bytes("\r".join(rows).encode() + b"\r")
    with pytest.raises(InputError, match=f"{name}:1: lines end with a carriage return alone"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["collection.tsv", "t.tsv", "texts.txt"])
def test_other_control_characters_are_text(tmp_path, name):
    read, rows = READERS[name]
    path = tmp_path / name
    path.write_bytes("\n".join(rows).replace("two", "t\rw\0o\u2028").encode())
    assert "t\rw\0o\u2028" in str(read(path)).encode().decode("unicode_escape")


def test_an_empty_value_is_not_a_blank_line(tmp_path):
    (tmp_path / "t.csv").write_text('text\none\n""\n\ntwo\n')
    assert table_of(tmp_path / "t.csv") == [{"text": "one"}, {"text": ""}, {"text": "two"}]


NUMBERS = {
    **{"1": 1, "0": 0, "-3": -3, "+1": 1, "007": 7, " 1": 1, "1.0": 1, "2.": 2, "1e0": 1},
    **{"0.5": 0.5, ".5": 0.5, "-1e-3": -1e-3, "1E+2": 100},
}
NO_NUMBERS = (
    *("", " ", "one", "1_000", "1,5", "0x1", "１", "١", "²", "½", "nan", "inf", "Infinity"),
    *("1e999", "--1", "1-", "1 2", "+", ".", "e1", "1e", "True", "1\u00a00"),
)


@pytest.mark.parametrize("text", [*NUMBERS, *NO_NUMBERS])
def test_numbers_are_decimal_and_ascii(text):
    value = lines.parse_number(text)
    spans = Spans.of([b"5", text.encode(), b"7"])
    values, is_valid = spans.floats()
    whole, is_whole = spans.whole_numbers()
    assert is_valid[[0, 2]].all() and is_whole[[0, 2]].all()
    if text in NO_NUMBERS:
        assert math.isnan(value) and not is_valid[1] and not is_whole[1]
    else:
        assert value == values[1] == NUMBERS[text] and is_valid[1]
        assert is_whole[1] == (value == round(value)) and (not is_whole[1] or whole[1] == value)


@pytest.mark.parametrize(
    ("text", "grade"),
    [("1", 1), ("+1", 1), ("1.0", 1), ("02", 2), *((text, None) for text in NO_NUMBERS[2:11])],
)
def test_a_grade_is_read_alike_in_every_file(tmp_path, text, grade):
    cells = {
        "own.csv": f'query,document,label\nx,y,"{text}"\nx,z,0\nu,v,1\nu,w,0\n',
        "qrels.tsv": f"q 0 a 1\nq 0 b {text}\n",
        "beir.tsv": f"query-id\tcorpus-id\tscore\nq\tb\t{text}\n",
    }
    for name, content in cells.items():
        path = tmp_path / name
        path.write_text(content)

        def read(path=path):
            if path.suffix == ".csv":
                made = source(path, kind="ranking", validation=path)
                return made.examples("validation", 0)[0].label
            return qrels_of(path)["q"]["b"]

        if grade is None:
            with pytest.raises(InputError, match=rf"{name}:2: .* whole number"):
                read()
        else:
            assert read() == grade


def test_lines_are_those_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 7)
    rng = np.random.default_rng(0)
    pieces = ["", " ", "\t", "a", "é b", "\u3000", "\u3000x", "漢字", "\r", "x\r"]
    for _ in range(200):
        rows = rng.choice(pieces, rng.integers(1, 9)).tolist()
        content = "\n".join(rows) + rng.choice(["", "\n"])
        path = tmp_path / "f"
        path.write_bytes(content.encode())
        expected = [
            (line, row.removesuffix("\r"))
            for line, row in enumerate(content.split("\n"), 1)
            if row.strip()
        ]
        read = [
            (int(block.positions[i]), block.text(i))
            for block in read_lines(path)
            for i in range(len(block.starts))
        ]
        offsets = [int(offset) for block in read_lines(path) for offset in block.offsets]
        assert read == expected
        for (_, text), offset in zip(expected, offsets, strict=True):
            assert content.encode()[offset:].startswith(text.encode())
