"""Ranking: metrics by hand, ties, and run files."""

import itertools

import numpy as np
import pytest

from gemma_encoder.evaluation import ranking
from gemma_encoder.inputs.errors import InputError


def test_ranking_metrics_by_hand():
    run = ranking.make_run(
        ["q1"] * 3 + ["q2"] * 2, ["a", "b", "c", "a", "b"], np.array([3.0, 2.0, 1.0, 1.0, 2.0])
    )
    # q3 is missing from the run: it counts as zero.
    qrels = {"q1": {"b": 1}, "q2": {"b": 2, "z": 1}, "q3": {"a": 1}}
    values = ranking.compute_ranking_metrics(("mrr@10", "ndcg@10"), qrels, run)
    assert values["mrr@10"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    first = 1 / np.log2(3)
    second = 2 / (2 + 1 / np.log2(3))
    assert values["ndcg@10"] == pytest.approx((first + second + 0) / 3)


def test_ranks_beyond_ten_do_not_count():
    documents = [f"d{i:02d}" for i in range(11)]
    run = ranking.make_run(["q"] * 11, documents, -np.arange(11.0))
    eleventh = ranking.compute_ranking_metrics(("mrr@10",), {"q": {"d10": 1}}, run)
    assert eleventh["mrr@10"] == 0
    tenth = ranking.compute_ranking_metrics(("mrr@10",), {"q": {"d09": 1}}, run)
    assert tenth["mrr@10"] == pytest.approx(0.1)


def test_ties_are_ordered_by_document_id(tmp_path):
    """ir-measures computes the same metrics from the written run as from the run in memory."""
    import ir_measures

    rng = np.random.default_rng(0)
    queries = [f"q{i // 20}" for i in range(400)]
    documents = [f"d{i % 20}" for i in range(400)]
    scores = rng.integers(0, 3, 400).astype(np.float32)  # many ties
    run = ranking.make_run(queries, documents, scores)
    for scored in run.values():
        values = [score for _, score in scored]
        assert all(a > b for a, b in itertools.pairwise(values))
    tied = [
        document for document, score in run["q0"] if scores[int(document[1:])] == scores[:20].max()
    ]
    assert tied == sorted(tied)
    qrels = {}
    for i in range(20):
        first, second = rng.choice(20, 2, replace=False)
        qrels[f"q{i}"] = {f"d{first}": 1, f"d{second}": 2}
    (tmp_path / "run.trec").write_text("".join(ranking.trec_lines(run)))
    written = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    measures = [ir_measures.RR @ 10, ir_measures.nDCG @ 10]
    expected = ir_measures.calc_aggregate(measures, qrels, written)
    actual = ranking.compute_ranking_metrics(("mrr@10", "ndcg@10"), qrels, run)
    assert actual == {"mrr@10": expected[measures[0]], "ndcg@10": expected[measures[1]]}

    def reciprocal_rank(query):
        for rank, (document, _) in enumerate(run[query][:10], 1):
            if qrels[query].get(document, 0) > 0:
                return 1 / rank
        return 0

    by_hand = np.mean([reciprocal_rank(query) for query in qrels])
    assert actual["mrr@10"] == pytest.approx(by_hand)


def test_a_written_score_restores_the_float32_exactly():
    scores = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    run = ranking.make_run(["q"] * 50, [f"d{i}" for i in range(50)], scores)
    read = {line.split()[2]: np.float32(line.split()[4]) for line in ranking.trec_lines(run)}
    assert all(read[f"d{i}"] == scores[i] for i in range(50))


def test_a_duplicate_document_is_refused():
    with pytest.raises(InputError, match="appears twice"):
        ranking.make_run(["q", "q"], ["d", "d"], np.zeros(2))


def test_an_msmarco_run_is_truncated_at_depth(tmp_path):
    run = ranking.make_run(["q"] * 4, ["b", "a", "d", "c"], np.array([1.0, 1.0, 3.0, 2.0]))
    (tmp_path / "run.tsv").write_text("".join(ranking.msmarco_lines(run, depth=3)))
    # a before b: equal scores are ordered by document id.
    assert (tmp_path / "run.tsv").read_text() == "q\td\t1\nq\tc\t2\nq\ta\t3\n"


IDS = [
    "query 0",
    "My File 0.pdf",
    "a\tb",
    "100%",
    "a%20b",
    "a b",
    "日本\u3000語",
    "\u2028",
    "plain",
]


@pytest.mark.parametrize("tag", ["gemma_encoder", "", "my run"])
def test_tools_read_files_with_blanks_in_ids(tmp_path, tag):
    """ir-measures and pytrec_eval compute the metrics from the files that we compute in memory."""
    import ir_measures
    import pytrec_eval

    pairs = [(query, document) for query in IDS for document in IDS]
    scores = np.random.default_rng(0).permutation(len(pairs)).astype(np.float32)
    run = ranking.make_run(*zip(*pairs, strict=True), scores)
    qrels = {query: {IDS[i]: 1, IDS[i - 3]: 2} for i, query in enumerate(IDS)}
    (tmp_path / "run.trec").write_text("".join(ranking.trec_lines(run, tag)))
    (tmp_path / "x.qrels").write_text("".join(ranking.qrels_lines(qrels)))
    (tmp_path / "run.tsv").write_text("".join(ranking.msmarco_lines(run)))
    expected = ranking.compute_ranking_metrics(("mrr@10",), qrels, run)["mrr@10"]
    written_run = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    written_qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "x.qrels")))
    measure = ir_measures.RR @ 10
    values = ir_measures.calc_aggregate([measure], written_qrels, written_run)
    assert values[measure] == pytest.approx(expected)
    with (tmp_path / "run.trec").open() as file, (tmp_path / "x.qrels").open() as judged:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(judged), {"recip_rank"})
        ranks = evaluator.evaluate(pytrec_eval.parse_run(file))
    assert np.mean([row["recip_rank"] for row in ranks.values()]) == pytest.approx(expected)
    assert all(len(row.split("\t")) == 3 for row in (tmp_path / "run.tsv").read_text().splitlines())
