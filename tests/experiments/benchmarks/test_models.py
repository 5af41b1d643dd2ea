"""Models of the benchmarks: our batches, and conversion to a sequence classifier."""

import json

import numpy as np
import pytest

from gemma_encoder.experiments.benchmarks import models


def test_full_batch_has_one_text_per_row():
    batch = models.full_batch(np.full((2, 8), 7, np.int32), np.array([0, 1]))
    assert batch.segment_ids.tolist() == [[1] * 8] * 2
    assert batch.positions.tolist() == [list(range(8))] * 2
    assert batch.label.tolist() == [[0.0], [1.0]]
    assert batch.weight.tolist() == [[1.0], [1.0]]


def test_head_with_a_bias_is_no_sequence_classifier(in_process, tmp_path):
    models.write(tmp_path / "model", "bench", 32)
    with pytest.raises(ValueError, match="linear to 1 without a bias"):
        models.as_sequence_classifier(tmp_path / "model", tmp_path / "peer", 1)
    models.as_sequence_classifier(tmp_path / "model", tmp_path / "two", 2)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert len(config["id2label"]) == 2
