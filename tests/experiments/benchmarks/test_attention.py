"""Attention: every length and window is measured, and different attention is detected."""

import json

import pytest

from gemma_encoder.experiments.benchmarks import attention, harness
from tests.experiments.benchmarks.support import WITH_PEER


def test_attention(in_process, tmp_path):
    file = tmp_path / "out.json"
    flags = ["--size=bench", "--lengths=16,32", "--windows=0,4,16", "--repeats=1"]
    flags.append(f"--json={file}")
    attention.main(flags)
    table = json.loads(file.read_text())
    ours = [row for row in table["rows"] if row["arm"] == "ours, xla"]
    assert [(row["tokens"], row["window"]) for row in ours] == [
        (16, "none"),
        (16, 4),
        (32, "none"),
        (32, 4),
        (32, 16),
    ]
    for name in ("splash", "cudnn", "tokamax"):
        assert any(f"'{name}' cannot be used: it needs a" in note for note in table["notes"])
    if WITH_PEER:
        attention.main([*flags, "--soft_cap=2"])


def test_arms_with_different_windows_are_not_the_same(in_process):
    settings = {
        "length": 32,
        "soft_cap": 0.0,
        "heads": (4, 2, 8),
        "dtype": "float32",
        "implementation": "xla",
    }
    arms = [
        harness.Arm(
            f"window {window}", f"{attention.__name__}:ours", {**settings, "window": window}
        )
        for window in (4, 5)
    ]
    results = harness.take_turns(arms, 1)
    with pytest.raises(SystemExit, match="the arms do not compute the same: output is"):
        harness.same("attention", results, "output", attention.TOLERANCE["float32"])
