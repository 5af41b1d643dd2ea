"""Writes a self-contained HTML report on one or more runs.

    gemma-encoder report runs/one runs/two --output=report.html

The report shows config differences, curves, metrics with confidence intervals, mistakes, and wins
and losses against the first run. It reads only the workdirs of the runs.
"""

import pathlib
from collections.abc import Sequence

from gemma_encoder import activity, runtime, terminal
from gemma_encoder.cli import commandline


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder report",
        description=__doc__,
    )
    parser.add_argument(
        "workdirs",
        nargs="+",
        type=pathlib.Path,
        metavar="WORKDIR",
        help="folder of a run; other runs are compared with the first",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        help="HTML file to write (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    runtime.require_training()  # metrics and confidence intervals are recomputed
    with activity.during("computing the report"):
        from gemma_encoder.report import render_report

        page = render_report(arguments.workdirs)
    commandline.write_output(arguments.output, page)
    size = f"{len(page) / 1024:.0f} KiB"
    terminal.print_note(f"wrote {arguments.output}, {size}: open it in a browser")
    return 0
