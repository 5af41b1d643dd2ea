"""Building blocks of config files: the default config, and presets that modify it.

    from gemma_encoder.training import recipe

    config = recipe.default_config()
    recipe.set_size(config, "gemma2_2b")

`gemma_encoder.training.config` documents the fields; `build` creates the objects.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_encoder.inputs.errors import unknown
from gemma_encoder.model.sizes import GEMMA_CONFIGS, SMALL
from gemma_encoder.training.config import default_config

__all__ = ["default_config", "is_small", "parse_arg", "set_size", "sizes", "smoke"]


def sizes() -> dict[str, str | None]:
    """Returns the transformer name of each size; None for that of the checkpoint."""
    return {"tiny": "gemma3_tiny", "pretrained": None} | {name: name for name in GEMMA_CONFIGS}


def parse_arg(
    arg: str, names: Sequence[str] = (), options: Sequence[str] = ("size",)
) -> tuple[str, dict[str, str], bool]:
    """Parses ARG of `--config=FILE:ARG`, e.g. "sst2,size=gemma2_2b,smoke".

    Args:
        arg: comma-separated words: one of `names`, `option=value`, and "smoke", in any order.
        names: valid words besides "smoke".
        options: valid options.

    Returns:
        The word of `names` ("" if none), the options, and whether "smoke" is present.
    """
    word = ""
    values = {}
    smoke = False
    for part in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = part.partition("=")
        if equals and name in options:
            values[name] = value
        elif equals:
            raise unknown("config option", name, options)
        elif part == "smoke":
            smoke = True
        elif part in names and not word:
            word = part
        else:
            valid_words = [*names, *(f"{option}=" for option in options), "smoke"]
            raise unknown("config argument", part, valid_words)
    return word, values, smoke


def is_small(size: str) -> bool:
    """Returns True for the sizes that are meant for machines without an accelerator."""
    return sizes()[size] in SMALL


def set_size(config: ConfigDict, size: str) -> None:
    """Sets the model size, with the tokenizer, compute dtype and sharding that go with it.

    Small sizes use the small tokenizer and float32, for a machine without an accelerator. The
    other sizes use the tokenizer of their weights (or of their family) and bfloat16 where it is
    fast, recompute layers in the backward pass, and shard the parameters over all devices.
    """
    if size not in sizes():
        raise unknown("size", size, sizes())
    config.model.size = size
    if is_small(size):
        config.tokenizer = "small"
        config.model.compute_dtype = "float32"
    else:
        config.tokenizer = "auto"
        config.model.compute_dtype = "auto"
        config.model.remat = "full"
        config.mesh = (1, -1, 1)


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a recipe to run in seconds: a slice of the real data, a few steps, small batches."""
    config.max_train_examples = 64
    config.max_eval_examples = 24
    config.train_for = "6 steps"
    config.log_every = "2 steps"
    config.max_length = 128
    config.batch.row_length = 128
    config.batch.rows = 8
    config.batch.segments = 8
    config.ranking.list_size = 4
    return config
