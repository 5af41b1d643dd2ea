"""BEIR from its files."""

import gzip
import json

import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.source import DataOptions
from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.errors import InputError


@pytest.fixture
def beir(tmp_path, monkeypatch):
    folder = tmp_path / "scifact"
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        ("d1", "Wings", "They lift."),
        ("d2", "", "Heat flows."),
        ("q1", "The query", "itself"),
        ("é 4", "", ""),
    ]
    (folder / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": i, "title": title, "text": text, "metadata": {}}) + "\n"
            for i, title, text in corpus
        )
    )
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "what lifts"}\n'
        '{"_id": "q2", "text": "what flows"}\n'
        '{"_id": "q3", "text": "of another split"}\n'
    )
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\n")
    (folder / "run.test.tsv").write_text(
        "q1\td2\t1\nq1\tq1\t2\nq1\td1\t3\nq2\té 4\t1\n".replace("é 4", "d2")
    )
    monkeypatch.setenv("BEIR_DIR", str(tmp_path))

    def make(options=None, **changes):
        for name, content in changes.items():
            (folder / name.replace("__", ".").replace("qrels.", "qrels/")).write_text(content)
        source = registry.get("beir_scifact", options)
        source.check()
        return source

    return make


def test_published_files_are_read(beir, tmp_path):
    source = beir()
    first = source.examples("test", 0)
    # As in BEIR's own evaluation, the document with the query's id is no candidate.
    assert [(e.document_id, e.label, e.fields["document"]) for e in first] == [
        ("d2", 0, "Heat flows."),
        ("d1", 2, "Wings They lift."),
    ]
    assert source.size("test") == 2 and source.qrels("test") == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    plain = [source.examples("test", i) for i in range(2)]
    for path in (tmp_path / "scifact").rglob("*"):
        if path.is_file():
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
        zipped = beir()
        assert [zipped.examples("test", i) for i in range(2)] == plain


def test_run_option_selects_a_file(beir, tmp_path):
    (tmp_path / "bm25.test.trec").write_text("q2 Q0 d1 1 3 bm25\nq2 Q0 d2 2 1 bm25\n")
    source = beir(DataOptions(run=str(tmp_path / "bm25.{split}.trec")))
    assert [e.document_id for e in source.examples("test", 0)] == ["d1", "d2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qrels__test__tsv": "query-id\tcorpus-id\tscore\nq1\td9\t1\n"},
            r"qrels/test.tsv judges no document of corpus.jsonl; the first is _id 'd9' in line 2",
        ),
        (
            {"qrels__test__tsv": "query-id\tcorpus-id\tscore\nq1\td1\thigh\n"},
            r"qrels/test.tsv:2: relevance must be a whole number, got 'high'",
        ),
        (
            {"qrels__test__tsv": "query-id\tcorpus-id\tscore\nq1\td1\n"},
            r"qrels/test.tsv:2: expected 3 tab-separated columns",
        ),
        ({"qrels__test__tsv": "query-id\tcorpus-id\tscore\n"}, r"qrels/test.tsv is empty"),
        ({"run__test__tsv": "q1\td9\t1\n"}, r"run.test.tsv:1: _id 'd9' is not in corpus.jsonl"),
        (
            {"run__test__tsv": "q1\tq1\t1\nq1\td1\t1\nq1\td1\t1\n"},
            r"run.test.tsv:3: _id 'd1' appears a second time for _id 'q1'",
        ),
        ({"run__test__tsv": "q1\tq1\t1\n"}, r"run.test.tsv is empty"),
        ({"corpus__jsonl": '{"_id": "d1"}\n'}, r"corpus.jsonl:1: expected _id and text"),
        (
            {"corpus__jsonl": '{"_id": "d\\ud800", "text": "a"}\n'},
            r"corpus.jsonl:1: not valid Unicode \(surrogates not allowed\)",
        ),
        (
            {"corpus__jsonl": '{"_id": "d1", "text": "a \\udc00"}\n'},
            r"corpus.jsonl:1: not valid Unicode",
        ),
        (
            {"corpus__jsonl": "[" * 100_000},
            r"corpus.jsonl:1: not a JSON object \(it is nested too deeply",
        ),
    ],
)
def test_malformed_files_name_the_line(beir, changes, message):
    with pytest.raises(InputError, match=message):
        beir(**changes).size("test")


def test_missing_folders_are_errors(monkeypatch, tmp_path):
    monkeypatch.delenv("BEIR_DIR", raising=False)
    with pytest.raises(
        InputError, match="BEIR_DIR is not set; set it to a folder with trec-covid/corpus.jsonl"
    ):
        registry.get("beir_trec_covid").check()
    monkeypatch.setenv("BEIR_DIR", str(tmp_path))
    with pytest.raises(InputError, match="has no folder trec-covid"):
        registry.get("beir_trec_covid").check()
    (tmp_path / "trec-covid").mkdir()
    with pytest.raises(InputError, match=r"trec-covid has no corpus.jsonl \(or .gz, .zst\)"):
        registry.get("beir_trec_covid").check()


def test_judged_documents_that_the_corpus_lacks_stay(beir, caplog):
    """ArguAna judges some: BEIR's own evaluation counts them as relevant, but not retrieved."""
    rows = "q1\td1\t1\nq1\tlost\t2\nq2\tlost\t1\nq2\tgone\t0\nq9\tnowhere\t1\n"
    source = beir(qrels__test__tsv="query-id\tcorpus-id\tscore\n" + rows)
    qrels = source.qrels("test")
    assert qrels == {"q1": {"d1": 1, "lost": 2}, "q2": {"lost": 1, "gone": 0}}
    assert (
        "3 of 4 judgments are of documents that corpus.jsonl lacks (the first in line 3: "
        "_id 'lost')" in caplog.text
    )
    assert [(e.document_id, e.label) for e in source.examples("test", 0)] == [("d2", 0), ("d1", 1)]
    run = {query: [(e.document_id, 1.0)] for query in qrels for e in source.examples("test", 0)[1:]}
    values = ranking.compute_ranking_metrics(("recall@100",), qrels, run)
    assert values == {"recall@100": (1 / 2 + 0) / 2}


def test_queries_without_a_relevant_document_are_counted(beir, caplog):
    beir(
        qrels__test__tsv="query-id\tcorpus-id\tscore\nq1\td1\t0\nq2\té 4\t1\n",
        run__test__tsv="q1\td2\t1\nq2\td1\t1\nq3\td1\t1\n",
    ).size("test")
    assert (
        "beir_scifact: test split: of 3 queries, 1 have no judgment and enter no metric; 1 have no "
        "relevant document and count as 0; 1 have no relevant document among the candidates"
        in caplog.text
    )
    caplog.clear()
    beir(
        qrels__test__tsv="query-id\tcorpus-id\tscore\nq1\td1\t1\n", run__test__tsv="q1\td1\t1\n"
    ).size("test")
    assert "queries," not in caplog.text  # q2 and q3 belong to other splits
