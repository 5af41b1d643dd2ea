"""Evaluates the newest checkpoint of a workdir on `config.evaluate_split`.

    gemma-encoder evaluate --config=glue:sst2 --workdir=runs/sst2
    gemma-encoder evaluate --config=glue:sst2 --workdir=runs/sst2 --config.evaluate_split=test
    gemma-encoder evaluate --config=glue:sst2 --workdir=runs/sst2 --calibrate

Writes predictions to WORKDIR/predictions and, if the split has labels, metrics to
WORKDIR/metrics.jsonl.
"""

from collections.abc import Sequence

import ml_collections

from gemma_encoder import activity, runtime
from gemma_encoder.cli import commandline
from gemma_encoder.cli.train import add_run_flags, checked
from gemma_encoder.model.config import AUTO, COMPUTE_DTYPES


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    add_run_flags(flags)
    flags.switch(
        "calibrate",
        "First fit a temperature and conformal thresholds on the validation split, and store them "
        "in the checkpoint; predict and exports use them.",
    )
    flags.choice(
        "quantization",
        "Evaluate in int8, on a CPU, and leave the files in the workdir as they are.",
        ("int8",),
        None,
    )
    flags.choice(
        "compute_dtype",
        "Evaluate in this dtype, auto for the faster one, and leave the files in the workdir as "
        "they are; by default that of the checkpoint.",
        (AUTO, *COMPUTE_DTYPES),
        None,
    )
    config, workdir = checked(flags, flags.parse(argv))
    options = {name: flags[name] for name in ("calibrate", "quantization", "compute_dtype")}
    return evaluate_and_report(config, workdir, **options)


def evaluate_and_report(
    config: ml_collections.ConfigDict,
    workdir: str,
    *,
    calibrate: bool = False,
    quantization: str | None = None,
    compute_dtype: str | None = None,
) -> int:
    """Evaluates the newest checkpoint, prints the metrics, and returns the exit code."""
    runtime.require_training()
    with activity.starting("starting"):
        from gemma_encoder import distributed
        from gemma_encoder.cli.summary import summarize
        from gemma_encoder.training import loop

        distributed.initialize()
    result = loop.evaluate(
        config,
        workdir,
        calibrate=calibrate,
        quantization=quantization,
        compute_dtype=compute_dtype,
    )
    return summarize(result, config.evaluate_split)
