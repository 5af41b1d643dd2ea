"""Starts of smoke runs: two starts per arm, skipped arms are reported, failures are explained."""

import json
import sys

import pytest

from gemma_encoder.experiments.benchmarks import harness, models, starts
from tests.experiments.benchmarks.support import WITH_PEER


def test_starts(in_process, tmp_path, monkeypatch):
    commands = []

    def timed(command, environment, mark):
        commands.append(command)
        return {"seconds": 2.0, "first_step": 1.0, "processors": 3.0}

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(harness, "missing", lambda *names: "torch not installed")
    monkeypatch.setattr(starts, "timed", timed)
    starts.main(["--only=own,sst2", "--repeats=1", f"--json={tmp_path / 'out.json'}"])
    measured = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in measured["rows"]] == [
        "own, ours, first start",
        "own, ours, second start",
    ]
    assert measured["notes"] == [
        "sst2 is left out: TFDS_DATA_DIR is not set",
        "the peer is left out: torch not installed, or name another Python by --peer",
    ]
    assert len(commands) == 4
    assert "--config=own:classification,smoke" in commands[0]
    with pytest.raises(SystemExit):
        starts.main(["--only=nothing"])


def write_splits(folder):
    for split, count in (("train", 48), ("validation", 24)):
        starts.write_texts(folder / f"{split}.csv", count, 0)


def test_starts_runs_the_program(tmp_path):
    write_splits(tmp_path)
    figures = starts.ours(tmp_path, "own")
    assert 0 < figures["first_step"] < figures["seconds"]


@pytest.mark.skipif(not WITH_PEER, reason="torch and transformers are not installed")
def test_starts_runs_the_peer(in_process, tmp_path):
    write_splits(tmp_path)
    models.write(tmp_path / "model", "bench", 128, pooling="last_k")
    models.as_sequence_classifier(tmp_path / "model", tmp_path / "peer", 2)
    figures = starts.theirs(tmp_path, sys.executable)
    assert 0 < figures["first_step"] < figures["seconds"]


def test_timed_process_that_fails_reports_its_output():
    command = [sys.executable, "-c", "import sys; print('early'); sys.exit('no such luck')"]
    with pytest.raises(RuntimeError, match="(?s)exited with 1.*no such luck"):
        starts.timed(command, {}, "early")
