"""Latency: every arm predicts the same texts, one a call."""

from gemma_encoder.experiments.benchmarks import latency
from tests.experiments.benchmarks.support import WITH_PEER, rows_by_arm


def test_latency(in_process, tmp_path):
    file = tmp_path / "out.json"
    latency.main(["--size=bench", "--repeats=1", "--texts=2", f"--json={file}"])
    rows = rows_by_arm(file)
    assert len(rows) == 1 + 2 * WITH_PEER
    assert rows["ours"]["median"].endswith(" ms")
