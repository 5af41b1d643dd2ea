"""The quickstart's config with a model so small that a run takes seconds."""

import importlib
from typing import Any

SMALL = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 64,
    "head_dim": 8,
    "query_scale": 8**-0.5,
}


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Sets fields of a config, given as `batch__rows=8`, without type checks."""
    for path, value in changes.items():
        *parents, field = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[field] = value
    return config


def micro_config(**changes: Any) -> Any:
    """Returns the config; its model has one local and one global layer."""
    config = importlib.import_module("gemma_encoder.experiments.quickstart").get_config("smoke")
    defaults = {
        "model__size": "gemma2_tiny",
        "model__transformer": SMALL,
        "max_length": 64,
        "batch__row_length": 64,
        "batch__rows": 8,
        "batch__segments": 4,
        "train_for": "4 steps",
    }
    return changed(config, defaults | changes)
