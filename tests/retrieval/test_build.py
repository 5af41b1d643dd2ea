"""Building an index: any kill loses a block at most, and the result is the same to the bit."""

import hashlib
import pathlib
import subprocess
import sys

import pytest

import gemma_encoder as ge
from gemma_encoder import cli
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval import build
from gemma_encoder.retrieval.blocks import block_path

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def contents(folder):
    """Digest of each file of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("options", [{}, {"precision": "int8", "width": 8}, {"kind": "bm25"}])
def test_a_killed_build_is_continued_to_the_bit(dense, collection, tmp_path, killed_after, options):
    path = collection(40)
    whole = ge.Index.build(dense, path, tmp_path / "WHOLE", block=8, **options)
    for count in range(9):  # description, blocks, digests, the folder
        output = tmp_path / f"INDEX{count}"
        try:
            with killed_after(count, KeyboardInterrupt()):
                ge.Index.build(dense, path, output, block=8, **options)
        except KeyboardInterrupt:
            assert not output.exists()
        ge.Index.build(dense, path, output, block=8, **options) if not output.exists() else None
        assert contents(output) == contents(whole.folder)
        assert not output.with_name(f"{output.name}.part").exists()
        assert not output.with_name(f"{output.name}.lock").exists()


def test_blocks_that_are_there_are_not_encoded_again(
    dense, collection, tmp_path, killed_after, monkeypatch, capsys
):
    path = collection(40)
    whole = ge.Index.build(dense, path, tmp_path / "WHOLE", block=8)
    with killed_after(4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        ge.Index.build(dense, path, tmp_path / "INDEX", block=8)
    part = tmp_path / "INDEX.part"
    damaged = block_path(part, 1)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    encoded = []
    encode = build._encode
    monkeypatch.setattr(build, "_encode", lambda *args: encoded.append(args[-1]) or encode(*args))
    index = ge.Index.build(dense, path, tmp_path / "INDEX", block=8)
    assert encoded == [1, 3, 4]
    assert "resuming after 16 documents" in capsys.readouterr().err
    assert contents(index.folder) == contents(whole.folder)


def test_a_start_with_other_settings_is_refused(
    dense, searcher, collection, tmp_path, killed_after
):
    path = collection(40)
    with killed_after(3, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        ge.Index.build(dense, path, tmp_path / "INDEX", block=8)
    cases = [
        (dense, path, {"width": 8}, "by another command .*width: 32 -> 8"),
        (searcher(seed=1), path, {}, "by another command .*digest: 'step 0, "),
        (dense, collection(41), {}, "by another command .*fingerprint: .*; count: 40 -> 41"),
    ]
    for model, source, options, message in cases:
        with pytest.raises(InputError, match=f"INDEX.part was left {message}.*; remove it"):
            ge.Index.build(model, source, tmp_path / "INDEX", **{"block": 8, **options})
    (tmp_path / "OTHER.part").mkdir()
    (tmp_path / "OTHER.part" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"OTHER.part exists and is no unfinished index"):
        ge.Index.build(dense, path, tmp_path / "OTHER")


def test_truncated_documents_are_counted_once(dense, tmp_path, caplog):
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"{i}\t{'stone ' * (70 if i % 3 else 1)}\n" for i in range(9)))
    ge.Index.build(dense, path, tmp_path / "INDEX", block=3)
    assert caplog.text.count("truncated") == 1
    assert "6 of 9 texts exceed max_length=64 tokens" in caplog.text
    dense.embed(["stone " * 70])
    assert "1 of 1 texts" in caplog.text


def test_two_processes_at_once_are_refused(dense, collection, tmp_path):
    path = collection(5)
    lock = tmp_path / "INDEX.lock"
    with (
        build.claim(lock, "it", "wait"),
        pytest.raises(InputError, match=r"INDEX is in use by process \d+ .*; wait for it"),
    ):
        ge.Index.build(dense, path, tmp_path / "INDEX")


@pytest.fixture(scope="module")
def exported(searcher, tmp_path_factory):
    """The folder of a model without tasks."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    ge.export_huggingface(searcher(), folder, heads=False)
    return folder


@pytest.mark.slow
def test_several_processes_build_the_same_index(exported, collection, tmp_path):
    path = collection(40)
    flags = [f"--model={exported}", f"--collection={path}", "--block=8"]
    launch = ["launch", "local", "--processes=2", "--devices_per_process=1", "--"]
    for prefix, output in (([], "ONE"), (launch, "TWO")):
        command = [*prefix, "index", *flags, f"--output={tmp_path / output}"]
        done = subprocess.run(
            [sys.executable, "-m", "gemma_encoder", *command],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"wrote {tmp_path / output}, 40 documents") == 1
    assert contents(tmp_path / "ONE") == contents(tmp_path / "TWO")


def test_the_commands_index_search_and_evaluate(exported, collection, tmp_path, capsys):
    path = collection(40)
    queries = tmp_path / "queries.tsv"
    queries.write_text("q1\triver stone 3\nq 2\tmarble 5\n")
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("q1\t0\tp3\t1\nq 2\t0\tp5\t1\n")
    index = ["index", f"--collection={path}"]
    assert cli.main([*index, f"--model={exported}", f"--output={tmp_path / 'INDEX'}"]) == 0
    assert cli.main([*index, "--kind=bm25", f"--output={tmp_path / 'BM25'}"]) == 0
    search = ["search", f"--queries={queries}", f"--qrels={qrels}", "--k=5"]
    both = f"{tmp_path / 'INDEX'},{tmp_path / 'BM25'}"
    for name, folders in (("dense.trec", tmp_path / "INDEX"), ("both.tsv", both)):
        assert cli.main([*search, f"--index={folders}", f"--output={tmp_path / name}"]) == 0
    words = [*search, f"--index={tmp_path / 'BM25'}", f"--output={tmp_path / 'bm25.trec'}"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "recall@100 1.000" in lines[-3] and "mrr@10     1.000" in lines[-2]
    assert lines[-4] == f"wrote {tmp_path / 'bm25.trec'}, 2 queries"
    trec = (tmp_path / "bm25.trec").read_text().splitlines()
    assert trec[0].startswith("q1 Q0 p3 1 ") and any(line.startswith("q%202 ") for line in trec)
    assert all(len(line.split("\t")) == 3 for line in (tmp_path / "both.tsv").open())
    assert len((tmp_path / "dense.trec").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "--collection=c.tsv", "--output=x"], "--model is missing"),
        (["index", "--model=m", "--output=x"], "--collection is missing"),
        (["index", "--model=m", "--collection=c.tsv"], "--output is missing"),
        (["index", "--model=absent", "--collection=c.tsv", "--output=x"], "does not exist"),
        (["index", "--kind=bm25", "--collection=c.tsv", "--output=x"], "there is no such file"),
        (["search", "--queries=q.tsv", "--output=x.trec"], "--index is missing"),
        (["search", "--index=i", "--output=x.trec"], "--queries is missing"),
        (["search", "--index=i", "--queries=q.tsv", "--output=x.trec"], "i is no index"),
        (["mine", "--qrels=q.tsv", "--output=x"], "--run is missing"),
        (["mine", "--run=r", "--qrels=q.tsv", "--output=x", "--ranks=0-3"], "expected FIRST-LAST"),
        (["mine", "--run=r", "--qrels=q.tsv", "--output=x"], "--run=r: there is no such file"),
    ],
)
def test_commands_refuse_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
