"""The report: statistics of known cases, verdicts of claims, missing runs, and errors."""

import json
import time

import numpy as np
import pytest

from gemma_encoder.cli import tables as program
from gemma_encoder.evaluation.bootstrap import Interval
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.studies import claims, reranking, results, tables
from gemma_encoder.experiments.studies.claims import CLAIMS, FAILS, HOLDS, UNKNOWN
from gemma_encoder.experiments.studies.statistics import (
    cells,
    chance,
    verdict,
)
from gemma_encoder.inputs.errors import InputError

CLAIM = {claim.study: claim for claim in CLAIMS}


def share(rate: float, seed: int = 0, count: int = 200) -> np.ndarray:
    """Returns a mask of correct examples: exactly that share, rotated by the seed."""
    return np.roll(np.arange(count) < rate * count, seed)


def read(folder):
    return cells(results.read_results(folder), ablations.load_studies())


def test_differences_are_paired_over_examples_and_seeds(made, tmp_path):
    for seed in range(3):
        made("attention", "bidirectional", "sst2", seed, share(0.8))
        made("attention", "causal", "sst2", seed, share(0.7))
        made("attention", "causal_random", "sst2", seed, share(0.8))
    (cell,) = read(tmp_path)
    interval, seeds = cell.contrast(("bidirectional",), ("causal",))
    # One row is correct on 20 more of the 200 examples: one binomial, not two.
    error = np.sqrt(0.1 * 0.9 / 200)
    assert seeds == 3
    assert interval.value == pytest.approx(0.1)
    assert interval.low == pytest.approx(0.1 - 1.96 * error, abs=0.01)
    assert interval.high == pytest.approx(0.1 + 1.96 * error, abs=0.01)
    same, _ = cell.contrast(("bidirectional",), ("causal_random",))
    assert same.value == 0
    assert -0.03 < same.low < -0.005 and 0.005 < same.high < 0.03
    assert cell.contrast(("bidirectional",), ("bidirectional_random",)) is None


def test_seeds_widen_the_interval(made, tmp_path):
    """Rows differ only by seed: with one seed on all examples, with the others on none."""
    for seed, rate in enumerate((1.0, 0.0, 0.0)):
        made("attention", "bidirectional", "sst2", seed, share(rate))
        made("attention", "causal", "sst2", seed, share(0.0))
    (cell,) = read(tmp_path)
    interval, _ = cell.contrast(("bidirectional",), ("causal",))
    assert interval.value == pytest.approx(1 / 3)
    # Of 27 draws, 8 omit the first seed, and 1 has only the first seed.
    assert (interval.low, interval.high) == pytest.approx((0, 1), abs=0.02)


def test_only_common_seeds_are_compared(made, tmp_path):
    for seed in range(3):
        made("attention", "bidirectional", "sst2", seed, share(0.8))
    made("attention", "causal", "sst2", 2, share(0.7))
    (cell,) = read(tmp_path)
    assert cell.contrast(("bidirectional",), ("causal",))[1] == 1


def test_chance_is_the_best_constant_or_a_random_order(made, tmp_path):
    made("attention", "bidirectional", "sst2", 0, share(0.8))
    assert read(tmp_path)[0].chance() == 0.5
    f1 = {
        "main_metric": "f1",
        "kind": "classification",
        "outcomes": {"f1": {"labels": [1, 1, 1, 0], "predictions": [0, 0, 0, 0]}},
    }
    assert chance(f1) == pytest.approx(6 / 7)
    grades = [[0] * 17 + [1, 2, 1], [0, 0], [1]]
    rng = np.random.default_rng(0)
    first = np.array(grades[0])
    sampled = [reranking.reciprocal_rank(rng.random(20), first) for _ in range(20_000)]
    ranked = {"main_metric": "mrr@10", "kind": "ranking", "outcomes": {"mrr@10": {}}}
    ranked["outcomes"]["mrr@10"]["grades"] = grades
    assert chance(ranked) == pytest.approx((np.mean(sampled) + 0 + 1) / 3, abs=0.004)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.1, "better"),
        (-0.1, -0.01, "worse"),
        (-0.1, 0.1, "cannot be told"),
        (1e-17, 1e-17, "cannot be told"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_zero(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high)) == expected


def test_a_lower_error_is_better_in_verdicts_claims_and_chance(made, tmp_path):
    labels = np.tile([0.0, 1.0, 2.0, 3.0], 50)
    for row, error in (("bidirectional", 0.1), ("causal", 0.5), ("causal_random", 2.0)):
        # Errors vary: without, the difference would have no interval.
        predictions = labels + error * np.resize([0.9, 1.1], 200)
        outcome = {"labels": labels.tolist(), "predictions": predictions.tolist()}
        made(
            *("attention", row, "stsb", 0, share(0.5)),
            kind="regression",
            main_metric="rmse",
            metrics={"rmse": error},
            outcomes={"rmse": outcome},
        )
    (cell,) = read(tmp_path)
    assert cell.chance() == pytest.approx(np.sqrt(1.25))  # of the mean
    judged = claims.judge(CLAIM["attention"], [cell])
    assert judged[0].difference.value == pytest.approx(-0.4) and judged[0].verdict == HOLDS
    text = tables.studies_report(results.read_results(tmp_path), tmp_path / "out.md", "command")
    assert "chance 1.118: it clears chance" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| causal | 1 |")]
    assert "| +0.400 [" in row and "| worse |" in row


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [
        ((0.8, 0.8), (0.6, 0.6), HOLDS),
        ((0.6, 0.6), (0.8, 0.8), FAILS),
        ((0.71, 0.70), (0.70, 0.71), UNKNOWN),
        ((0.8, 0.6), (0.6, 0.8), "both"),
    ],
)
def test_a_claim_that_rows_are_better(made, tmp_path, above, below, expected):
    for task, *rates in zip(("sst2", "stsb"), above, below, strict=True):
        for seed in range(3):
            for row, rate in zip(("bidirectional", "causal"), rates, strict=True):
                made("attention", row, task, seed, share(rate))
    judged = claims.judge(CLAIM["attention"], read(tmp_path))
    if expected == "both":
        expected = f"{HOLDS} on sst2; {FAILS} on stsb"
    assert claims.overall(CLAIM["attention"], judged) == expected
    # Rows from random weights were not run.
    assert [item.difference is None for item in judged] == [False, True, True] * 2


def test_a_verdict_names_its_tasks_if_others_were_not_run(made, tmp_path):
    for seed in range(3):
        made("attention", "bidirectional", "sst2", seed, share(0.8))
        made("attention", "bidirectional", "stsb", seed, share(0.8))
        made("attention", "causal", "sst2", seed, share(0.6))
    claim = CLAIM["attention"]
    assert claims.overall(claim, claims.judge(claim, read(tmp_path))) == f"{HOLDS} on sst2"
    for path in tmp_path.rglob("causal/sst2/*.json"):
        path.unlink()
    assert claims.overall(claim, claims.judge(claim, read(tmp_path))) == f"{UNKNOWN}: not run"


@pytest.mark.parametrize(
    ("right", "expected"),
    [(share(0.8), HOLDS), (share(0.5), FAILS), (np.roll(share(0.8), 100), UNKNOWN)],
)
def test_a_claim_of_no_difference_needs_a_narrow_interval(made, tmp_path, right, expected):
    for seed in range(3):
        made("padding", "left", "sst2", seed, share(0.8))
        made("padding", "right", "sst2", seed, right)
    claim = CLAIM["padding"]
    assert claims.overall(claim, claims.judge(claim, read(tmp_path))) == expected


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        ((0.5, 0.5), (0.8, 0.6), HOLDS),
        ((0.8, 0.6), (0.8, 0.6), FAILS),  # better with short lists, too
        ((0.5, 0.5), (0.6, 0.8), FAILS),
        ((0.5, 0.5), (0.5, 0.5), UNKNOWN),
    ],
)
def test_a_claim_about_longer_lists(made, tmp_path, short, long, expected):
    for size, rates in ((4, short), (16, long)):
        for loss, rate in zip(("softmax", "point_ce"), rates, strict=True):
            right = share(rate).astype(float)
            outcome = {
                "queries": [str(i) for i in range(200)],
                "values": {"mrr@10": right.tolist()},
            }
            made(
                "ranking_loss",
                f"{loss}_{size}",
                "msmarco",
                0,
                right > 0,
                kind="ranking",
                main_metric="mrr@10",
                metrics={"mrr@10": rate},
                outcomes={"mrr@10": outcome},
            )
    claim = CLAIM["ranking_loss"]
    assert claims.overall(claim, claims.judge(claim, read(tmp_path))) == expected


def test_claims_without_runs_are_unknown():
    for claim in CLAIMS:
        assert claims.overall(claim, claims.judge(claim, [])) == f"{UNKNOWN}: not run"


def test_a_query_does_not_select_its_own_weight():
    """Weight 1 is best only for queries of fold 0, which must not use it; ties take the first."""
    table = np.zeros((len(reranking.WEIGHTS), 10))
    table[0] = 0.5
    table[-1, [0, 5]] = 1.0
    values, weights = reranking.cross_validated(table)
    assert weights[0] == 0.0
    assert values[0] == values[5] == 0.5
    table[-1] = 1.0
    assert reranking.cross_validated(table)[1] == [1.0] * 5


def test_interpolation_ranges_from_scores_to_the_first_stage():
    outcome = {"scores": [[0.0, 1.0, 2.0, 3.0], []], "grades": [[1, 0, 0, 0], []]}
    values = reranking.by_weight(outcome)
    assert values[0].tolist() == [0.25, 0]
    assert values[-1].tolist() == [1, 0]
    assert (np.diff(values[:, 0]) >= 0).all()


def test_failures_are_in_the_report(made, tmp_path):
    folder = tmp_path / "attention"
    made("attention", "bidirectional", "sst2", 0, share(0.8))
    failed = {
        "study": "attention",
        "row": "causal",
        "task": "sst2",
        "scale": "mini",
        "seed": 1,
        "error": "out of luck",
    }
    results.write_result(folder / "causal" / "sst2" / "seed_1.failed.json", failed)
    text = tables.studies_report(results.read_results(tmp_path), tmp_path / "out.md", "command")
    assert "| causal | 0 | failed; seed 1 failed: out of luck |" in text
    assert "Failed:" in text


def test_a_report_over_many_runs_takes_seconds(made, tmp_path):
    rng = np.random.default_rng(0)
    for task in ("sst2", "stsb"):
        for row in ablations.load_study("pooling").rows_at("mini"):
            for seed in range(3):
                values = rng.random(1500)
                outcome = {"labels": np.arange(1500).tolist(), "predictions": values.tolist()}
                regression = {
                    "kind": "regression",
                    "main_metric": "spearman",
                    "metrics": {"spearman": 0.0},
                    "outcomes": {"spearman": outcome},
                }
                made("pooling", row.name, task, seed, share(0.5), **regression)
    began = time.process_time()
    tables.studies_report(results.read_results(tmp_path), tmp_path / "out.md", "command")
    assert time.process_time() - began < 40  # for 108 runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a result: not JSON"),
        ("[]", "is not a result: not a JSON object"),
        ({"seed": "1"}, "is not a result: its field 'seed' is '1'"),
        ({"row": "bidirectional"}, "which belongs in "),
        ({"metrics": None}, "is not a result: its field 'metrics' is None"),
        ({"main_metric": "f1"}, "is not a result: it lacks its main metric 'f1'"),
        (
            {"outcomes": {"accuracy": {"labels": [1], "predictions": [1, 0]}}},
            "not one label and one prediction of each example",
        ),
        ({"same_as": "attention/gone/sst2/seed_0.json"}, "which is not a result"),
    ],
)
def test_an_invalid_result_is_an_error_of_one_line(made, tmp_path, content, message, capsys):
    path = made("attention", "causal", "sst2", 0, share(0.5))
    if not isinstance(content, str):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    assert program.main([str(tmp_path), f"--output={tmp_path / 'out.md'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path) in error
    assert error.count("\n") == 1


def test_other_errors(made, tmp_path, capsys):
    assert program.main([str(tmp_path / "none")]) == 2
    assert "is not a folder of results" in capsys.readouterr().err
    assert program.main([str(tmp_path)]) == 2
    assert "there is no result to report on" in capsys.readouterr().err
    made("attention", "causal", "sst2", 0, share(0.5))
    made(
        "attention",
        "bidirectional",
        "sst2",
        0,
        share(0.5),
        outcomes={"accuracy": {"labels": [0, 1], "predictions": [0, 1]}},
    )
    assert program.main([str(tmp_path)]) == 2
    assert "was evaluated on other examples" in capsys.readouterr().err
    made("attentions", "causal", "sst2", 0, share(0.5))
    with pytest.raises(InputError, match="no study is called 'attentions'"):
        tables.studies_report(results.read_results(tmp_path), tmp_path / "out.md", "command")
