"""A workdir belongs to a config: fields that may differ, and workdirs of older versions."""

import json

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.training.workdir import claim_workdir, config_differences, exclusive_workdir
from gemma_encoder.weights import native


def test_a_path_that_orbax_cannot_open_is_refused(tmp_path):
    workdir = tmp_path / "w\udcff"
    message = r"w.* is no path in UTF-8, as checkpoints need; rename it"
    with pytest.raises(InputError, match=message), exclusive_workdir(workdir, ""):
        raise AssertionError("unreachable")
    assert not workdir.exists()
    with pytest.raises(InputError, match=message), native.reading(workdir, large="share"):
        raise AssertionError("unreachable")


def test_differences_skip_fields_that_may_change():
    before = {"seed": 0, "optimizer": {"learning_rate": 0.1, "b1": 0.9}, "log_every": "1"}
    after = {"seed": 0, "optimizer": {"learning_rate": 0.2, "b1": 0.9}, "log_every": "5"}
    assert config_differences(before, after) == ["optimizer.learning_rate: 0.1 -> 0.2"]


def make_checkpoint(workdir):
    """Makes a folder that is no empty one, and hence a checkpoint."""
    folder = workdir / "checkpoints" / "7" / "inference"
    folder.mkdir(parents=True)
    (folder / "inference.json").write_text("{}")


def test_the_workdir_of_an_older_version_is_accepted(tmp_path):
    """Fields that did not exist when the run started have their defaults."""
    stored = TrainConfig().to_dict()
    del stored["early_stopping"], stored["seed"], stored["model"]["transformer"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    make_checkpoint(tmp_path)
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
    make_checkpoint(tmp_path)
    claim_workdir(tmp_path, TrainConfig(max_train_examples=5))
    with pytest.raises(InputError, match="max_train_examples: 5 -> 0"):
        claim_workdir(tmp_path, TrainConfig())


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_workdir_without_a_checkpoint_belongs_to_nobody(tmp_path, caplog, content):
    """A run that was refused or killed early does not bar the corrected command."""
    claim_workdir(tmp_path, TrainConfig(seed=1))
    if content:
        (tmp_path / "config.json").write_text(content)
    claim_workdir(tmp_path, TrainConfig(seed=2))
    assert "left no checkpoint; replacing it: " in caplog.text
    assert ("seed: 1 -> 2" if content is None else "damaged") in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    caplog.clear()
    claim_workdir(tmp_path, TrainConfig(seed=2))
    assert not caplog.text
    make_checkpoint(tmp_path)
    with pytest.raises(InputError, match="seed: 2 -> 3"):
        claim_workdir(tmp_path, TrainConfig(seed=3))


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    claim_workdir(tmp_path, TrainConfig(seed=1))
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    claim_workdir(tmp_path, TrainConfig(seed=2))


REFUSED = [
    ({"train_for": "4 steps", "warmup": "5 steps"}, {"warmup": "2 steps"}, "does not fit"),
    ({"optimizer__freeze": "backbne/.*"}, {"optimizer__freeze": "backbone/.*"}, "matches no"),
    ({"optimizer__multipliers": (("x.*", 0.1),)}, {"optimizer__multipliers": ()}, "matches no"),
    ({"batch__rows": 8, "batch__micro_batches": 3}, {"batch__micro_batches": 2}, "micro-batches"),
    ({"best_metric": "toy_sentiment/f2"}, {"best_metric": ""}, "unknown best_metric"),
    ({"hooks": ("no_such",)}, {"hooks": ()}, "unknown hook"),
    ({"profile": (3, 2)}, {"profile": ()}, "profile"),
    ({"profile": (50, 60)}, {"profile": (2, 3)}, "begins after the last of 4 steps"),
    (
        {"model__attention_implementation": "splash"},
        {"model__attention_implementation": "xla"},
        "'splash' cannot be used: it needs a TPU",
    ),
    ({"max_length": 3}, {"max_length": 64}, "own words alone exceed max_length=3"),
    ({"model__pretrained": "absent"}, {"model__pretrained": ""}, "absent"),
]


@pytest.mark.parametrize(("refused", "corrected", "message"), REFUSED)
def test_a_refused_config_leaves_the_workdir_free(micro, tmp_path, refused, corrected, message):
    """Before weights are loaded and before a file is written."""
    fields = {"tasks": ("toy_sentiment", "toy_ranking"), "max_eval_examples": 4}
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        loop.train(micro(**fields | refused), workdir)
    assert not workdir.exists()
    recipe = build(micro(**fields | refused | corrected), for_training=True)
    claim_workdir(workdir, recipe.config)


def test_weights_that_do_not_load_leave_the_workdir_free(micro, tmp_path, monkeypatch):
    """A failure after the workdir is claimed, before its first checkpoint."""

    def fail(self, restored=None):
        raise InputError("the weights are damaged")

    fields = {"tasks": ("toy_sentiment",), "max_eval_examples": 4, "train_for": "1 steps"}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "initialize", fail)
        with pytest.raises(InputError, match="weights are damaged"):
            loop.train(micro(**fields), tmp_path)
    assert (tmp_path / "config.json").exists()
    assert loop.train(micro(**fields, seed=3), tmp_path).step == 1
