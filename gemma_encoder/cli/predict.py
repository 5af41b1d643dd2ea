"""Scores the texts of a file with a checkpoint. Needs neither TensorFlow nor training data.

    gemma-encoder predict --workdir=runs/sst2 --input=texts.txt
    gemma-encoder predict --workdir=runs/mine --input=texts.csv --keep=id --output=scores.jsonl

Files may have any size: a few thousand texts are in memory at a time. If a run is interrupted,
rerun the command to resume.
"""

import pathlib
from collections.abc import Sequence

from gemma_encoder import activity, terminal
from gemma_encoder.cli import commandline
from gemma_encoder.model.config import AUTO, COMPUTE_DTYPES


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.text("workdir", "Folder of a run, one of its checkpoints, or an export.")
    add_prediction_flags(flags)
    flags.parse(argv)
    return predict_from_flags(flags)


def add_prediction_flags(flags: commandline.Flags) -> None:
    """Adds the flags of a prediction, except --workdir."""
    flags.text("task", "Task to score; optional if the checkpoint has only one.")
    flags.text(
        "input",
        ".txt file (one text per line), or .csv, .tsv, .jsonl or .parquet with a "
        "column per field of the task; text files also as .gz.",
    )
    flags.text("output", ".jsonl, .csv or .parquet file; by default JSON lines on stdout.")
    flags.words(
        "columns",
        "Columns of --input for the task's fields, in their order, if their names differ.",
    )
    flags.words("keep", "Other columns of --input to copy to the output, e.g. an id.")
    flags.choice(
        "blank",
        "For a blank text or field: stop before the first prediction, or predict null.",
        ("error", "null"),
        "error",
    )
    flags.real(
        "abstain_below",
        "Write null predictions where the probability of the decision is below this, from above 0 "
        "to 1; probabilities are written for all texts.",
    )
    flags.real(
        "conformal",
        "Level from 0.5 to 0.99, e.g. 0.9: add the classes (prediction_set) or the interval (low, "
        "high) that hold the true label with this probability; needs evaluate --calibrate.",
    )
    flags.choice(
        "quantization",
        "Predict in int8, on a CPU: faster, with a quarter of the memory for weights.",
        ("int8",),
        None,
    )
    flags.choice(
        "compute_dtype",
        "Dtype of activations, auto for the faster one; by default that of the checkpoint.",
        (AUTO, *COMPUTE_DTYPES),
        None,
    )
    flags.modules()


def predict_from_flags(flags: commandline.Flags) -> int:
    """Predicts according to the flags and returns the exit code."""
    workdir = flags.required("workdir", "name the folder of a run or an export")
    source = flags.required("input", "name a .txt, .csv, .tsv, .jsonl, .json or .parquet file")
    from gemma_encoder.evaluation.certainty import Certainty

    certainty = Certainty(flags["conformal"], flags["abstain_below"])
    with activity.starting("loading the model"):
        from gemma_encoder.inference import Predictor
        from gemma_encoder.predict_file import predict_file

        options = {name: flags[name] for name in ("quantization", "compute_dtype")}
        predictor = Predictor.load(workdir, **options)
    count = predict_file(
        predictor,
        predictor.task(flags["task"]),
        pathlib.Path(source),
        pathlib.Path(flags["output"]) if flags["output"] else None,
        flags["columns"] or (),
        flags["keep"] or (),
        flags["blank"],
        certainty,
    )
    if flags["output"]:
        terminal.print_note(f"wrote {flags['output']}, {count} texts")
    return 0
