"""Tokenizes the data of a config ahead of training, on one or many machines, with Apache Beam.

    gemma-encoder prepare --config=glue:mnli --output=DIR
    gemma-encoder train --config=glue:mnli --config.prepared=DIR --workdir=runs/mnli

Training then reads no raw data, tokenizes nothing, and gives the same results to the bit. Prepared
data is valid for any seed, batch, number of readers, training length and list size. If preparation
is interrupted, rerun the command to resume.

By default Beam runs in this process. `--pipeline_options` selects another runner, as for
`seqio_cache_tasks`:

    --pipeline_options="--runner=DataflowRunner,--project=ID,--region=NAME,--temp_location=gs://TMP"

Workers need access to the raw data at the same paths, and this package with its extra `prepare`.
"""

from collections.abc import Sequence

from gemma_encoder import activity
from gemma_encoder.cli import commandline


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.config()
    flags.text("output", "Folder for the prepared tasks, local or gs://.")
    flags.words(
        "pipeline_options", "Flags of Beam, separated by commas.", ["--runner=DirectRunner"]
    )
    config = flags.parse(argv)
    for name in ("config", "output"):
        flags.required(name, "for example --config=glue:mnli --output=prepared")
    from gemma_encoder.prepare import prepare
    from gemma_encoder.training.build import build

    with config.unlocked():
        config.prepared = ""
    recipe = build(config, evaluates=False, platform="cpu")  # leaves accelerators to others
    with activity.during("preparing the texts"):
        prepare(recipe, flags["output"], flags["pipeline_options"])
    return 0
