"""A workdir belongs to a config: fields that may differ, and workdirs of older versions."""

import json

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.workdir import claim_workdir, config_differences


def test_differences_skip_fields_that_may_change():
    before = {"seed": 0, "optimizer": {"learning_rate": 0.1, "b1": 0.9}, "log_every": "1"}
    after = {"seed": 0, "optimizer": {"learning_rate": 0.2, "b1": 0.9}, "log_every": "5"}
    assert config_differences(before, after) == ["optimizer.learning_rate: 0.1 -> 0.2"]


def test_the_workdir_of_an_older_version_is_accepted(tmp_path):
    """Fields that did not exist when the run started have their defaults."""
    stored = TrainConfig().to_dict()
    del stored["early_stopping"], stored["seed"], stored["model"]["transformer"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim_workdir(tmp_path, TrainConfig())
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        claim_workdir(tmp_path, TrainConfig(seed=1))
    stored["of_a_newer_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="of_a_newer_version: 3 -> None"):
        claim_workdir(tmp_path, TrainConfig())


def test_a_workdir_with_former_field_names_is_accepted(tmp_path):
    stored = TrainConfig(max_train_examples=5).to_dict()
    stored["max_train"] = stored.pop("max_train_examples")
    stored["own"]["cut"] = stored["own"].pop("truncation")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim_workdir(tmp_path, TrainConfig(max_train_examples=5))
    with pytest.raises(InputError, match="max_train_examples: 5 -> 0"):
        claim_workdir(tmp_path, TrainConfig())
