"""Cold start: every arm scores one text in a new process."""

from gemma_encoder.experiments.benchmarks import cold_start
from tests.experiments.benchmarks.support import WITH_PEER, rows_by_arm


def test_cold_start(in_process, tmp_path):
    file = tmp_path / "out.json"
    cold_start.main(["--size=bench", "--repeats=1", f"--json={file}"])
    rows = rows_by_arm(file)
    assert len(rows) == 2 + 2 * WITH_PEER
    assert rows["ours"]["predicting"].endswith(" s")
