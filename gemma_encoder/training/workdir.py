"""The workdir of a run: with its first checkpoint it belongs to the config in its config.json."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from gemma_encoder import distributed
from gemma_encoder.inputs import options
from gemma_encoder.inputs.errors import InputError, in_one_line
from gemma_encoder.inputs.json_text import read_object, to_json
from gemma_encoder.model.config import AUTO
from gemma_encoder.training.config import MAY_CHANGE, TrainConfig
from gemma_encoder.weights import native
from gemma_encoder.weights.checkpoint_folders import check_is_workdir
from gemma_encoder.whole_files import claim, write_whole

LOCK = "run.lock"  # of the process that writes to the workdir


@contextlib.contextmanager
def exclusive_workdir(workdir: epath.PathLike, advice: str) -> Iterator[epath.Path]:
    """Creates a workdir if needed, and keeps other processes from writing to it meanwhile.

    Args:
        workdir: folder of a run.
        advice: what to do if another process writes to it, for the message.

    Yields:
        The absolute path.

    Raises:
        InputError: another process uses the workdir, or it cannot be written.
    """
    workdir = native.absolute(workdir)
    native.check_encoding(workdir)
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            with _writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claim(workdir / LOCK, f"workdir {workdir}", advice))
        yield workdir


def claim_workdir(workdir: epath.PathLike, config: TrainConfig) -> epath.Path:
    """Claims the workdir for a config, and returns its absolute path.

    A workdir belongs to the config of its run once it has a checkpoint: before, nothing of the run
    would be lost, and a config that was refused late may be corrected.

    Raises:
        InputError: the workdir holds a run of another config, or cannot be written.
    """
    workdir = native.absolute(workdir)
    path = workdir / "config.json"
    fields = config.to_dict()
    with _writing(workdir):
        if not check_run(workdir, config) and jax.process_index() == 0:
            _write_fields(path, fields)
    return workdir


def _writing(workdir: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Turns errors of the file system into an InputError."""
    return in_one_line(f"workdir {workdir} cannot be written", errors=OSError)


def check_run(workdir: epath.PathLike, config: TrainConfig) -> bool:
    """Returns True if the workdir holds a run of the config, False if it holds no run.

    Raises:
        InputError: it holds a run of another config, or is itself a checkpoint.
    """
    workdir = native.absolute(workdir)
    check_is_workdir(workdir)
    path = workdir / "config.json"
    if not (path.exists() and native.checkpoint_steps(workdir)):
        return False
    stored, current = _stored_fields(path), config.to_dict()
    _resolve_auto(stored, current, workdir)
    if changes := config_differences(stored, current):
        raise InputError(
            f"{workdir} holds a run of another config; choose another workdir, or undo: "
            f"{'; '.join(changes)}"
        )
    return True


def _write_fields(path: epath.Path, fields: Mapping[str, Any]) -> None:
    """Writes the config of a run; replaces that of a run which left no checkpoint."""
    if path.exists():
        try:
            changes = config_differences(_stored_fields(path), fields)
        except InputError:
            changes = ["the file is damaged"]
        if not changes:
            return
        logging.warning(
            "%s holds the config of a run that left no checkpoint; replacing it: %s",
            path.parent,
            "; ".join(changes),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(fields, indent=1))


def _stored_fields(path: epath.Path) -> dict[str, Any]:
    """Returns a stored config under the current names, with the defaults of newer fields."""
    stored = options.with_current_names(TrainConfig, _read_fields(path))
    return with_defaults(stored, TrainConfig().to_dict())


def _resolve_auto(stored: dict[str, Any], current: dict[str, Any], workdir: epath.Path) -> None:
    """Replaces the compute dtype "auto" in one of two configs by that which the run computes in.

    So "auto" agrees with a run of either dtype, and a run of "auto" with its own dtype only.
    """
    before, after = stored["model"], current["model"]
    if before["compute_dtype"] == after["compute_dtype"]:
        return
    if after["compute_dtype"] == AUTO:
        after["compute_dtype"] = before["compute_dtype"]
    elif before["compute_dtype"] == AUTO:
        spec = native.load_inference_spec(native.find(workdir))
        before["compute_dtype"] = spec.encoder.compute_dtype


def _read_fields(path: epath.Path) -> dict[str, Any]:
    """Reads the config of a run; raises InputError if the file is damaged."""
    return read_object(path, "restore it, or choose another workdir")


def with_defaults(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a stored config the defaults of fields that did not exist when it was written."""
    return {
        name: with_defaults(stored.get(name, value), value)
        if isinstance(value, Mapping)
        else stored.get(name, value)
        for name, value in {**stored, **defaults}.items()
    }


def config_differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Lists the fields in which two nested configs differ, as "field: stored -> current".

    Fields that may change between two starts of a run are skipped.
    """
    changes = []
    for name in sorted({*stored, *current}):
        if not prefix and name in MAY_CHANGE:
            continue
        before = stored.get(name)
        after = current.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += config_differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return changes
