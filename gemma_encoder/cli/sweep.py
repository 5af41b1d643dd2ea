"""Runs ablation studies: the rows of their tables, one after another, with a result file per run.

    gemma-encoder sweep --study=attention,pooling --results=RESULTS --scale=mini --seeds=3

Rerun the command to finish a sweep: runs that have a result are skipped, and an interrupted run
resumes from its checkpoint. A failed run is recorded beside the results and retried next time; the
exit code is then 1. SIGTERM saves a checkpoint and exits with 75. All rows of a seed run before the
next seed, so that an unfinished sweep is balanced.

`--dry_run` prints the runs, each as the command that repeats it. `--config.FIELD=VALUE` overrides a
field of every row, before the row's own change. `--shard=I/N` runs the I-th of N parts, to split a
sweep over N machines.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from gemma_encoder import runtime, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    arguments, overrides = _parse(argv)
    runtime.require_training()
    from etils import epath

    from gemma_encoder.experiments.studies import sweep

    runs = sweep.plan(
        arguments.study.split(","),
        arguments.scale,
        arguments.seeds,
        _names(arguments.tasks),
        _names(arguments.rows),
        arguments.smoke,
        sweep.overriding(commandline.checked_fields(overrides)),
    )
    runs = sweep.shard(runs, arguments.shard)
    if arguments.dry_run:
        terminal.print_result("\n".join(run.command for run in runs))
        return 0
    folder = pathlib.Path(arguments.results)
    workdirs = epath.Path(arguments.workdirs or sweep.default_workdirs(folder))
    with _log_errors_only():
        return sweep.sweep(runs, folder, workdirs, arguments.keep)


@contextlib.contextmanager
def _log_errors_only() -> Iterator[None]:
    """Disables warnings, which would be repeated by hundreds of runs."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments and the `--config.FIELD=VALUE` overrides."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    unexpected = [word for word in overrides if not word.startswith("--config.")]
    if unexpected:
        raise InputError(
            f"unexpected argument {unexpected[0]!r}; see --help, and write config fields as "
            "--config.FIELD=VALUE"
        )
    if arguments.seeds < 1:
        raise InputError(f"--seeds={arguments.seeds} must be at least 1")
    return arguments, overrides


def _parser() -> argparse.ArgumentParser:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder sweep",
        description=__doc__,
    )
    parser.add_argument(
        "--study", required=True, help="studies of experiments/ablations, separated by commas"
    )
    parser.add_argument(
        "--results", default="results", help="folder for result files (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", default="mini", help="mini, or a published size (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds per row (default: %(default)s)"
    )
    parser.add_argument("--tasks", default="", help="only these tasks, separated by commas")
    parser.add_argument("--rows", default="", help="only these rows, separated by commas")
    parser.add_argument(
        "--workdirs",
        default="",
        help="folder for the workdirs of runs (default: a temporary one that depends on --results)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep workdirs and checkpoints after the result is written",
    )
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="only the I-th of N parts, from 1"
    )
    parser.add_argument("--smoke", action="store_true", help="shorten every run to seconds")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands of the runs without running them"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))
