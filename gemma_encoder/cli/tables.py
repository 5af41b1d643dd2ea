"""Writes a report on a sweep: Markdown tables and PNG plots, from result files only.

    gemma-encoder tables RESULTS [--output=RESULTS.md]

Plots are written to a folder beside the report: RESULTS.md uses RESULTS_plots/attention.png.
"""

import pathlib
import shlex
from collections.abc import Sequence

from gemma_encoder import runtime, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.inputs.errors import in_one_line


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    parser = commandline.ArgumentParser(
        prog="gemma-encoder tables",
        description=__doc__,
    )
    parser.add_argument(
        "results", type=pathlib.Path, help="folder of result files from gemma-encoder sweep"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("RESULTS.md"),
        help="Markdown file to write (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    runtime.require_training()
    from gemma_encoder.experiments.studies import results
    from gemma_encoder.experiments.studies.tables import studies_report

    output = arguments.output
    command = shlex.join(["gemma-encoder", "tables", f"{arguments.results}", f"--output={output}"])
    with in_one_line(f"--output={output} cannot be written", errors=OSError):  # of a plot
        text = studies_report(results.read_results(arguments.results), output, command)
    commandline.write_output(output, text)
    terminal.print_note(f"wrote {output}")
    return 0
