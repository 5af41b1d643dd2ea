"""Shows the data of a task as the model reads it, or the contents of a checkpoint.

Data: raw records with their text and tokens, a packed row, and statistics of lengths and labels.

    gemma-encoder inspect --task=glue_mrpc --n=3
    gemma-encoder inspect --config=own:classification --config.own.train=train.csv

Checkpoints: size, tensors, and if they load (`gemma-encoder inspect PATH --help`).

    gemma-encoder inspect PATH [--read]     PATH as `load_backbone` takes it
    gemma-encoder inspect --sizes           table of published sizes
"""

import importlib
from collections.abc import Sequence

CHECKPOINT = {"--read", "--sizes"}  # flags of inspect_checkpoint only


def main(argv: Sequence[str]) -> int:
    """Runs the program for data or for checkpoints and returns its exit code."""
    names_a_path = argv and not argv[0].startswith("-")
    is_checkpoint = names_a_path or CHECKPOINT & set(argv)
    module = "inspect_checkpoint" if is_checkpoint else "inspect_data"
    return importlib.import_module(f"gemma_encoder.cli.{module}").main(argv)
