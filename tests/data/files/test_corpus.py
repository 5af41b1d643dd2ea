"""Text collections: texts round-trip, and a cached index is never partial or stale."""

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
    st.characters(exclude_characters="\t\n\r\ufeff", exclude_categories=("Cs",)),
    min_size=1,
    max_size=12,
).filter(str.strip)
names = st.one_of(
    st.integers(0, 10**18 - 1).map(str),
    st.sampled_from(["007", "-1", "+5", "1e3", "½", "١", "a b"]),
    printable,
)


@st.composite
def collections(draw):
    """Texts with arbitrary or consecutive ids."""
    texts = draw(
        st.lists(
            st.tuples(names, printable), min_size=1, max_size=25, unique_by=lambda pair: pair[0]
        )
    )
    if draw(st.booleans()):
        first = draw(st.integers(0, 1000))
        texts = [(str(first + index), text) for index, (_, text) in enumerate(texts)]
    return texts


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """Caches files of any size in a temporary folder."""
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
def test_texts_round_trip(texts, end, last, block, how):
    content = (end.join("\t".join(pair) for pair in texts) + (end if last else "")).encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        patch.setenv("GEMMA_ENCODER_CACHE", f"{folder}/cache")
        path = Path(folder, "collection.tsv.gz" if how == "gz" else "collection.tsv")
        path.write_bytes(gzip.compress(content) if how == "gz" else content)
        read = Corpus(path, LAYOUT, in_memory=how == "memory")
        assert len(read) == len(texts)
        assert [(read.ids[index], read.text(index)) for index in range(len(read))] == texts
        assert all(
            read.ids.index(name) == index and read[name] == text
            for index, (name, text) in enumerate(texts)
        )
        valid_names = {name for name, _ in texts}
        assert all(
            (name in read) == (name in valid_names)
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
def test_json_lines_round_trip(texts):
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
        assert [(read.ids[index], read.text(index)) for index in range(len(read))] == [
            (name, text.strip()) for name, text in texts
        ]


def test_ids_with_equal_hashes_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Spans, "hashes", lambda self: (self.ends - self.starts).astype(np.uint64) % np.uint64(2)
    )
    rng = np.random.default_rng(0)
    stored = list({f"d{n}" for n in rng.integers(0, 10**6, 60)})
    writer = IdWriter(tmp_path, tmp_path / "f", "pid")
    for start in range(0, len(stored), 7):
        writer.add(Spans.of([name.encode() for name in stored[start : start + 7]]))
    writer.finish()
    ids = Ids(cache.load_arrays(tmp_path))
    asked = [*stored, "e1", "d", "", "d1000001"]
    assert list(ids.find(Spans.of([name.encode() for name in asked]))) == [
        *range(len(stored)),
        -1,
        -1,
        -1,
        -1,
    ]
    assert [ids[index] for index in range(len(stored))] == stored


@given(
    st.lists(
        st.one_of(st.integers(-(10**18) + 1, 10**18 - 1).map(str), st.text(max_size=5)),
        min_size=1,
        max_size=20,
    )
)
def test_integers_are_parsed_as_by_python(texts):
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
            b"1\ta\n\n2 b\n",
            r":3: expected 2 tab-separated columns, none empty \(pid, passage\); got 1: '2 b'",
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
def test_malformed_collections_name_the_line(tmp_path, monkeypatch, content, message, block):
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
def test_malformed_json_lines_name_the_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text('{"_id": "1", "text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"q.jsonl{message}"):
        Corpus(tmp_path / "q.jsonl", JsonLayout(may_be_empty=False))


def test_damaged_gz_files_are_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    whole = gzip.compress(b"".join(b"%d\ttext %d\n" % (i, i * i) for i in range(1000)))
    for index, content in enumerate(
        (whole[: len(whole) // 2], b"plain text\n", whole[:500] + b"\0" * 500)
    ):
        path = tmp_path / f"c{index}.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"c{index}.tsv.gz: damaged or truncated gzip file"):
            Corpus(path, LAYOUT)


def write(path, count, word="text"):
    path.write_text("".join(f"{i * 3}\t{word} {i}\n" for i in range(count)))
    return path


def entries(cache_folder):
    """Returns the entries of the cache, without fingerprints."""
    return [path for path in cache_folder.iterdir() if path.name != "fingerprints"]


def test_a_cached_index_is_reused_and_follows_the_file(cache_folder, tmp_path, monkeypatch):
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
    assert len(entries(cache_folder)) == 1  # the entry of the former content is removed


def test_changes_of_an_open_file_are_detected(tmp_path):
    path = write(tmp_path / "c.tsv", 50)
    texts = Corpus(path, LAYOUT)
    with path.open("r+") as file:
        file.write("9")
    with pytest.raises(InputError, match=r"c.tsv has changed since it was opened: line 1"):
        texts.text(0)
    os.truncate(path, 100)
    with pytest.raises(InputError, match="has changed since it was opened"):
        texts.text(49)


def test_changes_while_the_index_is_built_are_errors(cache_folder, tmp_path, monkeypatch):
    path = write(tmp_path / "c.tsv", 50)
    original = IdWriter.finish
    monkeypatch.setattr(IdWriter, "finish", lambda self: (write(path, 60), original(self)))
    with pytest.raises(
        InputError, match="c.tsv changed while the index of every pid was being built"
    ):
        Corpus(path, LAYOUT)
    assert not entries(cache_folder)


def test_a_crash_leaves_no_partial_entry(cache_folder, tmp_path, monkeypatch):
    path = write(tmp_path / "c.tsv", 50)
    with monkeypatch.context() as patch:
        patch.setattr(IdWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Corpus(path, LAYOUT)
    assert not entries(cache_folder)
    # The partial entry of a killed process is not used, and is removed after a day.
    partial = cache_folder / ".making-killed"
    partial.mkdir()
    os.utime(partial, (0, 0))
    assert Corpus(path, LAYOUT)["3"] == "text 1"
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_damaged_entry_is_rebuilt(cache_folder, tmp_path, damage):
    path = write(tmp_path / "c.tsv", 50)
    assert Corpus(path, LAYOUT)["3"] == "text 1"
    (entry,) = entries(cache_folder)
    for file in entry.iterdir():
        if damage == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        elif damage == "empty" or file.name.startswith("offsets"):
            file.unlink()
    assert Corpus(path, LAYOUT)["3"] == "text 1" and entries(cache_folder) == [entry]


def test_an_entry_with_a_flipped_bit_is_rebuilt(cache_folder, tmp_path, caplog):
    path = write(tmp_path / "c.tsv", 50)
    expected = {name: values.tolist() for name, values in Corpus(path, LAYOUT)._arrays.items()}
    (entry,) = entries(cache_folder)
    names = [file.name for file in sorted(entry.iterdir()) if file.stat().st_size]
    assert cache.digests.NAME in names and cache.CONTENTS in names
    for name in names:
        content = bytearray((entry / name).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / name).write_bytes(content)
        read = Corpus(path, LAYOUT)
        assert {name: values.tolist() for name, values in read._arrays.items()} == expected
        assert entries(cache_folder) == [entry]
    assert "is damaged: its content is not what was written; it is built again" in caplog.text


def test_an_entry_of_a_former_version_is_used(cache_folder, tmp_path, monkeypatch):
    """It has no digests; only its sizes are compared."""
    path = write(tmp_path / "c.tsv", 50)
    Corpus(path, LAYOUT)
    (entry,) = entries(cache_folder)
    (entry / cache.digests.NAME).unlink()
    (entry / cache.CONTENTS).write_text(json.dumps(cache._contents(entry)))
    monkeypatch.setattr(Corpus, "_build", None)
    assert Corpus(path, LAYOUT)["3"] == "text 1"


def test_no_changed_byte_changes_a_cached_fingerprint(cache_folder, tmp_path):
    path = write(tmp_path / "c.tsv", 50)
    first = cache.fingerprint(path)
    (memo,) = (cache_folder / "fingerprints").iterdir()
    content = memo.read_bytes()
    for position in range(len(content)):
        memo.write_bytes(content[:position] + b"1" + content[position + 1 :])
        assert cache.fingerprint(path) == first


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"stamp\nwrong\n", None])
def test_a_damaged_fingerprint_is_recomputed(cache_folder, tmp_path, content):
    path = write(tmp_path / "c.tsv", 50)
    first = cache.fingerprint(path)
    (memo,) = (cache_folder / "fingerprints").iterdir()
    if content is None:
        memo.unlink()
        memo.mkdir()
    else:
        memo.write_bytes(content)
    assert cache.fingerprint(path) == first


def test_an_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
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


def test_concurrent_builders_all_read_a_complete_index(cache_folder, tmp_path):
    path = write(tmp_path / "c.tsv", 5000)
    context = multiprocessing.get_context("forkserver")
    with (
        context.Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool,
    ):
        barrier = manager.Barrier(3)
        arguments = ([str(path)] * 3, [str(cache_folder)] * 3, [barrier] * 3)
        results = list(pool.map(open_and_read, *arguments))
    assert results == [[f"text {i}" for i in range(0, 5000, 617)]] * 3
    assert len(entries(cache_folder)) == 1


def test_threads_read_concurrently(tmp_path):
    texts = Corpus(write(tmp_path / "c.tsv", 2000), LAYOUT)
    asked = np.random.default_rng(0).integers(0, 2000, 4000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(texts.text, asked)) == [f"text {i}" for i in asked]


def test_an_open_index_survives_deletion(cache_folder, tmp_path):
    """Another process may replace an entry while this one reads it."""
    texts = Corpus(write(tmp_path / "c.tsv", 100), LAYOUT)
    shutil.rmtree(cache_folder)
    assert [texts[str(i * 3)] for i in range(100)] == [f"text {i}" for i in range(100)]


def test_release_frees_memory_of_readable_arrays(tmp_path):
    def resident():
        return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

    cache.save_array(tmp_path, "many", np.arange(4_000_000))
    many = cache.load_arrays(tmp_path)["many"]
    assert many.sum() == 4_000_000 * 3_999_999 // 2
    before = resident()
    cache.release([many, np.zeros(1)])
    assert before - resident() > 25_000  # kB, of 32,000
    assert many[3_999_999] == 3_999_999


def test_a_line_may_be_longer_than_a_block(tmp_path, monkeypatch):
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
def test_numbered_lines_match_the_file(texts, block):
    content = "\n".join(texts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        (Path(folder) / "f").write_bytes(content.encode())
        expected = [
            *(f"{text}\n" for text in texts[:-1]),
            *(texts[-1:] if texts and texts[-1] else []),
        ]
        expected = [
            text.removeprefix("\ufeff") if not index else text
            for index, text in enumerate(expected)
        ]
        assert list(lines.numbered(Path(folder) / "f")) == list(
            zip(itertools.count(1), expected, strict=False)
        )


@pytest.mark.parametrize("layout", [LAYOUT, JsonLayout(False)], ids=["tsv", "json"])
def test_the_first_text_follows_a_byte_order_mark(tmp_path, cache_folder, layout):
    line = '{"_id": "a", "text": "x"}' if layout is not LAYOUT else "a\tx"
    path = tmp_path / "collection"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\n{line.replace('a', 'b', 1)}\n".encode())
    corpus = Corpus(path, layout)
    assert [corpus.ids[i] for i in range(2)] == ["a", "b"]
    assert corpus["a"] == "x" and "\ufeffa" not in corpus
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match="is empty"):
        Corpus(path, layout)
