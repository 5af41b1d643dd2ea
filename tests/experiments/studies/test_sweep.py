"""Sweeps from config to result and report: every study at smoke size, resuming, sharing, sharding, failures and refusals."""

import json
import pathlib

import pytest
from absl import logging

from gemma_encoder.cli import sweep as program
from gemma_encoder.cli import tables as report
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.studies import results, sweep
from tests.experiments.conftest import ROWS


def test_every_study_runs_from_config_to_result(swept):
    folder, workdirs, _ = swept
    done = results.read_results(folder).done
    assert {(place.study, place.row) for place in done} == {
        (study, row) for study, rows in ROWS.items() for row in rows.split(",")
    }
    assert all(
        0 <= content["metrics"][content["main_metric"]] <= 1 and content["steps"] == 2
        for content in done.values()
    )
    shared = {place.study for place, content in done.items() if "same_as" in content}
    assert shared == {
        "pooling",
        "dropout",
        "padding",
        "hyperparameters",
        "data_size",
        "main_tables",
    }  # their baselines are attention's
    assert not list(workdirs.iterdir())  # checkpoints are gone
    (ranked,) = (content for place, content in done.items() if place.row == "softmax_8")
    outcome = ranked["outcomes"]["mrr@10"]
    assert (
        outcome["first_stage"]["mrr@10"] == [pytest.approx(1 / 6, abs=1e-6)] * 3
    )  # as the files have it
    assert [len(scores) for scores in outcome["scores"]] == [6] * 3 and all(
        sum(grades) == 1 for grades in outcome["grades"]
    )


def test_the_report_of_a_smoke_sweep(swept, tmp_path):
    folder, _, _ = swept
    assert report.main([str(folder), f"--output={tmp_path / 'RESULTS.md'}"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    for name, study in ablations.load_studies().items():
        assert study.question in text and f"study-{name}" in text
    assert "| causal | 0 | not run |" in text and "| softmax_16 | 0 | not run |" in text
    assert (
        "BERT-large | 82.1 | BERT, arXiv 1810.04805" in text and "published, not measured" in text
    )
    assert (
        "the run attention/bidirectional/sst2/seed_0" in text
        and "chance 0.500: it does not clear chance" in text
    )
    found = results.read_results(folder)
    for place, content in found.done.items():
        assert f"| `{content['command']}` |" in text
        assert f"{content['metrics'][content['main_metric']]:.3f}" in text, place
    assert "| ranking_loss softmax_8 | 0.1667 |" in text
    plots = {path.name for path in (tmp_path / "RESULTS_plots").iterdir()}
    assert plots == {f"{name}.png" for name in ablations.NAMES if name != "main_tables"} | {
        "reranking_ranking_loss.png"
    }
    assert all(f"RESULTS_plots/{name}" in text for name in plots)


def test_what_is_there_is_not_run_again(swept, laboratory, monkeypatch):
    folder, _, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    monkeypatch.setattr(
        sweep, "train_run", lambda *arguments: pytest.fail("a finished run was started")
    )
    code, _ = laboratory(
        "--study=attention", "--tasks=sst2", f"--rows={ROWS['attention']}", f"--results={folder}"
    )
    assert code == 0 and before == {
        path: path.stat().st_mtime_ns for path in folder.rglob("*.json")
    }
    code, said = laboratory(
        "--study=attention",
        "--tasks=sst2",
        "--rows=bidirectional",
        f"--results={folder}",
        "--config.batch.rows=16",
    )
    assert code == 2 and "is the result of another config" in said


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    swept, laboratory, tmp_path, monkeypatch
):
    """Its result could not be written; the second start evaluates what the first one trained, and takes no step."""
    folder, _, _ = swept
    del folder
    arguments = (
        "--study=attention",
        "--tasks=sst2",
        "--rows=bidirectional",
        f"--results={tmp_path / 'r'}",
        f"--workdirs={tmp_path / 'w'}",
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            sweep.results, "outcomes", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert laboratory(*arguments)[0] == 130
    assert not list((tmp_path / "r").rglob("*.json")) and list(
        (tmp_path / "w").glob("*/checkpoints/2")
    )
    code, said = laboratory(*arguments, "--keep")
    assert code == 0 and "step 1/2" not in said and list((tmp_path / "w").glob("*/checkpoints/2"))
    ((place, content),) = results.read_results(tmp_path / "r").done.items()
    assert (
        content["steps"] == 2 and place.row == "bidirectional" and content["training_seconds"] == 0
    )


def test_a_failure_is_noted_and_the_sweep_goes_on(laboratory, tmp_path, monkeypatch):
    made = []

    def train(run, workdir):
        if run.key.row == "causal" and not made:
            made.append(run)
            raise ValueError("no such\nluck")
        return {
            **vars(run.key),
            "digest": run.digest,
            "main_metric": "accuracy",
            "metrics": {"accuracy": 0.5},
            "seconds": 1.0,
        }

    monkeypatch.setattr(sweep, "train_run", train)
    arguments = (
        "--study=attention",
        "--tasks=sst2",
        "--rows=bidirectional,causal,causal_random",
        f"--results={tmp_path}",
    )
    code, said = laboratory(*arguments)
    assert code == 1 and "failed: ValueError no such luck" in said and "1 of 3 runs failed" in said
    failed = tmp_path / "attention/causal/sst2/seed_0.failed.json"
    assert json.loads(failed.read_text())["error"] == "ValueError no such luck"
    assert (tmp_path / "attention/causal_random/sst2/seed_0.json").exists()
    for path in tmp_path.rglob("seed_0.json"):
        path.unlink()
    assert laboratory(*arguments)[0] == 0 and not failed.exists()


def test_a_notice_to_stop_ends_the_sweep(laboratory, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        sweep, "train_run", lambda *arguments: logging.warning("of one run among hundreds")
    )
    assert (
        laboratory("--study=attention", "--tasks=sst2", f"--results={tmp_path}")[0] == 75
        and not caplog.records
    )
    logging.warning("of whoever called it")
    assert caplog.messages == ["of whoever called it"]


def test_seeds_are_balanced_and_baselines_come_first():
    places = [run.key for run in sweep.plan(["attention", "dropout"], "mini", 3)]
    attention = [place for place in places if place.study == "attention"]
    assert places[: len(attention)] == attention
    assert [place.seed for place in attention] == sorted(place.seed for place in attention)
    assert attention[0].row == "bidirectional" and {place.row for place in places[-10:]} == {
        row.name for row in ablations.load_study("dropout").rows
    }


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_hold_every_run_once_and_equal_runs_together(count):
    runs = sweep.plan(ablations.NAMES, "mini", 2)
    parts = [sweep.shard(runs, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(run.command for part in parts for run in part) == sorted(
        run.command for run in runs
    )
    digests = [{run.digest for run in part} for part in parts]
    assert sum(map(len, digests)) == len(set.union(*digests))


def test_a_dry_run_prints_the_commands_and_runs_nothing(capsys, tmp_path):
    assert (
        program.main(
            ["--study=dropout,attention", "--seeds=2", "--dry_run", f"--results={tmp_path / 'r'}"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        run.command for run in sweep.plan(["attention", "dropout"], "mini", 2)
    ] and len(lines) == 2 * 3 * (4 + 10)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study=atention"], "unknown study 'atention'; did you mean 'attention'"),
        (["--study=attention", "--rows=casual"], "unknown row of attention at mini 'casual'"),
        (["--study=attention", "--tasks=cola"], "unknown task of attention at mini 'cola'"),
        (["--study=attention", "--scale=huge"], "unknown scale 'huge'"),
        (["--study=attention", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["--study=attention", "--shard=3/2"], "--shard=3/2 must be I/N"),
        (["--study=attention", "--config.batch.row=3"], 'Did you mean "rows"'),
        (["--study=attention", "--sede=3"], "unexpected argument '--sede=3'"),
    ],
)
def test_refusals_are_one_line(arguments, message, capsys):
    assert program.main([*arguments, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_machine_is_said():
    assert (
        "cores of" in sweep.describe_machine()
        and pathlib.Path(sweep.default_workdirs(pathlib.Path("r"))).is_absolute()
    )
