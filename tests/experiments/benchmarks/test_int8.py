"""Int8 inference: every arm gets the same new texts, and decisions are compared one by one."""

import numpy as np

from gemma_encoder.experiments.benchmarks import int8
from tests.experiments.benchmarks.support import WITH_PEER, lists_file, rows_by_arm


def test_int8(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", str(lists_file(tmp_path).parent))
    file = tmp_path / "out.json"
    flags = ["--data=pairs", "--size=bench", "--repeats=1", "--texts=6", "--max_length=32"]
    int8.main([*flags, f"--json={file}"])
    rows = rows_by_arm(file)
    ours = [name for name in rows if name.startswith("ours")]
    assert ours == ["ours, float32", "ours, bfloat16", "ours, int8"]
    assert len(rows) == len(ours) or WITH_PEER
    assert rows["ours, float32"]["same decisions"] == "100.0%"
    assert all(float(rows[name]["texts/s"]) > 0 for name in ours)


def test_every_arm_gets_the_same_new_texts_each_turn(tmp_path):
    file = tmp_path / "texts.json"
    file.write_text('["a", "b", "c"]')
    turns = [int8.texts_of(str(file), turn, 2) for turn in (0, 1, 0)]
    assert turns == [["a", "b"], ["c", "a"], ["a", "b"]]


def test_decisions_are_compared_text_by_text(tmp_path):
    for name, classes in {"a": [0, 1, 1, 0], "b": [0, 1, 0, 1]}.items():
        np.save(tmp_path / f"{name}.1.npy", np.array(classes))
    assert int8.agreement(tmp_path, "a", "b", range(1, 2)) == 0.5
    assert int8.agreement(tmp_path, "a", "a", range(1, 2)) == 1.0
