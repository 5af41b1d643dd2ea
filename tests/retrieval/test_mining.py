"""Mining of hard negatives: by hand, against a plain reference, and refusals in one line."""

import numpy as np
import pytest

from gemma_encoder import cli
from gemma_encoder.data.files import lines
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval.mining import mine

TREC = """\
q1 Q0 a 1 10.0 x
q1 Q0 b 2 9.6 x
q1 Q0 c 3 9.5 x
q1 Q0 d 4 4.0 x
q2 Q0 a 1 3.0 x
q2 Q0 b 2 2.0 x
q3 Q0 e 1 1.0 x
"""
QRELS = "q1\t0\ta\t1\nq1\t0\td\t0\nq2\t0\tz\t1\nq9\t0\ta\t2\n"


@pytest.fixture
def files(tmp_path):
    """`files(run, qrels)` writes both, and returns the arguments of `mine`."""

    def write(run=TREC, qrels=QRELS, name="run.trec"):
        (tmp_path / name).write_text(run)
        (tmp_path / "qrels.tsv").write_text(qrels)
        return tmp_path / name, tmp_path / "qrels.tsv", tmp_path / "negatives.tsv"

    return write


def test_negatives_by_hand(files):
    arguments = files()
    report = mine(*arguments)
    # b is above 0.95 x 10, c is not; the positive of q2 is not in the run; q3 has no judgment.
    assert arguments[2].read_text() == "q1\tc\t1\nq1\td\t2\nq2\ta\t1\nq2\tb\t2\n"
    assert (report.queries, report.negatives, report.missing) == (2, 4, 1)
    assert (report.too_similar, report.without_positive) == (1, 1)


@pytest.mark.parametrize(
    ("ranks", "share", "expected"),
    [
        ((2, 3), 1.0, ["q1 b", "q1 c", "q2 b"]),
        ((1, 2), 0.95, ["q2 a", "q2 b"]),
        ((4, 9), 0.3, []),
        ((4, 9), 0.4, ["q1 d"]),
    ],
)
def test_ranks_and_the_share_select(files, ranks, share, expected):
    arguments = files()
    mine(*arguments, ranks, share)
    rows = [line.split("\t") for line in arguments[2].read_text().splitlines()]
    assert [f"{query} {document}" for query, document, _ in rows] == expected


def test_scores_below_zero_have_a_limit_below_them(files):
    arguments = files("q Q0 a 1 -10 x\nq Q0 b 2 -10.4 x\nq Q0 c 3 -10.6 x\n", "q 0 a 1\n")
    mine(*arguments)
    assert arguments[2].read_text() == "q\tc\t1\n"


def test_runs_without_scores_are_read_by_rank(files):
    run = "q1\tb\t2\nq1\ta\t1\nq1\tc\t3\n"
    arguments = files(run, "q1 0 a 1\n", "run.tsv")
    assert mine(*arguments).too_similar == 0
    assert arguments[2].read_text() == "q1\tb\t1\nq1\tc\t2\n"
    with pytest.raises(InputError, match=r"run.tsv has no scores, which max_share compares"):
        mine(*arguments, max_share=0.9)


def test_a_mined_run_equals_a_plain_reference(files, monkeypatch):
    """Blocks end within a query; ids are of any form, encoded ones, too."""
    monkeypatch.setattr(lines, "BLOCK", 97)
    rng = np.random.default_rng(0)
    queries = [f"q{i}" for i in range(12)] + ["a%20b", "7", "é"]
    rows, expected, qrels = [], [], []
    for query in queries:
        documents = [f"d{i}" for i in rng.permutation(40)[: rng.integers(1, 30)]]
        scores = np.sort(rng.random(len(documents)).round(2))[::-1]
        positives = set(rng.choice(documents, 2)) if query != "q3" else set()
        name = query.replace("%20", " ")
        qrels += [f"{name}\t0\t{document}\t1\n" for document in sorted(positives)]
        table = list(zip(documents, scores.tolist(), strict=True))
        best = max([score for document, score in table if document in positives], default=None)
        order = sorted(table, key=lambda row: -row[1])
        shuffled = [table[i] for i in rng.permutation(len(table))]
        order = sorted(shuffled, key=lambda row: -np.float32(row[1]))
        rows += [f"{query} Q0 {document} 0 {score} gemma_encoder\n" for document, score in shuffled]
        mined = [
            document
            for document, score in order[1:20]
            if document not in positives
            and positives
            and np.float32(score) <= np.float64(np.float32(best)) * 0.9
        ]
        expected += [f"{query}\t{document}\t{i}\n" for i, document in enumerate(mined, 1)]
    arguments = files("".join(rows), "".join(qrels))
    mine(*arguments, (2, 20), 0.9)
    assert arguments[2].read_text() == "".join(expected)


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        (
            TREC,
            "x\t0\ta\t1\n",
            "run.trec has no query of .*qrels.tsv: the first of the run is 'q1'",
        ),
        (TREC, "q1\t0\ta\t0\n", "qrels.tsv has no relevant document"),
        (f"{TREC}q1 Q0 f 5 1 x\n", QRELS, "run.trec:8: query 'q1' appears a second time"),
        ("q1\ta\tquery\tpassage\n", QRELS, "run.trec has neither ranks nor scores"),
        ("q1 Q0 a 1 nan x\n", QRELS, "run.trec:1: score must be a finite number"),
        ("q1 a\n", QRELS, "run.trec:1: not a line of a run"),
    ],
)
def test_bad_runs_are_refused_in_one_line(files, run, qrels, message):
    arguments = files(run, qrels)
    with pytest.raises(InputError, match=message) as caught:
        mine(*arguments)
    assert "\n" not in str(caught.value) and not arguments[2].exists()


def test_ids_are_checked_against_given_files(files, tmp_path):
    arguments = files()
    queries, collection = tmp_path / "queries.tsv", tmp_path / "collection.tsv"
    queries.write_text("q1\tx\nq2\tx\nq3\tx\n")
    collection.write_text("".join(f"{name}\tx\n" for name in "abcde"))
    assert mine(*arguments, queries=queries, collection=collection).negatives == 4
    queries.write_text("q1\tx\nq3\tx\n")
    with pytest.raises(InputError, match=r"run.trec:5: qid 'q2' is not in queries.tsv"):
        mine(*arguments, queries=queries)
    collection.write_text("a\tx\nb\tx\nd\tx\n")
    with pytest.raises(InputError, match=r"run.trec:3: pid 'c' is not in collection.tsv"):
        mine(*arguments, collection=collection)


@pytest.mark.parametrize(
    ("ranks", "share", "message"),
    [((0, 3), None, "FIRST-LAST"), ((5, 3), None, "got 5-3"), ((1, 3), 1.5, "at most 1, got 1.5")],
)
def test_bad_options_of_mining_are_refused(files, ranks, share, message):
    with pytest.raises(InputError, match=message):
        mine(*files(), ranks, share)


def test_the_command_counts_what_it_does(files, capsys):
    run, qrels, output = files()
    words = ["mine", f"--run={run}", f"--qrels={qrels}", f"--output={output}", "--ranks=1-3"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {output}, 3 negatives of 2 queries",
        "1 documents left out: above 0.95 x the positive",
        "1 queries without a positive in the run: no such limit",
        "1 judged queries are not in the run",
    ]
