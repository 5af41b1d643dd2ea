"""One self-contained HTML page about one run or several.

python -m gemma_encoder.report runs/one runs/two --output=report.html

It reads what runs leave in their workdirs, and nothing else; several runs are compared with the
first. The page shows what differs, curves, metrics with intervals, mistakes, wins and losses.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.report.page import report


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gemma_encoder.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdirs",
        nargs="+",
        type=pathlib.Path,
        metavar="WORKDIR",
        help="of a run; the others are compared with the first one",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        help="the page (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        page = report(arguments.workdirs)
        try:
            arguments.output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--output={arguments.output} cannot be written: {error.strerror}"
            ) from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}, {len(page) / 1024:.0f} KiB: open it in a browser")
    return 0
