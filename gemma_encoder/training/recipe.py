"""What an experiment's config file starts from: the default config, and presets that change it.

    from gemma_encoder.training import recipe

    config = recipe.default_config()
    recipe.set_size(config, "gemma2_2b")

`gemma_encoder.training.config` says what each field is; `build` makes the objects.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from gemma_encoder.inputs.errors import unknown
from gemma_encoder.model.sizes import GEMMA_CONFIGS, SMALL
from gemma_encoder.training.config import default_config

__all__ = ["default_config", "is_small", "parse_arg", "set_size", "sizes", "smoke"]


def sizes() -> dict[str, str | None]:
    """The transformer of each size; "pretrained" is whatever the checkpoint says."""
    return {"tiny": "gemma3_tiny", "pretrained": None} | {name: name for name in GEMMA_CONFIGS}


def parse_arg(
    arg: str, names: Sequence[str] = (), options: Sequence[str] = ("size",)
) -> tuple[str, dict[str, str], bool]:
    """Reads what follows the colon of `--config=FILE:ARG`, e.g. "sst2,size=gemma2_2b,smoke".

    Args:
        arg: comma-separated: one of `names`, `option=value`, and "smoke", in any order.
        names: valid bare words besides "smoke".
        options: valid options.

    Returns:
        The bare word ("" if none), the options, and whether "smoke" was among them.
    """
    word, values, smoke = "", {}, False
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
            raise unknown(
                "config argument", part, [*names, *(f"{option}=" for option in options), "smoke"]
            )
    return word, values, smoke


def is_small(size: str) -> bool:
    """Whether a size is one of our own, for a machine without an accelerator."""
    return sizes()[size] in SMALL


def set_size(config: ConfigDict, size: str) -> None:
    """Chooses the model's size, with the tokenizer and the compute dtype that go with it.

    Small sizes use the small tokenizer and float32, for a machine without an accelerator. The
    others use the tokenizer that comes with their weights (or their family's) and bfloat16,
    recompute layers in the backward pass, and are cut up over all devices.
    """
    if size not in sizes():
        raise unknown("size", size, sizes())
    config.model.size = size
    if is_small(size):
        config.tokenizer, config.model.compute_dtype = "small", "float32"
    else:
        config.tokenizer, config.model.compute_dtype, config.model.remat = (
            "auto",
            "bfloat16",
            "full",
        )
        config.mesh = (1, -1, 1)


def smoke(config: ConfigDict) -> ConfigDict:
    """Cuts any recipe down to seconds: a slice of the real data, a few steps, a small batch."""
    config.max_train_examples, config.max_eval_examples, config.train_for, config.log_every = (
        64,
        24,
        "6 steps",
        "2 steps",
    )
    config.max_length = config.batch.row_length = 128
    config.batch.rows, config.batch.segments, config.ranking.list_size = 8, 8, 4
    return config
