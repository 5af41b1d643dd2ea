"""Runs the rows of studies one after another, in one process that compiles each program once.

`gemma-encoder sweep` is the program.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

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
        place: which it is.
        config: of the run.
        command: repeats it.
        digest: of the config; runs with the same one are the same.
        changes: fields in which the config differs from the recipe of its task and scale.
    """

    key: RunKey
    config: ConfigDict
    command: str
    digest: str
    changes: Mapping[str, Any]


def overriding(words: Sequence[str]) -> Callable[[ConfigDict], ConfigDict]:
    """What `--config.FIELD=VALUE` words do to a config, read as the training program reads them."""

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
    """The runs of some studies in the order in which they are to be run: study, seed, task, row, the baseline first.

    Args:
        names: of studies.
        scale: of all runs.
        seeds: how many.
        tasks, rows: only these, where any are named; each must be in one of the studies.
        smoke, override: as in `Study.config`.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    chosen = ablations.load_studies(names).values()
    for kind, wanted, known in (
        ("task", tasks, [task for study in chosen for task in study.tasks]),
        ("row", rows, [row.name for study in chosen for row in study.rows_at(scale)]),
    ):
        for name in wanted:
            if name not in known:
                raise unknown(
                    f"{kind} of {', '.join(study.name for study in chosen)} at {scale}", name, known
                )
    runs = []
    for study in chosen:
        for seed in range(seeds):
            for task in (name for name in study.tasks if not tasks or name in tasks):
                for row in (
                    row.name for row in study.rows_at(scale) if not rows or row.name in rows
                ):
                    config = study.config(task, row, seed, scale, smoke, override)
                    repeated = rerun_command(study, task, row, scale, smoke, config)
                    changes = changed_fields(base(task, scale), config)
                    runs.append(
                        SweepRun(
                            RunKey(study.name, row, task, scale, seed),
                            config,
                            repeated,
                            digest(config),
                            changes,
                        )
                    )
    return runs


def shard(runs: Sequence[SweepRun], part: str) -> list[SweepRun]:
    """The I-th of N parts of a sweep, "I/N" counted from 1; runs that are the same are in the same part."""
    number, slash, count = part.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard={part} must be I/N with 1 <= I <= N, e.g. 2/4")
    keys: dict[str, int] = {}
    for run in runs:
        keys.setdefault(run.digest, len(keys))
    return [run for run in runs if keys[run.digest] % int(count) == int(number) - 1]


def default_workdirs(folder: pathlib.Path) -> pathlib.Path:
    """A temporary folder that is the same for the same results, so that a run that was cut off is found again."""
    return (
        pathlib.Path(tempfile.gettempdir())
        / f"gemma_encoder_sweep_{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]}"
    )


def sweep(
    runs: Sequence[SweepRun], folder: pathlib.Path, workdirs: epath.Path, keep: bool = False
) -> int:
    """Runs what has no result yet and returns the exit code.

    Args:
        runs: in their order.
        folder: of results; of several processes the first one's counts.
        workdirs: where runs work, local or `gs://`.
        keep: keep workdirs once the result is written.
    """
    from gemma_encoder import distributed

    distributed.initialize()
    known = results.read_results(folder).done if folder.is_dir() else {}
    by_digest = {
        content["digest"]: key for key, content in known.items() if "same_as" not in content
    }
    needless = _agreed([run.key in known or run.digest in by_digest for run in runs])
    failures = 0
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {run.key.study} {run.key.row} {run.key.task} seed {run.key.seed}"
        if run.key in known:
            if known[run.key]["digest"] != run.digest:
                raise InputError(
                    f"{run.key.file(folder)} is the result of another config; choose another --results, or delete it"
                )
            continue
        if needless[number - 1] or run.digest in by_digest:
            if distributed.is_main_process():
                _share(run, by_digest[run.digest], folder)
            continue
        workdir = workdirs / run.digest
        try:
            content = train_run(run, workdir)
        except (InputError, ArithmeticError, RuntimeError, ValueError) as error:
            failures += 1
            reason = " ".join(
                f"{type(error).__name__ * (not isinstance(error, InputError))} {error}".split()
            )[:500]
            if distributed.is_main_process():
                print(f"{name}: failed: {reason}", file=sys.stderr, flush=True)
                results.write_result(
                    run.key.file(folder, failed=True),
                    {**dataclasses.asdict(run.key), "command": run.command, "error": reason},
                )
            continue
        if content is None:
            print(f"{name}: told to stop; the same command goes on", file=sys.stderr)
            return processes.EXIT_PREEMPTED
        by_digest[run.digest] = run.key
        if distributed.is_main_process():
            results.write_result(run.key.file(folder), content)
            run.key.file(folder, failed=True).unlink(missing_ok=True)
            if not keep:
                workdir.rmtree(missing_ok=True)
            main_metric = content["main_metric"]
            print(
                f"{name}: {main_metric} {content['metrics'][main_metric]:.3f}, {content['seconds']:.0f} s",
                flush=True,
            )
    if failures:
        print(
            f"{failures} of {len(runs)} runs failed; the same command tries them again",
            file=sys.stderr,
        )
    return 1 if failures else 0


def _agreed(needless: Sequence[bool]) -> Sequence[bool]:
    """What the first process knows of results, on every process: only there do they lie."""
    import jax

    if jax.process_count() == 1:
        return needless
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.array(needless, bool)).tolist()


def _share(run: SweepRun, other: RunKey, folder: pathlib.Path) -> None:
    """Notes that a run is one that another study has."""
    source = other.file(folder).relative_to(folder).as_posix()
    content = {
        **dataclasses.asdict(run.key),
        "same_as": source,
        "digest": run.digest,
        "command": run.command,
    }
    results.write_result(run.key.file(folder), content)
    run.key.file(folder, failed=True).unlink(missing_ok=True)


def train_run(run: SweepRun, workdir: epath.Path) -> dict[str, Any] | None:
    """Trains and evaluates; returns what the result's file holds, None if the run was told to stop."""
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
    main = names[:: len(predictions[0].task.metrics)]  # of each part of the split the first metric
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
        "parameters": sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_encoder(spec.encoder).shapes)
        ),
        "training_seconds": round(outcome.seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe_machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }


def describe_machine() -> str:
    """The machine in one line."""
    import jax

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    devices = jax.devices()
    kind = "" if devices[0].platform == "cpu" else f", {len(devices)} x {devices[0].device_kind}"
    return f"{os.cpu_count()} cores of {model}{kind}"
