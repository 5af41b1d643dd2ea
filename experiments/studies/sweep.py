"""Runs the rows of studies in one process, which compiles each program once.

The command is `gemma-encoder sweep`.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from gemma_encoder import stopping, terminal
from gemma_encoder.experiments import ablations
from gemma_encoder.experiments.studies import results
from gemma_encoder.experiments.studies.results import RunKey
from gemma_encoder.experiments.studies.study import (
    SCALES,
    base,
    changed_fields,
    digest,
    rerun_command,
)
from gemma_encoder.inputs.errors import InputError, one_line, unknown

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tensorflow", "seqio")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        key: identifies the run.
        config: config of the run.
        command: command that repeats the run.
        digest: digest of the config; runs with equal digests are equal.
        changes: fields that differ from the recipe of the task and scale.
    """

    key: RunKey
    config: ConfigDict
    command: str
    digest: str
    changes: Mapping[str, Any]


def overriding(words: Sequence[str]) -> Callable[[ConfigDict], ConfigDict]:
    """Returns a function that applies `--config.FIELD=VALUE` words as the training program does."""

    def override(config: ConfigDict) -> ConfigDict:
        values = flags.FlagValues()
        try:
            holder = config_flags.DEFINE_config_dict(
                "config", config, flag_values=values, sys_argv=["sweep", *words]
            )
            values(["sweep", *words])
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(one_line(error)) from error
        return holder.value

    return override if words else lambda config: config


def plan(
    names: Sequence[str],
    scale: str,
    seeds: int,
    tasks: Sequence[str] = (),
    rows: Sequence[str] = (),
    smoke: bool = False,
    override: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> list[SweepRun]:
    """Returns the runs of studies in order of execution: by study, seed, task and row.

    The baseline is the first row.

    Args:
        names: names of studies.
        scale: scale of all runs.
        seeds: number of seeds.
        tasks, rows: limit the runs, if given; each must be in one of the studies.
        smoke, override: see `Study.config`.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    studies = ablations.load_studies(names).values()
    context = f"{', '.join(study.name for study in studies)} at {scale}"
    valid_tasks = [task for study in studies for task in study.tasks]
    valid_rows = [row.name for study in studies for row in study.rows_at(scale)]
    _check_names(f"task of {context}", tasks, valid_tasks)
    _check_names(f"row of {context}", rows, valid_rows)
    runs = []
    for study in studies:
        study_tasks = [task for task in study.tasks if not tasks or task in tasks]
        study_rows = [row.name for row in study.rows_at(scale) if not rows or row.name in rows]
        for seed, task, row in itertools.product(range(seeds), study_tasks, study_rows):
            config = study.config(task, row, seed, scale, smoke, override)
            run = SweepRun(
                key=RunKey(study.name, row, task, scale, seed),
                config=config,
                command=rerun_command(study, task, row, scale, smoke, config),
                digest=digest(config),
                changes=changed_fields(base(task, scale), config),
            )
            runs.append(run)
    return runs


def _check_names(kind: str, names: Sequence[str], valid: Sequence[str]) -> None:
    for name in names:
        if name not in valid:
            raise unknown(kind, name, valid)


def shard(runs: Sequence[SweepRun], part: str) -> list[SweepRun]:
    """Returns the I-th of N parts of a sweep, for "I/N" from 1; equal runs are in the same part."""
    index, slash, count = part.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise InputError(f"--shard={part} must be I/N with 1 <= I <= N, e.g. 2/4")
    digests: dict[str, int] = {}
    for run in runs:
        digests.setdefault(run.digest, len(digests))
    return [run for run in runs if digests[run.digest] % int(count) == int(index) - 1]


def default_workdirs(folder: pathlib.Path) -> pathlib.Path:
    """Returns a temporary folder that depends only on the results folder, so that runs resume."""
    suffix = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return pathlib.Path(tempfile.gettempdir()) / f"gemma_encoder_sweep_{suffix}"


def sweep(
    runs: Sequence[SweepRun], folder: pathlib.Path, workdirs: epath.Path, keep: bool = False
) -> int:
    """Executes all runs that have no result yet, and returns the exit code.

    Args:
        runs: runs, in order of execution.
        folder: folder of results; with several processes, that of the first process.
        workdirs: parent of the runs' workdirs, local or `gs://`.
        keep: do not delete a workdir after its result is written.
    """
    from gemma_encoder import distributed

    distributed.initialize()
    done = results.read_results(folder).done if folder.is_dir() else {}
    by_digest = {
        content["digest"]: key for key, content in done.items() if "same_as" not in content
    }
    finished = _broadcast([run.key in done or run.digest in by_digest for run in runs])
    failures = 0
    for index, run in enumerate(runs):
        key = run.key
        name = f"[{index + 1}/{len(runs)}] {key.study} {key.row} {key.task} seed {key.seed}"
        if key in done:
            if done[key]["digest"] != run.digest:
                raise InputError(
                    f"{key.file(folder)} is the result of another config; choose another "
                    "--results, or delete it"
                )
            continue
        if finished[index] or run.digest in by_digest:
            if distributed.is_main_process():
                _share(run, by_digest[run.digest], folder)
            continue
        workdir = workdirs / run.digest
        try:
            content = train_run(run, workdir)
        except (InputError, ArithmeticError, RuntimeError, ValueError) as error:
            if stopping.is_requested():  # a library has turned Ctrl-C into its own error
                raise
            failures += 1
            if distributed.is_main_process():
                _write_failure(name, run, error, folder)
            continue
        if content is None:
            terminal.print_message(f"{name}: preempted; rerun the command to resume")
            return distributed.EXIT_PREEMPTED
        by_digest[run.digest] = key
        if distributed.is_main_process():
            _write_success(name, run, content, folder)
            if not keep:
                workdir.rmtree(missing_ok=True)
    if failures:
        terminal.print_message(
            f"{failures} of {len(runs)} runs failed; rerun the command to retry them"
        )
    return 1 if failures else 0


def _broadcast(finished: Sequence[bool]) -> Sequence[bool]:
    """Returns the values of the first process, which alone has the results, on every process."""
    import jax

    if jax.process_count() == 1:
        return finished
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.array(finished, bool)).tolist()


def _write_failure(name: str, run: SweepRun, error: Exception, folder: pathlib.Path) -> None:
    kind = "" if isinstance(error, InputError) else type(error).__name__
    reason = " ".join(f"{kind} {error}".split())[:500]
    terminal.print_message(f"{name}: failed: {reason}")
    results.write_result(
        run.key.file(folder, failed=True),
        {**dataclasses.asdict(run.key), "command": run.command, "error": reason},
    )


def _write_success(
    name: str, run: SweepRun, content: Mapping[str, Any], folder: pathlib.Path
) -> None:
    results.write_result(run.key.file(folder), content)
    run.key.file(folder, failed=True).unlink(missing_ok=True)
    main_metric = content["main_metric"]
    value = content["metrics"][main_metric]
    terminal.print_note(f"{name}: {main_metric} {value:.3f}, {content['seconds']:.0f} s")


def _share(run: SweepRun, source: RunKey, folder: pathlib.Path) -> None:
    """Writes a result that refers to that of an equal run."""
    content = {
        **dataclasses.asdict(run.key),
        "same_as": source.file(folder).relative_to(folder).as_posix(),
        "digest": run.digest,
        "command": run.command,
    }
    results.write_result(run.key.file(folder), content)
    run.key.file(folder, failed=True).unlink(missing_ok=True)


def train_run(run: SweepRun, workdir: epath.Path) -> dict[str, Any] | None:
    """Trains and evaluates; returns the content of the result file, or None if preempted."""
    import math

    import jax

    from gemma_encoder.model.encoder import abstract_encoder
    from gemma_encoder.training import loop
    from gemma_encoder.weights import native

    began = time.monotonic()
    outcome = loop.train(run.config, workdir, run.command)
    if outcome.preempted:
        return None
    spec = native.load_inference_spec(outcome.checkpoint)
    ((task, values),) = outcome.metrics.items()
    if not values:
        raise InputError(f"task {task!r}: the split that was evaluated has no labels")
    predictions = outcome.predictions[task]
    names = list(values)
    # The first metric of each part of the split.
    main = names[:: len(predictions[0].task.metrics)]
    parameters = jax.tree.leaves(abstract_encoder(spec.encoder).shapes)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        **dataclasses.asdict(run.key),
        "digest": run.digest,
        "command": run.command,
        "changes": dict(run.changes),
        "kind": predictions[0].task.kind.name,
        "main_metric": main[0],
        "metrics": {name: round(value, 6) for name, value in values.items()},
        "outcomes": results.outcomes(predictions, main),
        "steps": outcome.step,
        "train_records": sum(spec.record["examples"].values()),
        "parameters": sum(math.prod(parameter.shape) for parameter in parameters),
        "training_seconds": round(outcome.seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe_machine(),
        "versions": versions | {"python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }


def describe_machine() -> str:
    """Describes the machine in one line."""
    import jax

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    devices = jax.devices()
    kind = "" if devices[0].platform == "cpu" else f", {len(devices)} x {devices[0].device_kind}"
    return f"{os.cpu_count()} cores of {model}{kind}"
