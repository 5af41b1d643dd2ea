"""Configs by name: `own` is `experiments/own.py`, which comes with the package."""

import pathlib
import re

from gemma_encoder.inputs.errors import InputError, unknown

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
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
