"""Re-ranking: every arm gets the same new lists, and scores are compared text by text."""

import numpy as np
import pytest

from gemma_encoder.experiments.benchmarks import rerank
from tests.experiments.benchmarks.support import WITH_PEER, lists_file, rows_by_arm


def test_rerank(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", str(lists_file(tmp_path).parent))
    file = tmp_path / "out.json"
    flags = ["--size=bench", "--repeats=1", "--documents=3", "--max_length=32", "--batch_sizes=2"]
    rerank.main([*flags, f"--json={file}"])
    rows = rows_by_arm(file)
    assert float(rows["ours"]["pairs/s"]) > 0
    assert len(rows) == 1 + WITH_PEER
    assert rows["ours"]["against the best peer"].endswith("x" if WITH_PEER else "")


def test_every_arm_gets_the_same_new_lists_each_turn(tmp_path):
    file = str(lists_file(tmp_path))
    first, second = (rerank.pairs_of(file, turn, queries=1, documents=2) for turn in (0, 1))
    assert len(first) == 2
    assert first == rerank.pairs_of(file, 0, 1, 2)
    assert {query for query, _ in first} != {query for query, _ in second}
    assert rerank.pairs_of(file, 4, 1, 2) == first  # past the end of the file


def test_pair_concatenates_to_the_text_of_the_task():
    from gemma_encoder.data.ranking import TEMPLATE

    fields = {"query": "what is {this} ?", "document": "a wing ."}
    assert "".join(rerank.as_pair(*fields.values())) == TEMPLATE.render(fields)[0]


def test_scores_are_compared_text_by_text(tmp_path):
    for name, scores in {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0], "c": [2.0, 1.0, 3.0]}.items():
        np.save(tmp_path / f"{name}.1.npy", np.array(scores))
    assert rerank.compare(tmp_path, ["a", "b"], range(1, 2)) == 0.0
    assert rerank.compare(tmp_path, ["a", "b", "c"], range(1, 2)) > 1.0  # the same sum
    np.save(tmp_path / "d.1.npy", np.array([1.0, np.nan, 3.0]))
    assert np.isnan(rerank.compare(tmp_path, ["a", "d", "c"], range(1, 2)))


def test_absent_data_is_an_error_that_names_the_file(monkeypatch):
    monkeypatch.setenv("MSMARCO_DIR", "/nowhere")
    with pytest.raises(
        SystemExit, match="MSMARCO_DIR must name a folder with top100.dev.tsv; /nowhere has none"
    ):
        rerank.main(["--size=bench"])
