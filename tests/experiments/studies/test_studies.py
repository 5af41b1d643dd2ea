"""Declarations of studies: rows change one factor, and commands reproduce configs."""

import itertools
import pathlib
import shlex

import pytest
from ml_collections import ConfigDict

from gemma_encoder.cli import commandline
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.studies import study as studies
from gemma_encoder.experiments.studies import sweep
from gemma_encoder.experiments.studies.study import Study, Variant
from gemma_encoder.inputs.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[3]


def config_of_command(line: str):
    """Parses the config of a command as the training program does."""
    words = shlex.split(line)
    assert words[:2] == ["gemma-encoder", "train"] and words[-1].startswith("--workdir=")
    flags = commandline.Flags("")
    flags.config()
    return flags.parse(words[2:-1])


@pytest.mark.parametrize("scale", ["mini", "gemma2_2b"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        (
            "--config.model.pretrained=weights",
            "--config.optimizer.learning_rate=0.25",
            "--config.train_for=5 epochs",
            "--config.model.transformer={'num_layers': 2, 'pattern': ('local', 'global')}",
        ),
    ],
)
def test_every_command_reproduces_the_config_of_its_run(scale, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("attention", "data_size", "hyperparameters") if words else ablations.NAMES
    runs = sweep.plan(names, scale, 1, override=sweep.overriding(words))
    assert len({run.key for run in runs}) == len(runs)
    for run in runs[::3]:
        config = config_of_command(run.command)
        assert studies.flat_fields(config) == studies.flat_fields(run.config), run.command
    if words:
        rates = {run.config.optimizer.learning_rate for run in runs if run.key.study == "attention"}
        assert rates == {0.25}
        assert max(run.config.optimizer.learning_rate for run in runs) == 0.75


def test_a_row_changes_only_its_factor():
    def changed(study, row, task="sst2", scale="mini"):
        config = ablations.load_study(study).config(task, row, 3, scale)
        return studies.changed_fields(studies.base(task, scale), config)

    assert changed("attention", "bidirectional") == {}
    assert changed("pooling", "mean_bidirectional") == {}
    assert changed("dropout", "feed_forward_0.1") == {}
    assert changed("attention", "causal") == {"model.attention": "causal"}
    assert changed("pooling", "mean_causal") == {"model.attention": "causal"}
    random = {"model.pretrained": "", "model.size": "gemma3_mini", "tokenizer": studies.DECODER}
    assert changed("attention", "causal_random") == {"model.attention": "causal", **random}
    assert changed("dropout", "both_0.2") == {
        "model.attention_dropout": 0.2,
        "model.feed_forward_dropout": 0.2,
    }
    assert changed("dropout", "attention_0.1") == {
        "model.attention_dropout": 0.1,
        "model.feed_forward_dropout": 0.0,
    }
    left = changed("padding", "left")
    right = changed("padding", "right")
    assert left == right | {"batch.padding": "left"}
    assert right["batch.segments"] == 1
    assert changed("ranking_loss", "softmax_8", "msmarco") == {}
    assert changed("ranking_loss", "poly1_16", "msmarco") == {
        "losses.ranking": "poly1",
        "ranking.list_size": 16,
        "batch.rows": 32,
    }
    assert changed("ranking_loss", "softmax_36", "msmarco", "gemma2_2b") == {}
    assert changed("data_size", "10_percent") == {
        "max_train_examples": 1000,
        "train_for": "10000 examples",
    }
    assert changed("data_size", "1_percent", "stsb", "gemma2_9b") == {
        "max_train_examples": 57,
        "train_for": "17247 examples",
    }
    assert changed("hyperparameters", "rate_3_rows_2_length_2")["train_for"] == "2 epochs"


def test_the_main_tables_have_every_task_at_every_size():
    study = ablations.load_study("main_tables")
    assert len(study.tasks) == 9 + 8 + 1
    for scale, task in itertools.product(studies.SCALES, study.tasks):
        (row,) = study.rows_at(scale)
        config = study.config(task, scale, 0, scale)
        assert row.name == scale
        assert config.model.size == ("pretrained" if scale == "mini" else scale)
    assert study.get_config("task=rte,row=gemma2_9b").model.size == "gemma2_9b"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("task=sst3", "unknown task of study 'attention' 'sst3'; did you mean 'sst2'"),
        ("row=casual", "unknown row of study 'attention' 'casual'; did you mean 'causal'"),
        ("scale=gemma2_3b", "unknown scale 'gemma2_3b'; did you mean 'gemma2_"),
        ("seed=x", "seed=x is not a whole number"),
        ("sead=1", "unknown config option 'sead'; did you mean 'seed'"),
    ],
)
def test_unknown_names_are_refused(argument, message):
    with pytest.raises(InputError, match=message):
        ablations.load_study("attention").get_config(argument)


def test_declarations_are_checked():
    with pytest.raises(InputError, match="unknown study 'atention'; did you mean 'attention'"):
        ablations.load_study("atention")
    with pytest.raises(InputError, match="different names and include the baseline 'b'"):
        Study("s", "?", ("sst2",), "b", (Variant("a"), Variant("a")))
    with pytest.raises(InputError, match="unknown config field 'model.atention'"):
        study = Study("s", "?", ("sst2",), "a", (Variant("a", {"model.atention": "causal"}),))
        study.config("sst2", "a", 0, "mini")
    with pytest.raises(
        InputError, match="row 'softmax_36' of study 'ranking_loss' is for the scale"
    ):
        ablations.load_study("ranking_loss").config("msmarco", "softmax_36", 0, "mini")


def test_digests_count_renamed_fields_by_their_former_names():
    config = ConfigDict({"max_train_examples": 5, "own": {"truncation": ()}, "seed": 1})
    former = ConfigDict({"max_train": 5, "own": {"cut": ()}, "seed": 1})
    assert studies.digest(config) == studies.digest(former)
    config.own.protected_share = 0.5  # the default of a field that earlier versions did not have
    assert studies.digest(config) == studies.digest(former)
    config.own.protected_share = 0.25
    assert studies.digest(config) != studies.digest(former)
    former["max_train"] = 6
    assert studies.digest(config) != studies.digest(former)
