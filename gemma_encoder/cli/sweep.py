"""Runs the rows of studies one after another and leaves one small result file a run.

    gemma-encoder sweep --study=attention,pooling --results=RESULTS --scale=mini --seeds=3 [--dry_run]

`--dry_run` prints the runs, each as the command that repeats it. Runs whose result is there are
skipped, and a run that was cut off resumes from its checkpoint: rerun the command to finish a sweep.
A run that fails is noted beside the results, and tried again next time; the exit code is then 1.
SIGTERM saves and exits 75. All rows of a seed come before the next seed, so that a sweep that is cut
off is balanced. `--config.FIELD=VALUE` changes every row, before the row's own change. `--shard=I/N`
runs the I-th of N parts, on N machines at once.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from gemma_encoder import runtime
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
        print("\n".join(run.command for run in runs))
        return 0
    folder = pathlib.Path(arguments.results)
    workdirs = epath.Path(arguments.workdirs or sweep.default_workdirs(folder))
    with _errors_alone():
        return sweep.sweep(runs, folder, workdirs, arguments.keep)


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Logs errors only: what one run warns of, hundreds of runs would."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words --config.FIELD=VALUE."""
    parser = argparse.ArgumentParser(
        prog="gemma-encoder sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--study", required=True, help="one or more of experiments/ablations, with commas"
    )
    parser.add_argument(
        "--results", default="results", help="folder of result files (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", default="mini", help="mini, or a published size (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds 0, 1, … of each row (default: %(default)s)"
    )
    parser.add_argument("--tasks", default="", help="only these, with commas")
    parser.add_argument("--rows", default="", help="only these, with commas")
    parser.add_argument(
        "--workdirs",
        default="",
        help="folder of the runs' workdirs (default: a temporary one that depends on --results)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep workdirs, with their checkpoints, once the result is written",
    )
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="only the I-th of N parts, counted from 1"
    )
    parser.add_argument("--smoke", action="store_true", help="every run cut down to seconds")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands of the runs, and run nothing"
    )
    arguments, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if not word.startswith("--config.")]
    if strange:
        raise InputError(
            f"unexpected argument {strange[0]!r}; see --help, and write config fields as "
            "--config.FIELD=VALUE"
        )
    if arguments.seeds < 1:
        raise InputError(f"--seeds={arguments.seeds} must be at least 1")
    return arguments, rest


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))
