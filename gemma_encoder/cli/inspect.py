"""Shows what a model sees of a task, or what a checkpoint holds.

Data: raw records beside their text, tokens, a packed row, and how long the texts are.

    gemma-encoder inspect --task=glue_mrpc --n=3
    gemma-encoder inspect --config=own:classification --config.own.train=train.csv

Checkpoints: their size, their tensors, and if they load (`gemma-encoder inspect PATH --help`).

    gemma-encoder inspect PATH [--read]     PATH as `load_backbone` takes it
    gemma-encoder inspect --sizes           the table of published sizes
"""

import importlib
from collections.abc import Sequence

CHECKPOINT = {"--read", "--sizes"}  # flags that data have not


def main(argv: Sequence[str]) -> int:
    """Runs the program for data or for checkpoints and returns its exit code."""
    of_checkpoint = (argv and not argv[0].startswith("-")) or CHECKPOINT & set(argv)
    subject = "inspect_checkpoint" if of_checkpoint else "inspect_data"
    return importlib.import_module(f"gemma_encoder.cli.{subject}").main(argv)
