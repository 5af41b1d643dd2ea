"""Presets: the arguments of config files, sizes, and smoke versions."""

import importlib

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import recipe


def test_arguments_of_a_config_file():
    assert recipe.parse_arg("sst2,size=gemma2_2b,smoke", ("sst2",)) == (
        "sst2",
        {"size": "gemma2_2b"},
        True,
    )
    assert recipe.parse_arg("") == ("", {}, False)
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        recipe.parse_arg("smokey")
    with pytest.raises(InputError, match="did you mean 'size'"):
        recipe.parse_arg("sise=tiny")


@pytest.mark.parametrize("name", ["quickstart", "glue", "superglue", "multitask", "msmarco", "own"])
@pytest.mark.parametrize("arg", ["", "smoke", "size=gemma2_9b", "size=gemma2_tiny,smoke"])
def test_every_experiment_takes_its_arguments(name, arg):
    values = importlib.import_module(f"gemma_encoder.experiments.{name}").get_config(arg)
    assert set(values) == set(recipe.default_config())
    with pytest.raises(InputError, match="did you mean 'gemma2_9b'"):
        importlib.import_module(f"gemma_encoder.experiments.{name}").get_config("size=gemma2_9")
