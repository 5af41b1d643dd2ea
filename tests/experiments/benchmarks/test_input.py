"""Input pipeline and very long tables: every figure is measured, and no files are left behind."""

import json

import pytest

from gemma_encoder.experiments.benchmarks import input_pipeline, many_rows


def test_input_pipeline(tmp_path, benchmarks, monkeypatch):
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", "")  # restored after the benchmark sets it
    monkeypatch.setattr(input_pipeline, "waiting", lambda steps, folder: [])
    file = tmp_path / "out.json"
    input_pipeline.main(["--texts=40", "--repeats=1", f"--json={file}"])
    measured = json.loads(file.read_text())
    assert [row["texts_per_second"] > 0 for row in measured["throughput"]] == [True] * 3
    assert measured["first_reading"] > 0
    for row in measured["states"]:
        assert row["longest_seconds"] >= row["median_seconds"] > 0
        assert row["bytes"] > 0


def test_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "PER_FILE", 700)
    monkeypatch.setattr(many_rows, "PER_GROUP", 300)
    file = tmp_path / "out.json"
    many_rows.main(["--rows=2000,3000", "--texts=200", f"--folder={tmp_path}", f"--json={file}"])
    first, second = json.loads(file.read_text())["rows"]
    assert (first["rows"], second["rows"]) == ("2,000", "3,000")
    assert float(second["texts/s of batches"].replace(",", "")) > 0
    assert list(tmp_path.iterdir()) == [file]  # nothing is left behind


def test_many_rows_refuses_a_disk_that_is_too_small(tmp_path):
    with pytest.raises(SystemExit, match="GB free; 1000000000000000 rows need some"):
        many_rows.measure(tmp_path, 10**15, 1)
