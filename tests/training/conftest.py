import dataclasses
import importlib

import jax
import pytest

from gemma_encoder.model import config as model_config
from gemma_encoder.training import recipe


@pytest.fixture(autouse=True, scope="package")
def compile_in_a_hurry():
    """These models take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def micro(monkeypatch):
    """`micro(**changes)`: the quickstart's config with a model and batches so small that a run takes seconds.

    Changes are given as `batch__rows=8`. The model has one local and one global layer.
    """
    small = dataclasses.replace(model_config.GEMMA_CONFIGS["gemma2_tiny"], num_layers=2, embed_dim=32, hidden_dim=64, head_dim=8, query_scale=8**-0.5)
    monkeypatch.setitem(model_config.GEMMA_CONFIGS, "micro", small)
    monkeypatch.setitem(recipe.SIZES, "micro", "micro")

    def make(**changes):
        config = importlib.import_module("experiments.quickstart").get_config("smoke")
        defaults = {"model__size": "micro", "max_length": 64, "batch__row_length": 64, "batch__rows": 8, "batch__segments": 4, "train_for": "4 steps"}
        for path, value in (defaults | changes).items():
            *parents, field = path.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            with node.ignore_type():
                node[field] = value
        return config

    return make
