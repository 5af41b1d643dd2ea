"""Configs by name and by path."""

import pathlib

import pytest

from gemma_encoder import configs
from gemma_encoder.inputs.errors import InputError

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"


def test_the_configs_that_come_with_the_package():
    names = configs.names()
    assert {"own", "glue", "quickstart", "pretrain_decoder", "ablations/attention"} <= set(names)
    assert not {"studies", "sweep", "ablations/__init__"} & set(names)


@pytest.mark.parametrize(
    ("text", "file", "argument"),
    [
        ("own", "own.py", ""),
        ("glue:sst2,smoke", "glue.py", ":sst2,smoke"),
        (
            "ablations/attention:task=sst2,row=causal",
            "ablations/attention.py",
            ":task=sst2,row=causal",
        ),
        ("experiments/own.py:ranking", "own.py", ":ranking"),
        ("experiments/ablations/pooling.py", "ablations/pooling.py", ""),
    ],
)
def test_a_name_is_a_file_of_the_package_wherever_one_is(
    text, file, argument, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, colon, rest = configs.resolve(text).partition(":")
    assert pathlib.Path(path).resolve() == EXPERIMENTS / file and colon + rest == argument


@pytest.mark.parametrize(
    "text", ["mine.py:a", "experiments/mine.py", "own.py", "/folder/own", "./own"]
)
def test_other_paths_stay(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.resolve(text) == text


def test_a_file_that_is_here_comes_before_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").touch()
    assert configs.resolve("experiments/own.py:x") == "experiments/own.py:x"


@pytest.mark.parametrize(
    ("text", "near"), [("glu:sst2", "glue"), ("ablation/poolin", "ablations/pooling")]
)
def test_an_unknown_name_names_the_nearest(text, near):
    with pytest.raises(InputError, match=f"did you mean '{near}'.*path of a .py file"):
        configs.resolve(text)
