"""Makes or checks the zip files for submission to the GLUE and SuperGLUE leaderboards.

    gemma-encoder submit make --benchmark=glue --output=glue.zip WORKDIR [WORKDIR …]
    gemma-encoder submit check glue.zip

Predictions are read from one or more workdirs, where
`gemma-encoder evaluate --config.evaluate_split=test` writes them. A submission is written only if
it is complete.
"""

import argparse
from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import InputError

BENCHMARKS = ("glue", "superglue")


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from etils import epath

    from gemma_encoder.evaluation import submission

    if arguments.command == "make":
        path = epath.Path(arguments.output)
        benchmark = arguments.benchmark
        with activity.during("reading the predictions"):
            content = submission.make_submission(benchmark, arguments.workdirs)
        counts = submission.check_submission(content, benchmark)
        commandline.write_output(path, content)
    else:
        path = epath.Path(arguments.submission)
        content = submission.read_archive(path)
        try:
            benchmark = submission.benchmark_of(content)
            counts = submission.check_submission(content, benchmark)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    terminal.print_result(f"{path} is a complete {benchmark} submission")
    for name, count in counts.items():
        terminal.print_result(f"  {name:<14} {count:>7}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder submit",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser(
        "make", help="write a submission from predictions of the test splits"
    )
    maker.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    maker.add_argument("--output", required=True, help="zip file to write")
    maker.add_argument("workdirs", nargs="+", help="folders of runs that predicted test splits")
    checker = commands.add_parser("check", help="validate a submission")
    checker.add_argument("submission", help="zip file to check")
    return parser
