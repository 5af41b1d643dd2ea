"""The program that runs every benchmark: it covers all of them and reports failures."""

import pathlib

import pytest

from gemma_encoder.experiments.benchmarks import all as every


def test_all_names_every_subject(tmp_path, capsys):
    subjects = {run.subject for run in every.RUNS}
    folder = pathlib.Path(every.__file__).parent
    comparisons = {
        file.stem
        for file in folder.glob("*.py")
        if "harness.parser(" in file.read_text() and file.stem != "harness"
    }
    assert comparisons <= subjects
    assert all((folder / f"{subject}.py").exists() for subject in subjects)
    assert every.main(["--device=cuda", "--dtype=bfloat16", "--dry_run", f"--json={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    command = (
        "gemma_encoder.experiments.benchmarks.train_step --size=gemma2_2b --rows=16 --length=512 "
        "--compiled --device=cuda --dtype=bfloat16"
    )
    assert command in printed
    with pytest.raises(SystemExit):
        every.main(["--only=nothing"])


def test_all_reports_failed_and_skipped_runs(tmp_path, monkeypatch, capsys):
    runs = (
        every.BenchmarkCommand("one", "matmul_limit", "--width=none", None, None, dtype=False),
        every.BenchmarkCommand("two", "rerank", "", None, None, data="NO_SUCH_VARIABLE"),
    )
    monkeypatch.setattr(every, "RUNS", runs)
    assert every.main(["--smoke", f"--json={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert "invalid int value: 'none'" in printed
    assert "left out: NO_SUCH_VARIABLE is not set" in printed
    assert "failed: one" in printed
