"""The command `gemma-encoder` and its subcommands, one module of this package each.

`gemma-encoder --help` imports no subcommand. A subcommand's module is imported when it is called,
and imports JAX and TensorFlow only after its arguments are parsed.
"""

import importlib
import sys
from collections.abc import Sequence

from gemma_encoder import __version__, runtime, terminal
from gemma_encoder.inputs.errors import InputError, unknown

# Modules of this package by name, each with its line in `gemma-encoder --help`.
COMMANDS = {
    "train": "fine-tune an encoder, or resume the run in a workdir",
    "evaluate": "evaluate the newest checkpoint of a workdir",
    "predict": "score the texts of a file with a checkpoint",
    "index": "encode a collection of documents for search",
    "search": "search an index, or several, for the queries of a file",
    "mine": "find hard negatives in a run, to train on",
    "inspect": "show the data of a task, or the contents of a checkpoint",
    "report": "write an HTML report on one or more runs",
    "export": "export a checkpoint to Hugging Face or to the gemma package",
    "submit": "make or check a GLUE or SuperGLUE leaderboard submission",
    "prepare": "tokenize the data of a config ahead of training (Apache Beam)",
    "pretrain": "pretrain a small decoder on unlabeled text",
    "sweep": "run the experiments of ablation studies, one after another",
    "tables": "report on the results of a sweep",
    "plan": "estimate memory and time of a training step on TPUs, without a TPU",
    "launch": "train on several processes, on Cloud TPU VMs or on GKE",
}
HELP = ("--help", "-help", "-h", "-?", "help")
# Long-running commands with large arrays: huge pages are worth restarting Python for.
LONG = ("train", "evaluate", "predict", "index", "search", "pretrain", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code.

    Args:
        argv: the subcommand and its arguments. None for those of this process, which may then be
            re-executed with huge pages enabled.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command, arguments = (words[0], words[1:]) if words else ("", [])
    if command in HELP:
        return _show(usage())
    if command == "--version":
        return _show(__version__)
    if not command:
        terminal.print_message(usage())
        return 2
    if command not in COMMANDS:
        terminal.print_one_line(f"error: {unknown('command', command, COMMANDS)}")
        return 2
    if argv is None and command in LONG and not set(HELP) & set(arguments):
        runtime.use_huge_pages()
    runtime.quiet()
    return importlib.import_module(f"gemma_encoder.cli.{command}").main(arguments)


def _show(text: str) -> int:
    """Prints a text and returns the exit code, as `commandline.run_program` without its imports."""
    try:
        terminal.print_result(text)
    except InputError as error:
        terminal.print_one_line(f"error: {error}")
        return 2
    except BrokenPipeError:
        terminal.discard_results()
        return 141
    return 0


def usage() -> str:
    """Returns the text of `gemma-encoder --help`."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: gemma-encoder COMMAND [ARGUMENTS]",
            "",
            *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "gemma-encoder COMMAND --help lists the options of a command.",
        ]
    )
