"""MS MARCO and the TREC Deep Learning tracks from their files: lists, candidates and errors."""

import gzip
import pathlib

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.pipeline import training_order
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.data.tasks.msmarco import MsMarcoSource
from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError

FILES = {
    "collection.tsv": "10\ta passage on wings\n11\ta passage on heat\n"
    "12\tone on flutter\n13\tone on shells\n",
    "queries.train.tsv": "1\twhat are wings\n2\twhat is heat\n3\tno positive here\n",
    "qrels.train.tsv": "1\t0\t10\t1\n2\t0\t11\t2\n3\t0\t12\t0\n",
    "run.train.tsv": "1\t11\t1\n1\t10\t2\n1\t12\t3\n1\t13\t4\n2\t11\t1\n2\t12\t2\n3\t10\t1\n",
    "queries.dev.tsv": "7\tflutter of wings\n8\tnever retrieved\n",
    "qrels.dev.tsv": "7\t0\t12\t1\n8\t0\t13\t1\n",
    "run.dev.tsv": "7\t12\t2\n7\t10\t1\n",
}


def query_ids(source, split):
    return [source.opened(split).queries.ids[query] for query in source.queries(split)]


@pytest.fixture
def marco(tmp_path, monkeypatch):
    def make(options=None, **changes) -> MsMarcoSource:
        changes = {name.replace("__", "."): content for name, content in changes.items()}
        for name, content in (FILES | changes).items():
            path = tmp_path / name
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setenv("MSMARCO_DIR", str(tmp_path))
        source = registry.get("msmarco", options or DataOptions(list_size=3))
        source.check()
        return source

    return make


def content_of(source):
    """All that a source reads from its files."""
    return [
        (query_ids(source, split), source.qrels(split), source.examples(split, index))
        for split in ("train", "validation")
        for index in range(source.size(split))
    ]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_byte_order_mark_changes_nothing(marco, tmp_path, name, compressed):
    """Files saved on Windows start with one; it is no part of the first id."""
    plain = content_of(marco())
    marked = b"\xef\xbb\xbf" + FILES[name].encode()
    if compressed:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(marked))
    changes = {name.replace(".", "__"): None if compressed else marked}
    assert content_of(marco(**changes)) == plain


def test_training_lists_have_one_positive_and_negatives(marco):
    source = marco()
    assert query_ids(source, "train") == ["1", "2"]  # query 3 has no positive
    for draw in range(20):
        examples = source.examples("train", 0, np.random.default_rng(draw))
        assert [e.label for e in examples] == [1, 0, 0]
        assert examples[0].document_id == "10" and len({e.document_id for e in examples}) == 3
        assert examples[0].fields == {"query": "what are wings", "document": "a passage on wings"}
    drawn = {
        tuple(e.document_id for e in source.examples("train", 0, np.random.default_rng(i))[1:])
        for i in range(20)
    }
    assert len(drawn) > 1
    assert [e.label for e in source.examples("train", 1, np.random.default_rng(0))] == [
        2,
        0,
    ]  # a shorter list: one negative


def test_negative_ranks_limit_the_negatives(marco):
    source = marco(DataOptions(list_size=8, negative_ranks=(3, 4)))
    assert {e.document_id for e in source.examples("train", 0, np.random.default_rng(0))[1:]} == {
        "12",
        "13",
    }


def test_evaluation_keeps_the_order_of_the_run(marco):
    source = marco()
    assert [e.document_id for e in source.examples("validation", 0)] == ["10", "12"]
    assert source.qrels("validation") == {
        "7": {"12": 1},
        "8": {"13": 1},
    }  # a query without candidates counts as zero
    assert source.qrels("train").keys() == {"1", "2", "3"}


def test_top1000_replaces_a_missing_run(marco):
    source = marco(
        run__dev__tsv=None,
        top1000__dev__tsv="7\t12\tflutter of wings\tone on flutter\n"
        "7\t10\tflutter of wings\ta passage on wings\n",
    )
    assert [e.document_id for e in source.examples("validation", 0)] == ["12", "10"]


def test_long_passages_are_read_completely(marco):
    long = "word " * 5000 + "end"
    source = marco(collection__tsv=f"10\tshort\n11\t{long}\n12\tlast without newline")
    assert source.passages["11"] == long
    assert source.passages["12"] == "last without newline"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"collection__tsv": "10\ta\n11 no tab\n"},
            r"collection.tsv:2: expected 2 tab-separated columns.*pid, passage",
        ),
        (
            {"collection__tsv": "10\ta\n10\tb\n"},
            r"collection.tsv:2: pid '10' appears a second time",
        ),
        ({"collection__tsv": b"10\t\xff\xfe\n"}, r"collection.tsv:1: not valid UTF-8"),
        ({"queries__train__tsv": "1\t \n"}, r"queries.train.tsv:1: expected 2"),
        (
            {"qrels__train__tsv": "1\t0\t10\tyes\n"},
            r"qrels.train.tsv:1: relevance must be a whole number, got 'yes'",
        ),
        ({"run__train__tsv": "1\t99\t1\n"}, r"run.train.tsv:1: pid '99' is not in collection.tsv"),
        (
            {"run__train__tsv": "77\t10\t1\n"},
            r"run.train.tsv:1: qid '77' is not in queries.train.tsv",
        ),
        (
            {"qrels__train__tsv": "1\t0\t98\t1\n1\t0\t99\t1\n"},
            r"qrels.train.tsv judges no document of collection.tsv; the first is pid '98'",
        ),
        (
            {"qrels__train__tsv": "1\t0\t10\t1\n2\t0\t11\t1\n1\t0\t10\t0\n"},
            r"qrels.train.tsv:3: pid '10' is judged a second time for qid '1', with another",
        ),
        (
            {"qrels__train__tsv": "77\t0\t10\t1\n"},
            r"qrels.train.tsv judges no query of queries.train.tsv",
        ),
        ({"qrels__train__tsv": ""}, r"qrels.train.tsv is empty"),
        (
            {"qrels__train__tsv": "1 0 10\n"},
            r"qrels.train.tsv:1: expected 4 columns \(qid, 0, pid, relevance\); got 3",
        ),
        (
            {"run__train__tsv": "1\t11\t1\n2\t12\t1\n1\t11\t2\n"},
            r"run.train.tsv:3: pid '11' appears a second time for qid '1'",
        ),
        (
            {"run__train__tsv": "1\t11\tfirst\n"},
            r"run.train.tsv:1: rank must be a whole number, got 'first'",
        ),
        (
            {"run__train__tsv": "1\t11\n"},
            r"run.train.tsv:1: not a line of a run; expected qid, pid, rank, or",
        ),
        (
            {"run__train__tsv": "1\t11\t1\n1\t10\n"},
            r"run.train.tsv:2: expected 3 columns \(qid, pid, rank\); got 2",
        ),
        ({"run__train__tsv": ""}, r"run.train.tsv is empty"),
        (
            {"queries__train__tsv": "1\ta\n1\tb\n"},
            r"queries.train.tsv:2: qid '1' appears a second time",
        ),
        (
            {"run__train__tsv": None},
            r"has no run.train.tsv or top1000.train.tsv or top100.train.tsv \(or .gz, .zst\); "
            r"MSMARCO_DIR must name",
        ),
        (
            {"qrels__train__tsv": "3\t0\t12\t0\n"},
            r"run.train.tsv: no query of queries.train.tsv has a positive and a negative",
        ),
    ],
)
def test_malformed_files_name_the_line(marco, changes, message):
    with pytest.raises(InputError, match=message):
        marco(**changes).size("train")


def test_missing_folder_names_its_content(monkeypatch, tmp_path):
    monkeypatch.delenv("MSMARCO_DIR", raising=False)
    with pytest.raises(
        InputError, match="MSMARCO_DIR is not set; set it to a folder with collection.tsv"
    ):
        registry.get("msmarco").check()
    monkeypatch.setenv("MSMARCO_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="is not a folder"):
        registry.get("msmarco").check()


@pytest.mark.parametrize(
    "options",
    [{"negative_ranks": (0, 5)}, {"negative_ranks": (5, 2)}, {"list_size": 1}],
)
def test_invalid_ranking_options_are_errors(options):
    with pytest.raises(InputError, match=f"ranking.{next(iter(options))} must be"):
        DataOptions(**options)


def test_cranfield_is_read_completely(shared_data, monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", str(shared_data / "cranfield_msmarco"))
    source: MsMarcoSource = registry.get("msmarco")
    assert isinstance(source.folder, pathlib.Path)
    assert source.size("validation") == 75 and 100 <= source.size("train") <= 150
    assert sum(len(source.examples("validation", i)) for i in range(75)) == 7500


def compress(folder):
    for path in folder.glob("*.tsv"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def everything(source):
    """Returns all data of a source, with training lists drawn from fixed seeds."""
    lists = [
        source.examples("train", i, np.random.default_rng(i)) for i in range(source.size("train"))
    ]
    candidates = [source.examples("validation", i) for i in range(source.size("validation"))]
    return lists, candidates, source.qrels("train"), source.qrels("validation")


def test_gz_files_equal_plain_files(marco, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    plain = everything(marco())
    compress(tmp_path)
    source = registry.get("msmarco", DataOptions(list_size=3))
    source.check()
    assert everything(source) == plain


def test_the_small_dev_set_is_preferred(marco):
    small = {
        "queries__dev__small__tsv": "7\tflutter of wings\n",
        "qrels__dev__small__tsv": "7\t0\t12\t1\n",
        "run__dev__small__tsv": "7\t13\t1\n",
    }
    assert [e.document_id for e in marco(**small).examples("validation", 0)] == ["13"]


def test_judgments_of_unknown_queries_are_counted(marco, caplog):
    source = marco(qrels__dev__tsv="7\t0\t12\t1\n99\t0\t12\t1\n98\t0\t12\t1\n7\t0\t12\t1\n")
    assert source.qrels("validation") == {"7": {"12": 1}}
    assert (
        "skipping 2 of 4 judgments, whose queries are not in queries.dev.tsv" in caplog.text
        and "1 judgments are duplicates" in caplog.text
    )


def test_untrainable_queries_are_counted_and_evaluated(marco, caplog):
    # All candidates of query 2 are relevant, and all but the last one of query 1.
    source = marco(
        qrels__train__tsv="1\t0\t10\t1\n1\t0\t11\t1\n1\t0\t12\t1\n2\t0\t11\t2\n2\t0\t12\t1\n"
    )
    assert query_ids(source, "train") == ["1"]
    assert "2 of 3 train queries have no positive or no negative and are skipped" in caplog.text
    for draw in range(8):
        drawn = source.examples("train", 0, np.random.default_rng(draw))
        assert drawn[0].label == 1 and [e.document_id for e in drawn[1:]] == [
            "13"
        ]  # other positives are not used as negatives


def test_training_draws_no_document_that_is_missing(marco, caplog):
    qrels = "1\t0\t10\t1\n1\t0\t99\t2\n2\t0\t98\t1\n3\t0\t12\t0\n"
    source = marco(qrels__train__tsv=qrels)
    assert query_ids(source, "train") == ["1"]  # the only positive of query 2 is missing
    assert "2 of 4 judgments are of documents that collection.tsv lacks" in caplog.text
    assert source.qrels("train") == {"1": {"10": 1, "99": 2}, "2": {"98": 1}, "3": {"12": 0}}
    for draw in range(20):
        drawn = source.examples("train", 0, np.random.default_rng(draw))
        assert [(e.document_id, e.label) for e in drawn[:1]] == [("10", 1)]
        assert {e.document_id for e in drawn[1:]} < {"11", "12", "13"}


def test_queries_that_no_ranking_answers_are_counted(marco, caplog):
    source = marco()
    source.size("validation")
    assert (
        "msmarco: validation split: of 2 queries, 1 have no relevant document among the candidates"
        in caplog.text
    )
    caplog.clear()
    source.qrels("validation")
    assert source.size("validation") == 1 and not caplog.text  # once


def test_a_test_split_needs_no_qrels(marco):
    source = marco(queries__eval__tsv="9\twhat now\n", run__eval__tsv="9\t12\t1\n9\t10\t2\n")
    assert [(e.document_id, e.label) for e in source.examples("test", 0)] == [
        ("12", -1),
        ("10", -1),
    ]
    assert source.qrels("test") == {}


def test_run_option_selects_a_file(marco, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dev.trec").write_text("7 Q0 11 1 9.5 tag\n7 Q0 13 2 9.1 tag\n")
    source = marco(DataOptions(run=str(tmp_path / "mine" / "{split}.trec")))
    assert [e.document_id for e in source.examples("validation", 0)] == ["11", "13"]
    with pytest.raises(InputError, match="ranking.run=.*train.trec is not a file"):
        source.size("train")


def epochs(source, count, seed=0):
    """Returns the training lists of complete epochs."""
    options = StreamOptions(BatchShape(1, 128), 128, seed=seed)
    order = training_order([source], np.ones(1), options, 0)
    queries = source.size("train")
    positions = [order[index] for index in range(count * queries)]
    lists = [
        tuple(e.document_id for e in source.training_examples(p.index, seed, p.epoch))
        for p in positions
    ]
    return [lists[i : i + queries] for i in range(0, len(lists), queries)]


def test_epochs_draw_different_repeatable_lists(marco, tmp_path):
    rng = np.random.default_rng(0)
    queries = range(100, 120)
    documents = range(1000, 1060)
    positive = {q: rng.choice(documents, 3, replace=False).tolist() for q in queries}
    changes = {
        "collection__tsv": "".join(f"{d}\tpassage {d}\n" for d in documents),
        "queries__train__tsv": "".join(f"{q}\tquery {q}\n" for q in queries),
        "qrels__train__tsv": "".join(f"{q} 0 {d} 1\n" for q in queries for d in positive[q]),
        "run__train__tsv": "".join(
            f"{q} {d} {rank}\n"
            for q in queries
            for rank, d in enumerate(rng.permutation(documents)[:40], 1)
        ),
        "queries__dev__tsv": None,
    }
    source = marco(DataOptions(list_size=6, negative_ranks=(5, 30)), **changes)
    drawn = epochs(source, 4)
    assert drawn == epochs(source, 4) and drawn != epochs(source, 4, seed=1)
    for index, epoch in enumerate(drawn):
        assert sorted(epoch) != sorted(drawn[index - 1])
    ranked = {str(q): {} for q in queries}
    for line in changes["run__train__tsv"].splitlines():
        q, d, rank = line.split()
        ranked[q][d] = int(rank)
    positives_seen = set()
    by_positives = {q: set(map(str, ids)) for q, ids in positive.items()}
    for epoch in drawn:
        assert len(epoch) == len(queries)
        for first, *others in epoch:
            owners = [
                q
                for q in queries
                if first in by_positives[q]
                and all(5 <= ranked[str(q)].get(d, 0) <= 30 for d in others)
            ]
            assert len(others) == len(set(others)) == 5
            assert any(not by_positives[q] & set(others) for q in owners)
            positives_seen.add(first)
    assert len(positives_seen) > 30  # of at most 60: all three positives of a query are drawn


@pytest.mark.parametrize("official", [False, True])
def test_deep_learning_tracks_have_grades_and_a_threshold(marco, tmp_path, official):
    names = (
        (
            "msmarco-test2019-queries.tsv",
            "2019qrels-pass.txt",
            "msmarco-passagetest2019-top1000.tsv",
        )
        if official
        else ("queries.dl19.tsv", "qrels.dl19.tsv", "top1000.dl19.tsv")
    )
    marco()
    for name, content in zip(
        names,
        (
            "5\twings\n6\tnot judged\n",
            "5 Q0 10 1\n5 Q0 12 3\n5 Q0 13 0\n",
            "5\t10\twings\tx\n5\t12\twings\ty\n6\t10\tn\tz\n",
        ),
        strict=True,
    ):
        (tmp_path / name).write_text(content)
    source = registry.get("msmarco_dl19")
    source.check()
    assert source.splits == ("validation",) and source.task.head == "msmarco"
    assert [e.label for e in source.examples("validation", 0)] == [1, 3]
    run = ranking.make_run(["5", "5", "6"], ["10", "12", "10"], np.array([2.0, 1.0, 1.0]))
    values = ranking.compute_ranking_metrics(source.task.metrics, source.qrels("validation"), run)
    # The first document has grade 1, which only nDCG counts. Query 6 has no judgment, so it is not
    # evaluated.
    assert values["mrr(rel=2)@10"] == pytest.approx(1 / 2) and values[
        "map(rel=2)"
    ] == pytest.approx(1 / 2)
    assert values["ndcg@10"] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))


def test_metric_names_include_the_threshold():
    qrels = {"q": {"a": 1, "b": 2}}
    run = {"q": [("a", 3.0), ("c", 2.0), ("b", 1.0)]}
    values = ranking.compute_ranking_metrics(
        ("mrr@10", "mrr(rel=2)@10", "recall(rel=3)@100", "map(rel=2)"), qrels, run
    )
    assert values == {
        "mrr@10": 1.0,
        "mrr(rel=2)@10": pytest.approx(1 / 3),
        "recall(rel=3)@100": 0.0,
        "map(rel=2)": pytest.approx(1 / 3),
    }
    for name in ("mrr(rel=0)@10", "mrr(rel=2)(rel=2)@10", "mrr(2)@10"):
        with pytest.raises(InputError, match="unknown ranking metric"):
            ranking.compute_ranking_metrics((name,), qrels, run)
    with pytest.raises(InputError, match="nDCG uses the grades themselves"):
        ranking.compute_ranking_metrics(("ndcg(rel=2)@10",), qrels, run)
