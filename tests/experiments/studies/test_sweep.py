"""Sweeps at smoke size: results, reports, resuming, shared runs, shards, failures and errors."""

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
    assert {(key.study, key.row) for key in done} == {
        (study, row) for study, rows in ROWS.items() for row in rows.split(",")
    }
    for content in done.values():
        assert 0 <= content["metrics"][content["main_metric"]] <= 1
        assert content["steps"] == 2
    # The baselines of these studies equal attention's.
    shared = {key.study for key, content in done.items() if "same_as" in content}
    assert shared == {
        "pooling",
        "dropout",
        "padding",
        "hyperparameters",
        "data_size",
        "main_tables",
    }
    assert not list(workdirs.iterdir())  # checkpoints are deleted
    (ranked,) = (content for key, content in done.items() if key.row == "softmax_8")
    outcome = ranked["outcomes"]["mrr@10"]
    # The relevant document has rank 6 in the run files.
    assert outcome["first_stage"]["mrr@10"] == [pytest.approx(1 / 6, abs=1e-6)] * 3
    assert [len(scores) for scores in outcome["scores"]] == [6] * 3
    assert all(sum(grades) == 1 for grades in outcome["grades"])


def test_the_report_of_a_smoke_sweep(swept, tmp_path):
    folder, _, _ = swept
    assert report.main([str(folder), f"--output={tmp_path / 'RESULTS.md'}"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    for name, study in ablations.load_studies().items():
        assert study.question in text
        assert f"study-{name}" in text
    assert "| causal | 0 | not run |" in text
    assert "| softmax_16 | 0 | not run |" in text
    assert "BERT-large | 82.1 | BERT, arXiv 1810.04805" in text
    assert "published, not measured" in text
    assert "the run attention/bidirectional/sst2/seed_0" in text
    assert "chance 0.500: it does not clear chance" in text
    for key, content in results.read_results(folder).done.items():
        assert f"| `{content['command']}` |" in text
        assert f"{content['metrics'][content['main_metric']]:.3f}" in text, key
    assert "| ranking_loss softmax_8 | 0.1667 |" in text
    plots = {path.name for path in (tmp_path / "RESULTS_plots").iterdir()}
    assert plots == {f"{name}.png" for name in ablations.NAMES if name != "main_tables"} | {
        "reranking_ranking_loss.png"
    }
    assert all(f"RESULTS_plots/{name}" in text for name in plots)


def test_finished_runs_are_not_repeated(swept, laboratory, monkeypatch):
    folder, _, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    monkeypatch.setattr(
        sweep, "train_run", lambda *arguments: pytest.fail("a finished run was started")
    )
    code, _ = laboratory(
        "--study=attention", "--tasks=sst2", f"--rows={ROWS['attention']}", f"--results={folder}"
    )
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    code, output = laboratory(
        "--study=attention",
        "--tasks=sst2",
        "--rows=bidirectional",
        f"--results={folder}",
        "--config.batch.rows=16",
    )
    assert code == 2
    assert "is the result of another config" in output


@pytest.mark.usefixtures("swept")
def test_an_interrupted_run_resumes_from_its_checkpoint(laboratory, tmp_path, monkeypatch):
    """The first start trains but writes no result; the second one only evaluates."""
    arguments = (
        "--study=attention",
        "--tasks=sst2",
        "--rows=bidirectional",
        f"--results={tmp_path / 'r'}",
        f"--workdirs={tmp_path / 'w'}",
    )

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep.results, "outcomes", interrupt)
        assert laboratory(*arguments)[0] == 130
    assert not list((tmp_path / "r").rglob("*.json"))
    assert list((tmp_path / "w").glob("*/checkpoints/2"))
    code, output = laboratory(*arguments, "--keep")
    assert code == 0
    assert "step 1/2" not in output
    assert list((tmp_path / "w").glob("*/checkpoints/2"))
    ((key, content),) = results.read_results(tmp_path / "r").done.items()
    assert content["steps"] == 2
    assert key.row == "bidirectional"
    assert content["training_seconds"] == 0


def test_a_failure_is_recorded_and_the_sweep_continues(laboratory, tmp_path, monkeypatch):
    failures = []

    def train(run, workdir):
        if run.key.row == "causal" and not failures:
            failures.append(run)
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
    code, output = laboratory(*arguments)
    assert code == 1
    assert "failed: ValueError no such luck" in output
    assert "1 of 3 runs failed" in output
    failed = tmp_path / "attention/causal/sst2/seed_0.failed.json"
    assert json.loads(failed.read_text())["error"] == "ValueError no such luck"
    assert (tmp_path / "attention/causal_random/sst2/seed_0.json").exists()
    for path in tmp_path.rglob("seed_0.json"):
        path.unlink()
    assert laboratory(*arguments)[0] == 0
    assert not failed.exists()


def test_preemption_ends_the_sweep(laboratory, tmp_path, monkeypatch, caplog):
    """Warnings of single runs are not logged, those of the caller are."""
    monkeypatch.setattr(
        sweep, "train_run", lambda *arguments: logging.warning("of one run among hundreds")
    )
    code, _ = laboratory("--study=attention", "--tasks=sst2", f"--results={tmp_path}")
    assert code == 75
    assert not caplog.records
    logging.warning("of the caller")
    assert caplog.messages == ["of the caller"]


def test_seeds_are_balanced_and_baselines_come_first():
    keys = [run.key for run in sweep.plan(["attention", "dropout"], "mini", 3)]
    attention = [key for key in keys if key.study == "attention"]
    assert keys[: len(attention)] == attention
    assert [key.seed for key in attention] == sorted(key.seed for key in attention)
    assert attention[0].row == "bidirectional"
    rows = {row.name for row in ablations.load_study("dropout").rows}
    assert {key.row for key in keys[-10:]} == rows


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_have_every_run_once_and_equal_runs_together(count):
    runs = sweep.plan(ablations.NAMES, "mini", 2)
    parts = [sweep.shard(runs, f"{index}/{count}") for index in range(1, count + 1)]
    sharded = [run.command for part in parts for run in part]
    assert sorted(sharded) == sorted(run.command for run in runs)
    digests = [{run.digest for run in part} for part in parts]
    assert sum(map(len, digests)) == len(set.union(*digests))


def test_a_dry_run_prints_the_commands_and_runs_nothing(capsys, tmp_path):
    arguments = ["--study=dropout,attention", "--seeds=2", "--dry_run"]
    assert program.main([*arguments, f"--results={tmp_path / 'r'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = sweep.plan(["attention", "dropout"], "mini", 2)
    assert lines == [run.command for run in runs]
    assert len(lines) == 2 * 3 * (4 + 10)
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
        (
            ["--study=attention", "--config.batch.row=3"],
            "unknown config field 'batch.row'; did you mean 'batch.rows'",
        ),
        (["--study=attention", "--sede=3"], "unexpected argument '--sede=3'"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert program.main([*arguments, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_machine_is_described():
    assert "cores of" in sweep.describe_machine()


def test_default_workdirs_are_absolute():
    assert pathlib.Path(sweep.default_workdirs(pathlib.Path("r"))).is_absolute()
