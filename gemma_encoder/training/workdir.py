"""The folder of a run: it belongs to one config, which lies in its config.json."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from gemma_encoder import runtime
from gemma_encoder.inputs import options
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.config import MAY_CHANGE, TrainConfig
from gemma_encoder.weights import native


def claim_workdir(workdir: epath.PathLike, config: TrainConfig) -> epath.Path:
    """Makes the workdir this config's own, and returns its absolute path.

    Raises:
        InputError: it holds another config's run, or cannot be written.
    """
    workdir = native.absolute(workdir)
    stored, fields = workdir / "config.json", config.to_dict()
    try:
        if stored.exists():
            before = options.with_current_names(TrainConfig, _read(stored))
            before = with_defaults(before, TrainConfig().to_dict())
            changed = config_differences(before, fields)
            if changed:
                raise InputError(
                    f"{workdir} holds a run of another config; choose another workdir, or undo: "
                    f"{'; '.join(changed)}"
                )
        elif jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            runtime.write_whole(stored, json.dumps(fields, indent=1))
    except OSError as error:
        raise InputError(
            f"workdir {workdir} cannot be written: {error.strerror or error}"
        ) from error
    return workdir


def _read(stored: epath.Path) -> dict[str, Any]:
    try:
        fields = json.loads(stored.read_text())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise InputError(
            f"{stored} holds no config: it is damaged; restore it, or choose another workdir"
        )
    return fields


def with_defaults(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with the default of each field that did not exist when it was written."""
    return {
        name: with_defaults(stored.get(name, value), value)
        if isinstance(value, Mapping)
        else stored.get(name, value)
        for name, value in {**stored, **defaults}.items()
    }


def config_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """The fields in which two configs (as nested dicts) differ, as "field: stored -> now".

    Fields that may change between two starts of a run are left out.
    """
    changed = []
    for name in sorted({*stored, *now}):
        if not prefix and name in MAY_CHANGE:
            continue
        before, after = stored.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += config_differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return changed
