"""Scores the texts of a file with a checkpoint; neither TensorFlow nor training data is needed.

    gemma-encoder predict --workdir=runs/sst2 --input=texts.txt
    gemma-encoder predict --workdir=runs/mine --input=texts.csv --keep=id --output=scores.jsonl

Files of any size: a few thousand texts are in memory at a time, and a run that was cut off resumes
when the command is given again.
"""

import pathlib
from collections.abc import Sequence

from gemma_encoder.cli import commandline


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.text("workdir", "A run's folder, one of its checkpoints, or an exported folder.")
    add_prediction_flags(flags)
    flags.parse(argv)
    return predict_from_flags(flags)


def add_prediction_flags(flags: commandline.Flags) -> None:
    """Adds the flags of a prediction, but for --workdir."""
    flags.text("task", "The task to score for; may be left out where the checkpoint has only one.")
    flags.text(
        "input",
        ".txt (one text a line, none blank), or .csv, .tsv, .jsonl, .parquet with a column for each of "
        "the task's fields; text also as .gz.",
    )
    flags.text(
        "output",
        "a .jsonl, .csv or .parquet file; by default JSON lines on the terminal.",
    )
    flags.words(
        "columns",
        "the columns of --input that hold the task's fields, in their order, where they "
        "have other names.",
    )
    flags.words("keep", "further columns of --input to repeat in the output, e.g. an id.")
    flags.modules()


def predict_from_flags(flags: commandline.Flags) -> int:
    """Predicts as the flags say and returns the exit code."""
    workdir = flags.required("workdir", "name a run's folder or an export")
    source = flags.required("input", "name a .txt, .csv, .tsv, .jsonl or .parquet file with texts")
    from gemma_encoder.inference import Predictor
    from gemma_encoder.predict_file import predict_file

    predictor = Predictor.load(workdir)
    count = predict_file(
        predictor,
        predictor.task(flags["task"]),
        pathlib.Path(source),
        pathlib.Path(flags["output"]) if flags["output"] else None,
        flags["columns"] or (),
        flags["keep"] or (),
    )
    if flags["output"]:
        print(f"wrote {flags['output']}, {count} texts")
    return 0
