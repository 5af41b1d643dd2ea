"""Compact runs and qrels."""

import json

import numpy as np
import pytest

from gemma_encoder.data import cache
from gemma_encoder.data.files import lines, run_lines, runs
from gemma_encoder.data.files.corpus import Corpus, TsvLayout
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.tasks.beir import JsonLayout
from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.errors import InputError


def texts(path, id_name, count, first=None):
    """Writes a file of texts with consecutive integers or arbitrary words as ids."""
    names = [
        str(first + i) if first is not None else f"{id_name}-{i * 7919 % 1000003:x}"
        for i in range(count)
    ]
    path.write_text("".join(f"{name}\ttext {name}\n" for name in names))
    return names, Corpus(path, TsvLayout(id_name, "text"))


@pytest.mark.parametrize("kind", ["marco", "trec", "top1000"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("first", [0, None])
@pytest.mark.parametrize("cached", [True, False])
def test_compact_candidates_match_a_reference(tmp_path, monkeypatch, kind, grouped, first, cached):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEEP_FROM", 0 if cached else 1 << 30)
    monkeypatch.setattr(runs, "PART", 500)  # many parts
    monkeypatch.setattr(lines, "BLOCK", 333)
    rng = np.random.default_rng(1)
    queries, query_texts = texts(tmp_path / "queries.tsv", "qid", 17, first)
    documents, document_texts = texts(tmp_path / "collection.tsv", "pid", 60, first)
    entries = [
        (q, d, rank)
        for q in queries[:-2]
        for rank, d in enumerate(rng.permutation(documents)[: rng.integers(1, 40)], 1)
    ]  # two queries without candidates
    entries = entries if grouped else [entries[i] for i in rng.permutation(len(entries))]
    written = {
        "marco": "{0}\t{1}\t{2}\n",
        "trec": "{0} Q0 {1}  0 {3:.6f} tag\n",  # ranks that say nothing, as BEIR writes them
        "top1000": "{0}\t{1}\ta query\ta passage of its own\r\n",
    }[kind]
    (tmp_path / "run").write_text(
        "".join(written.format(q, d, rank, 1 / rank) for q, d, rank in entries), newline=""
    )
    naive = {q: [] for q in queries}
    for line, (q, d, rank) in enumerate(entries):
        naive[q].append((rank if kind != "top1000" else line, d))
    for _ in range(2):  # the second time from the cache
        compact = Candidates(tmp_path / "run", query_texts, document_texts)
        assert {q: [documents[d] for d in compact.of(i)] for i, q in enumerate(queries)} == {
            q: [d for _, d in sorted(ranked)] for q, ranked in naive.items()
        }
        assert compact.counts().tolist() == [len(naive[q]) for q in queries]


def test_cached_candidates_depend_on_every_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEEP_FROM", 0)
    run = tmp_path / "run"
    collection = tmp_path / "c.tsv"
    (tmp_path / "q.tsv").write_text("q\tquery\n")
    collection.write_text("a\tx\nb\ty\n")

    def read():
        documents = Corpus(collection, TsvLayout("pid", "passage"))
        return [
            documents.ids[d]
            for d in Candidates(
                run, Corpus(tmp_path / "q.tsv", TsvLayout("qid", "query")), documents
            ).of(0)
        ]

    run.write_text("q a 1\nq b 2\n")
    assert read() == ["a", "b"]
    run.write_text("q b 1\nq a 2\n")
    assert read() == ["b", "a"]
    collection.write_text("b\ty\na\tx\n")  # the indices of both documents change
    assert read() == ["b", "a"]


def test_compact_qrels_match_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 100)
    rng = np.random.default_rng(2)
    queries, query_texts = texts(tmp_path / "queries.tsv", "qid", 20, 5)
    documents, document_texts = texts(tmp_path / "collection.tsv", "pid", 30)
    naive = {
        q: {
            d: int(rng.integers(-1, 4))
            for d in rng.choice(documents, rng.integers(1, 9), replace=False)
        }
        for q in queries[::2]
    }
    written = [(q, d, grade) for q, grades in naive.items() for d, grade in grades.items()]
    written = [written[i] for i in rng.permutation(len(written))]
    (tmp_path / "trec").write_text("".join(f"{q} Q0 {d} {grade}\n" for q, d, grade in written))
    (tmp_path / "beir.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in written)
    )
    for name in ("trec", "beir.tsv"):
        qrels = Qrels(tmp_path / name, query_texts, document_texts)
        assert qrels.by_id(np.arange(20)) == naive
        assert qrels.positives.tolist() == [
            sum(grade > 0 for grade in naive.get(q, {}).values()) for q in queries
        ]


SCORED = "q Q0 a 1 -3e2 t\nq Q0 b 2 0.5 t\nq Q0 c 3 1.5E+1 t\nq Q0 d 4 -0.25 t\nq Q0 e 5 .5 t\n"


@pytest.mark.parametrize("block", [20, 1 << 20])
def test_trec_runs_are_in_the_order_of_their_scores(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    (tmp_path / "q.tsv").write_text("q\tquery\n")
    (tmp_path / "c.tsv").write_text("".join(f"{name}\ttext\n" for name in "abcde"))
    queries = Corpus(tmp_path / "q.tsv", TsvLayout("qid", "query"))
    documents = Corpus(tmp_path / "c.tsv", TsvLayout("pid", "passage"))
    run = tmp_path / "run.trec"
    run.write_text(SCORED)
    order = [documents.ids[d] for d in Candidates(run, queries, documents).of(0)]
    assert order == ["c", "b", "e", "d", "a"]  # b and e have one score: file order
    for score in ("first", "nan", "inf", "1,5"):
        run.write_text(SCORED.replace("1.5E+1", score))
        with pytest.raises(InputError, match=f"run.trec:3: score must be a finite .*{score}"):
            Candidates(run, queries, documents)


def test_keys_of_scores_sort_in_descending_order():
    values = np.array([0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, 1e-30], np.float32)
    keys = run_lines._descending(values)
    assert keys.dtype == np.int32 and keys[0] == keys[1]
    np.testing.assert_array_equal(values[np.argsort(keys, kind="stable")], np.sort(values)[::-1])


def test_scores_of_a_run_are_stored_and_read_back(tmp_path):
    values = np.array([0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, 1e-30, 12.3456], np.float32)
    np.testing.assert_array_equal(run_lines.from_descending(run_lines._descending(values)), values)
    (tmp_path / "q.tsv").write_text("p\tquery\nq\tquery\n")
    (tmp_path / "c.tsv").write_text("".join(f"{name}\ttext\n" for name in "abc"))
    queries = Corpus(tmp_path / "q.tsv", TsvLayout("qid", "query"))
    documents = Corpus(tmp_path / "c.tsv", TsvLayout("pid", "passage"))
    run = tmp_path / "run.trec"
    run.write_text("q Q0 a 1 -2.5 t\nq Q0 b 2 7.25 t\np Q0 c 1 1e-3 t\n")
    candidates = Candidates(run, queries, documents)
    assert candidates.scores_of(1).tolist() == [7.25, -2.5] and candidates.of(1).tolist() == [1, 0]
    assert candidates.scores_of(0).tolist() == [np.float32(1e-3)]
    run.write_text("q\ta\t1\n")
    with pytest.raises(InputError, match=r"run.trec has no scores; a run in TREC's format has"):
        Candidates(run, queries, documents).scores_of(1)


BLANK_IDS = ["query 0", "My File 0.pdf", "a b", "a%20b", "100%", "100 %", "tab\u00a0\u3000x", "q"]


def blank_ids(folder, name, id_name):
    """Returns a BEIR-like collection whose ids have blanks."""
    path = folder / name
    path.write_text(
        "".join(json.dumps({"_id": i, "title": "", "text": i}) + "\n" for i in BLANK_IDS)
    )
    layout = JsonLayout(may_be_empty=False)
    layout.id_name = id_name
    return Corpus(path, layout)


def test_files_of_ours_with_blanks_in_ids_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    queries = blank_ids(tmp_path, "queries.jsonl", "qid")
    documents = blank_ids(tmp_path, "corpus.jsonl", "pid")
    pairs = [(query, document) for query in BLANK_IDS for document in BLANK_IDS]
    scores = np.random.default_rng(0).permutation(len(pairs)).astype(np.float32)
    run = ranking.make_run(*zip(*pairs, strict=True), scores)
    for tag in ("gemma_encoder", "first_stage", ""):
        (tmp_path / "run.trec").write_text("".join(ranking.trec_lines(run, tag)))
        read = Candidates(tmp_path / "run.trec", queries, documents)
        order = {q: [documents.ids[d] for d in read.of(i)] for i, q in enumerate(BLANK_IDS)}
        assert order == {q: [document for document, _ in ranked] for q, ranked in run.items()}


def test_ids_of_external_files_are_taken_as_they_are(tmp_path):
    queries = blank_ids(tmp_path, "queries.jsonl", "qid")
    documents = blank_ids(tmp_path, "corpus.jsonl", "pid")
    (tmp_path / "run").write_text("100% Q0 a%20b 1 2 bm25\n100% Q0 100% 2 1 bm25\n")
    (tmp_path / "qrels").write_text("100% 0 a%20b 1\nquery%200 0 My%20File%200.pdf 1\n")
    read = Candidates(tmp_path / "run", queries, documents)
    assert [documents.ids[d] for d in read.of(BLANK_IDS.index("100%"))] == ["a%20b", "100%"]
    qrels = Qrels(tmp_path / "qrels", queries, documents)
    grades = {"100%": {"a%20b": 1}, "query 0": {"My File 0.pdf": 1}}
    assert qrels.by_id(np.arange(len(BLANK_IDS))) == dict(sorted(grades.items(), reverse=True))


@pytest.mark.parametrize("block", [1 << 20, 20])
@pytest.mark.parametrize(
    "line", ["{}\t{}\t{}\n", "{}\tQ0\t{}\t0\t-{}\tthe tag\n", "{}\tQ0\t{}\t0\t-{}\ttag\n"]
)
def test_ids_between_tabs_may_contain_blanks(tmp_path, monkeypatch, line, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    queries = Corpus(_json_texts(tmp_path / "q.jsonl", ["query 0", "q1"]), JsonLayout(False))
    ids = ["My File 0.pdf", "other.pdf", "a  b"]
    documents = Corpus(_json_texts(tmp_path / "d.jsonl", ids), JsonLayout(False))
    entries = [(0, 2, 1), (0, 1, 2), (1, 1, 1), (0, 0, 3), (1, 0, 2)]
    text = "".join(line.format(["query 0", "q1"][q], ids[d], rank) for q, d, rank in entries)
    (tmp_path / "run.tsv").write_text(text)
    compact = Candidates(tmp_path / "run.tsv", queries, documents)
    assert [compact.of(query).tolist() for query in range(2)] == [[2, 1, 0], [1, 0]]
    (tmp_path / "qrels.tsv").write_text("query 0\t0\tMy File 0.pdf\t1\nq1\t0\tother.pdf\t2\n")
    qrels = Qrels(tmp_path / "qrels.tsv", queries, documents)
    assert qrels.by_id(np.arange(2)) == {"query 0": {ids[0]: 1}, "q1": {"other.pdf": 2}}


def test_scores_beyond_float32_are_refused(tmp_path):
    _, queries = texts(tmp_path / "q.tsv", "qid", 1, 0)
    _, documents = texts(tmp_path / "d.tsv", "pid", 2, 0)
    (tmp_path / "run").write_text("0 Q0 0 1 1e38 t\n0 Q0 1 2 1e39 t\n")
    with pytest.raises(InputError, match="run:2: score must be a finite number, got '1e39'"):
        Candidates(tmp_path / "run", queries, documents)


def _json_texts(path, ids):
    path.write_text("".join(json.dumps({"_id": name, "text": "a"}) + "\n" for name in ids))
    return path
