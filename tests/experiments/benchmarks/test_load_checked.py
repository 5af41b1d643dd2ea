"""Checked loading: both arms load, and only one checks."""

from gemma_encoder.experiments.benchmarks import load_checked
from tests.experiments.benchmarks.support import rows_by_arm


def test_load_checked(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(load_checked, "run_in_a_process", lambda function, *args: function(*args))
    file = tmp_path / "out.json"
    flags = ["--size=bench", "--repeats=1", "--cold", f"--folder={tmp_path}", f"--json={file}"]
    load_checked.main(flags)
    rows = rows_by_arm(file)
    assert float(rows["checked"]["check alone"].split()[0]) >= 0
    assert rows["unchecked"]["check alone"] == rows["unchecked, again"]["check alone"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]  # nothing is left
