"""Tokenizes the data of a config ahead of training, on this machine or on many, with Apache Beam.

    gemma-encoder prepare --config=glue:mnli --output=DIR
    gemma-encoder train --config=glue:mnli --config.prepared=DIR --workdir=runs/mnli

Training then gives the same results to the bit, reads no raw data and tokenizes nothing. The folder
serves any seed, batch, number of readers, length of training and list size. A second start resumes
where the first one stopped. By default Beam runs in this process; `--pipeline_options`
names another runner, as for `seqio_cache_tasks`:
--pipeline_options="--runner=DataflowRunner,--project=NAME,--region=NAME,--temp_location=gs://BUCKET/tmp".
Workers must see the raw data under the same paths, and have this package with its extra `prepare`.
"""

from collections.abc import Sequence

from gemma_encoder.cli import commandline


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(__doc__)
    flags.config()
    flags.text("output", "Folder for the prepared tasks, local or gs://.")
    flags.words(
        "pipeline_options", "Beam's own flags, separated by commas.", ["--runner=DirectRunner"]
    )
    config = flags.parse(argv)
    for name in ("config", "output"):
        flags.required(name, "for example --config=glue:mnli --output=prepared")
    from gemma_encoder.prepare import prepare
    from gemma_encoder.training.build import build

    with config.unlocked():
        config.prepared = ""
    prepare(build(config), flags["output"], flags["pipeline_options"])
    return 0
