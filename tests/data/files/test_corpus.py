"""The offset index: every text reads back as the file has it, and a kept index is never half, stale or another file's."""

import concurrent.futures
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.data import cache
from gemma_encoder.data.files import lines
from gemma_encoder.data.files.corpus import Corpus, Ids, IdWriter, TsvLayout
from gemma_encoder.data.files.lines import Spans
from gemma_encoder.data.tasks.beir import JsonLayout
from gemma_encoder.inputs.errors import InputError

LAYOUT = TsvLayout("pid", "passage")

printable = st.text(
    st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)), min_size=1, max_size=12
).filter(str.strip)
names = st.one_of(
    st.integers(0, 10**18 - 1).map(str),
    st.sampled_from(["007", "-1", "+5", "1e3", "½", "١", "a b"]),
    printable,
)


@st.composite
def collections(draw):
    """Ids with texts, ids either arbitrary or counting."""
    texts = draw(
        st.lists(
            st.tuples(names, printable), min_size=1, max_size=25, unique_by=lambda pair: pair[0]
        )
    )
    if draw(st.booleans()):
        first = draw(st.integers(0, 1000))
        texts = [(str(first + number), text) for number, (_, text) in enumerate(texts)]
    return texts


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Everything is kept, however small, in a folder of the test's own."""
    monkeypatch.setattr(cache, "KEEP_FROM", 0)
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(
    collections(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from([1, 7, 64, 1 << 20]),
    st.sampled_from(["plain", "gz", "memory"]),
)
def test_every_text_reads_back(texts, end, last, block, how):
    content = (end.join("\t".join(pair) for pair in texts) + (end if last else "")).encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        patch.setenv("GEMMA_ENCODER_CACHE", f"{folder}/cache")
        path = Path(folder, "collection.tsv.gz" if how == "gz" else "collection.tsv")
        path.write_bytes(gzip.compress(content) if how == "gz" else content)
        read = Corpus(path, LAYOUT, in_memory=how == "memory")
        assert len(read) == len(texts)
        assert [(read.ids[number], read.text(number)) for number in range(len(read))] == texts
        assert all(
            read.ids.index(name) == number and read[name] == text
            for number, (name, text) in enumerate(texts)
        )
        known = {name for name, _ in texts}
        assert all(
            (name in read) == (name in known)
            for name in ("0", "1", "007", "99999", "-1", "", "a", "10" * 12)
        )


@given(
    st.lists(
        st.tuples(names, st.text(st.characters(exclude_categories=("Cs",)), max_size=20)),
        min_size=1,
        max_size=20,
        unique_by=lambda pair: pair[0],
    )
)
def test_json_lines_read_back(texts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.jsonl")
        path.write_text(
            "".join(
                json.dumps(
                    {"_id": name, "title": "", "text": text}, ensure_ascii=len(name) % 2 == 0
                )
                + "\n"
                for name, text in texts
            )
        )
        read = Corpus(path, JsonLayout(may_be_empty=True))
        assert [(read.ids[number], read.text(number)) for number in range(len(read))] == [
            (name, text.strip()) for name, text in texts
        ]


def test_ids_that_share_a_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Spans, "hashes", lambda self: (self.ends - self.starts).astype(np.uint64) % np.uint64(2)
    )
    rng = np.random.default_rng(0)
    known = list({f"d{n}" for n in rng.integers(0, 10**6, 60)})
    writer = IdWriter(tmp_path, tmp_path / "f", "pid")
    for start in range(0, len(known), 7):
        writer.add(Spans.of([name.encode() for name in known[start : start + 7]]))
    writer.finish()
    ids = Ids(cache.load_arrays(tmp_path))
    asked = [*known, "e1", "d", "", "d1000001"]
    assert list(ids.find(Spans.of([name.encode() for name in asked]))) == [
        *range(len(known)),
        -1,
        -1,
        -1,
        -1,
    ]
    assert [ids[number] for number in range(len(known))] == known


@given(
    st.lists(
        st.one_of(st.integers(-(10**18) + 1, 10**18 - 1).map(str), st.text(max_size=5)),
        min_size=1,
        max_size=20,
    )
)
def test_whole_numbers_are_read_as_python_reads_them(texts):
    values, valid = Spans.of([text.encode() for text in texts]).integers()
    for text, value, good in zip(texts, values, valid, strict=True):
        plain = text.removeprefix("-")
        assert good == (plain.isascii() and plain.isdigit() and len(plain) <= 18)
        if good:
            assert value == int(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"1\ta\n\n2\tb\n",
            r":2: expected 2 tab-separated columns, none empty \(pid, passage\); got 1: ''",
        ),
        (b"1\ta\n2 b\n", r":2: expected 2 .* got 1: '2 b'"),
        (b"1\ta\tb\n", r":1: .*got 3"),
        (b"1\t\ta\n", r":1: .*got 3"),
        (b"\t1\ta\n", r":1: .*got 3"),
        (b"1\ta\t\n", r":1: .*got 3"),
        (b"\ta\n", r":1: .*got 2"),
        (b"1\t\n2\tb\n", r":1: .*got 2"),
        ("1\ta\n2\t \u3000\n".encode(), r":2: .*got 2"),
        (
            b"1\ta\n2\tb\n3\t\xc3\n4\td\n",
            r":3: not valid UTF-8 \(invalid continuation byte at byte 2 of the line\)",
        ),
        (b"1\ta\n2\tb\n1\tc\n2\td\n", r":3: pid '1' appears a second time"),
        (b"x\ta\ny\tb\ny\tc\n", r":3: pid 'y' appears a second time"),
    ],
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_bad_collections_are_refused_by_line(tmp_path, monkeypatch, content, message, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    (tmp_path / "c.tsv").write_bytes(content)
    with pytest.raises(
        InputError, match="c.tsv" + (message if message.startswith(":") else f" {message}")
    ):
        Corpus(tmp_path / "c.tsv", LAYOUT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nothing", ":2: not a JSON object"),
        ("[1]", ":2: expected a JSON object with _id and text"),
        (
            '{"_id": 3, "text": "a"}',
            ":2: expected _id and text, and title if there is one, as strings",
        ),
        ('{"_id": "3"}', ":2: expected _id and text"),
        ('{"_id": "3", "text": " "}', ":2: the text of '3' is empty"),
        ('{"_id": "1", "text": "b"}', ":2: _id '1' appears a second time"),
    ],
)
def test_bad_json_lines_are_refused_by_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text('{"_id": "1", "text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"q.jsonl{message}"):
        Corpus(tmp_path / "q.jsonl", JsonLayout(may_be_empty=False))


def test_a_broken_gz_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    whole = gzip.compress(b"".join(b"%d\ttext %d\n" % (i, i * i) for i in range(1000)))
    for number, content in enumerate(
        (whole[: len(whole) // 2], b"plain text\n", whole[:500] + b"\0" * 500)
    ):
        path = tmp_path / f"c{number}.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"c{number}.tsv.gz: damaged or truncated gzip file"):
            Corpus(path, LAYOUT)


def write(path, count, word="text"):
    path.write_text("".join(f"{i * 3}\t{word} {i}\n" for i in range(count)))
    return path


def folders(kept):
    """What is cached, fingerprints apart."""
    return [path for path in kept.iterdir() if path.name != "fingerprints"]


def test_a_kept_index_is_used_again_and_follows_the_file(kept, tmp_path, monkeypatch):
    path = write(tmp_path / "c.tsv", 50)
    built = []
    original = IdWriter.finish
    monkeypatch.setattr(IdWriter, "finish", lambda self: (built.append(1), original(self)))
    assert Corpus(path, LAYOUT)["147"] == "text 49"
    assert Corpus(path, LAYOUT)["147"] == "text 49" and len(built) == 1
    facts = path.stat()
    write(path, 50, "Text")  # as long as before, and as old
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert Corpus(path, LAYOUT)["147"] == "Text 49" and len(built) == 2
    write(path, 51)
    assert Corpus(path, LAYOUT)["150"] == "text 50" and len(built) == 3
    assert len(folders(kept)) == 1  # what was kept for the file as it was is gone


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path):
    path = write(tmp_path / "c.tsv", 50)
    texts = Corpus(path, LAYOUT)
    with path.open("r+") as file:
        file.write("9")
    with pytest.raises(InputError, match=r"c.tsv has changed since it was opened: line 1"):
        texts.text(0)
    os.truncate(path, 100)
    with pytest.raises(InputError, match="has changed since it was opened"):
        texts.text(49)


def test_a_file_that_changes_while_its_index_is_made_is_refused(kept, tmp_path, monkeypatch):
    path = write(tmp_path / "c.tsv", 50)
    original = IdWriter.finish
    monkeypatch.setattr(IdWriter, "finish", lambda self: (write(path, 60), original(self)))
    with pytest.raises(
        InputError, match="c.tsv changed while the index of every pid was being built"
    ):
        Corpus(path, LAYOUT)
    assert not folders(kept)


def test_a_crash_leaves_nothing_and_the_next_try_is_whole(kept, tmp_path, monkeypatch):
    path = write(tmp_path / "c.tsv", 50)
    with monkeypatch.context() as patch:
        patch.setattr(IdWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Corpus(path, LAYOUT)
    assert not folders(kept)
    half = (
        kept / ".making-killed"
    )  # what a kill leaves is not taken for an index, and goes after a day
    half.mkdir()
    os.utime(half, (0, 0))
    assert Corpus(path, LAYOUT)["3"] == "text 1"
    assert not half.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_an_entry_that_lost_a_part_is_made_anew(kept, tmp_path, damage):
    path = write(tmp_path / "c.tsv", 50)
    assert Corpus(path, LAYOUT)["3"] == "text 1"
    (entry,) = folders(kept)
    for file in entry.iterdir():
        if damage == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        elif damage == "empty" or file.name.startswith("offsets"):
            file.unlink()
    assert Corpus(path, LAYOUT)["3"] == "text 1" and folders(kept) == [entry]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"stamp\nwrong\n", None])
def test_a_damaged_fingerprint_is_computed_anew(kept, tmp_path, content):
    path = write(tmp_path / "c.tsv", 50)
    first = cache.fingerprint(path)
    (memo,) = (kept / "fingerprints").iterdir()
    if content is None:
        memo.unlink()
        memo.mkdir()
    else:
        memo.write_bytes(content)
    assert cache.fingerprint(path) == first


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEEP_FROM", 0)
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(InputError, match="cannot cache .* in .*occupied.*GEMMA_ENCODER_CACHE"):
        Corpus(write(tmp_path / "c.tsv", 5), LAYOUT)


def open_and_read(path, folder, barrier):
    os.environ["GEMMA_ENCODER_CACHE"] = folder
    cache.KEEP_FROM = 0
    barrier.wait()
    texts = Corpus(Path(path), LAYOUT)
    return [texts[str(i * 3)] for i in range(0, 5000, 617)]


def test_processes_that_build_at_once_all_read_a_whole_index(kept, tmp_path):
    path = write(tmp_path / "c.tsv", 5000)
    context = multiprocessing.get_context("forkserver")
    with (
        context.Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool,
    ):
        barrier = manager.Barrier(3)
        results = list(pool.map(open_and_read, [str(path)] * 3, [str(kept)] * 3, [barrier] * 3))
    assert results == [[f"text {i}" for i in range(0, 5000, 617)]] * 3
    assert len(folders(kept)) == 1


def test_threads_read_at_once(tmp_path):
    texts = Corpus(write(tmp_path / "c.tsv", 2000), LAYOUT)
    asked = np.random.default_rng(0).integers(0, 2000, 4000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(texts.text, asked)) == [f"text {i}" for i in asked]


def test_an_index_does_not_need_its_files_names(kept, tmp_path):
    """A second process may replace what is kept while this one reads."""
    texts = Corpus(write(tmp_path / "c.tsv", 100), LAYOUT)
    shutil.rmtree(kept)
    assert [texts[str(i * 3)] for i in range(100)] == [f"text {i}" for i in range(100)]


def test_released_memory_is_given_back_and_the_arrays_still_read(tmp_path):
    def resident():
        return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

    cache.save_array(tmp_path, "many", np.arange(4_000_000))
    many = cache.load_arrays(tmp_path)["many"]
    assert many.sum() == 4_000_000 * 3_999_999 // 2
    before = resident()
    cache.release([many, np.zeros(1)])
    assert before - resident() > 25_000  # kB, of 32,000
    assert many[3_999_999] == 3_999_999


def test_a_line_longer_than_a_block_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 100)
    long = "word " * 5000 + "end"
    (tmp_path / "c.tsv").write_text(f"a\tshort\nb\t{long}\nc\tlast")
    texts = Corpus(tmp_path / "c.tsv", LAYOUT)
    assert [texts[name] for name in "abc"] == ["short", long, "last"]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), max_size=8),
        max_size=12,
    ),
    st.integers(1, 30),
)
def test_numbered_lines_are_those_of_the_file(texts, block):
    content = "\n".join(texts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        (Path(folder) / "f").write_bytes(content.encode())
        expected = [
            *(f"{text}\n" for text in texts[:-1]),
            *(texts[-1:] if texts and texts[-1] else []),
        ]
        expected = [
            text.removeprefix("\ufeff") if not place else text
            for place, text in enumerate(expected)
        ]
        assert list(lines.numbered(Path(folder) / "f")) == list(
            zip(itertools.count(1), expected, strict=False)
        )
