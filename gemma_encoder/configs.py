"""Configs by name: `own` is `experiments/own.py`, which comes with the package."""

import importlib.machinery
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from gemma_encoder.inputs.errors import InputError, described, location, unknown

FOLDER = pathlib.Path(__file__).parent / "experiments"
_GROUPS = ("", "ablations/")  # folders of FOLDER that hold configs
_MARK = re.compile(r"^(def get_config\(|get_config = )", re.MULTILINE)


def names() -> list[str]:
    """Returns the configs that come with the package, e.g. "glue" and "ablations/pooling"."""
    return sorted(
        f"{group}{path.stem}"
        for group in _GROUPS
        for path in (FOLDER / group).glob("*.py")
        if _MARK.search(path.read_text(encoding="utf-8"))
    )


def resolve(config: str) -> str:
    """Returns FILE[:ARG] for what a user gave as `--config`: a name or a file, each with [:ARG].

    A file of this repository that does not exist here, as in a command that was copied from another
    machine, is the package's own: `experiments/own.py` is then `own`.

    Raises:
        InputError: a name that no config has; the message names the nearest.
    """
    name, colon, argument = config.partition(":")
    if name.endswith(".py") or name.startswith(("/", ".", "~")):
        own = name.removeprefix("experiments/").removesuffix(".py")
        if pathlib.Path(name).exists() or f"experiments/{own}.py" != name or own not in names():
            return config
        name = own
    if name not in names():
        raise InputError(f"{unknown('config', name, names())}; or give the path of a .py file")
    return f"{FOLDER / name}.py{colon}{argument}"


def load_config(config: str) -> ConfigDict:
    """The config that a name or a file stands for, each with [:ARG] for its `get_config`.

    Raises:
        InputError: there is no such config, or its `get_config` refuses the argument.
    """
    name, colon, argument = resolve(config).partition(":")
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"config {name} is not a file")
    return _called(path, [argument] if colon else [])


def _called(path: pathlib.Path, arguments: Sequence[str]) -> ConfigDict:
    """What `get_config` of a file returns; an error in the file is one line that names its line."""
    try:
        loader = importlib.machinery.SourceFileLoader(path.stem, os.fspath(path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(f"config {path} has no get_config()")
        config = module.get_config(*arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config {location(error)}: {described(error)}") from error
    if not isinstance(config, ConfigDict) or "tasks" not in config:
        raise InputError(
            f"config {path}: get_config() gives no config with the field 'tasks'; let it start from "
            "gemma_encoder.training.recipe.default_config()"
        )
    return config


def by_path(config: ConfigDict, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their path: {"batch": {"rows": 8}} and {"batch.rows": 8} are {"batch.rows": 8}.

    Args:
        config: tells what is a group of fields, and what is a mapping of the user's own entries,
            which stays whole: {"model.transformer": {"num_layers": 2}}.
        fields: in either form.
    """
    result = {}
    for name, value in fields.items():
        first, _, rest = name.partition(".")
        value = {rest: value} if rest else value
        group = config.get(first)
        if isinstance(value, Mapping) and isinstance(group, ConfigDict) and len(group):
            nested = by_path(group, value)
            result |= {f"{first}.{path}": item for path, item in nested.items()}
        elif isinstance(value, Mapping) and isinstance(result.get(first), Mapping):
            result[first] = {**result[first], **value}
        else:
            result[first] = value
    return result


def override(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Changes fields of a config; `TrainConfig.from_config_dict` checks their names and types.

    Args:
        config: changed in place.
        fields: new values by path, as `by_path` gives them.
    """
    with config.unlocked(), config.ignore_type():
        for path, value in fields.items():
            *groups, name = path.split(".")
            group = config
            for parent in groups:
                group = group[parent]
            group[name] = value
