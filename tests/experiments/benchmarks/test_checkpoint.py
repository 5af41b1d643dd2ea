"""Checkpoints: the stall of a save, and no files left behind."""

import pytest

from gemma_encoder.experiments.benchmarks import checkpoint
from tests.experiments.benchmarks.support import rows_by_arm


def test_checkpoint(in_process, tmp_path):
    file = tmp_path / "out.json"
    flags = ["--size=bench", "--steps=2", "--repeats=1", f"--folder={tmp_path}"]
    checkpoint.main([*flags, f"--json={file}"])
    ours = rows_by_arm(file)["ours"]
    assert float(ours["on disk after"].split()[0]) > 0
    assert float(ours["size"].split()[0]) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]  # nothing is left


def test_stall_is_blocking_plus_slowdown_of_later_steps(tmp_path):
    (tmp_path / "saved").write_bytes(b"12345")
    seconds = iter([1.0, 1.0, 9.0, 1.5, 0.5, 1.0])
    figures = checkpoint.figures(
        lambda: next(seconds), 3, lambda: lambda: 7.0, lambda: None, tmp_path / "saved"
    )
    assert figures["step"] == 1.0
    assert figures["stall"] == pytest.approx(figures["blocked"] + 0.5)
    assert figures["on_disk"] == 7.0
    assert figures["bytes"] == 5
