"""SST-2: whole programs, and the same texts for both arms."""

import json

import numpy as np

from gemma_encoder.experiments.benchmarks import finetune_sst2, models, program_sst2
from tests.experiments.benchmarks.support import WITH_PEER, rows_by_arm


def test_program_sst2(in_process, tmp_path, benchmarks, monkeypatch):
    def ours(**settings):  # the next test runs the program
        return lambda turn: {"texts": settings["texts"], "loss": 0.7}

    monkeypatch.setattr(program_sst2, "EVALUATED", 4)
    monkeypatch.setattr(program_sst2, "ours", ours)
    file = tmp_path / "out.json"
    program_sst2.main(["--size=bench", "--texts=8", "--rows=1", "--repeats=1", f"--json={file}"])
    rows = rows_by_arm(file)
    assert len(rows) == 2 + 2 * WITH_PEER
    assert float(rows["ours"]["texts/s"]) > 0


def test_program_sst2_runs_the_program(tmp_path, benchmarks):
    models._write(tmp_path / "model", "gemma3_tiny", 128, models.TASK, "last_k")
    run = program_sst2.ours(str(tmp_path), texts=4, rows=1, dtype="float32", use_cache=False)
    figures = run(0)
    assert figures["texts"] == 4
    assert figures["seconds"] > 0
    assert np.isfinite(figures["loss"])


def test_program_sst2_gives_both_arms_the_same_texts(tmp_path, benchmarks):
    program_sst2.write_texts(tmp_path / "texts.jsonl", "train", 5)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    finetune_sst2.write_tokens(tmp_path / "tokens.npz", 5)
    texts, labels = finetune_sst2.read_tokens(tmp_path / "tokens.npz")
    assert len(texts) == 5
    assert labels.tolist() == [line["label"] for line in lines]
