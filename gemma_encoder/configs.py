"""Finds and modifies configs: the name `own` stands for the package's `experiments/own.py`."""

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
    """Returns the names of the package's configs, e.g. "glue" and "ablations/pooling"."""
    return sorted(
        f"{group}{path.stem}"
        for group in _GROUPS
        for path in (FOLDER / group).glob("*.py")
        if _MARK.search(path.read_text(encoding="utf-8"))
    )


def resolve(config: str) -> str:
    """Resolves the value of `--config`, NAME[:ARG] or FILE[:ARG], to FILE[:ARG].

    If a file of this repository does not exist in the current folder, as in a command copied from
    another machine, the package's file is used: `experiments/own.py` is then `own`.

    Raises:
        InputError: no config has this name; the message gives the nearest name.
    """
    name, colon, argument = config.partition(":")
    if name.endswith(".py") or name.startswith(("/", ".", "~")):
        package_name = name.removeprefix("experiments/").removesuffix(".py")
        if pathlib.Path(name).exists() or f"experiments/{package_name}.py" != name:
            return config
        if package_name not in names():
            return config
        name = package_name
    if name not in names():
        raise InputError(f"{unknown('config', name, names())}; or give the path of a .py file")
    return f"{FOLDER / name}.py{colon}{argument}"


def load_config(config: str) -> ConfigDict:
    """Loads a config by NAME[:ARG] or FILE[:ARG]; ARG is the argument of its `get_config`.

    Raises:
        InputError: there is no such config, or its `get_config` fails.
    """
    name, colon, argument = resolve(config).partition(":")
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"config {name} is not a file")
    return _call_get_config(path, [argument] if colon else [])


def _call_get_config(path: pathlib.Path, arguments: Sequence[str]) -> ConfigDict:
    """Calls `get_config` of a file; an error in it becomes an InputError with file and line."""
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
        raise InputError(
            f"config {location(error, os.fspath(path))}: {described(error)}"
        ) from error
    if not isinstance(config, ConfigDict) or "tasks" not in config:
        raise InputError(
            f"config {path}: get_config() returns no config with the field 'tasks'; it must start "
            "from gemma_encoder.training.recipe.default_config()"
        )
    return config


def by_path(config: ConfigDict, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens fields to paths: {"batch": {"rows": 8}} becomes {"batch.rows": 8}.

    Args:
        config: distinguishes groups of fields from mappings with arbitrary keys, which are not
            flattened: {"model.transformer": {"num_layers": 2}}.
        fields: values by nested fields, by paths, or by both.
    """
    result = {}
    for name, value in fields.items():
        first, _, remainder = name.partition(".")
        value = {remainder: value} if remainder else value
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
    """Sets fields of a config; `TrainConfig.from_config_dict` checks their names and types.

    Args:
        config: modified in place.
        fields: new values by path, as `by_path` returns them.
    """
    with config.unlocked(), config.ignore_type():
        for path, value in fields.items():
            *groups, name = path.split(".")
            group = config
            for parent in groups:
                group = group[parent]
            group[name] = value
