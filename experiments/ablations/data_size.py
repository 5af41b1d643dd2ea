"""Study 7: how much does the encoder need: 1 %, 10 % or all of the training set?

    gemma-encoder sweep --study=data_size --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA python -m gemma_encoder.main --config=experiments/ablations/data_size.py:task=sst2,row=10_percent --workdir=runs/tenth

The parts are the first records, of at least eight. Training is as long in examples for every row: fewer records are seen more often.
"""

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import Changes, Study, Variant, num_training_records
from gemma_encoder.training.durations import Duration


def part(share: float):
    """The change to a share of the records."""

    def changes(config: ConfigDict, task: str) -> Changes:
        whole, length = (
            num_training_records(config, task),
            Duration.parse(config.train_for, "train_for"),
        )
        examples = (
            {"train_for": f"{round(length.value * whole)} examples"}
            if length.unit == "epochs"
            else {}
        )
        return {"max_train_examples": max(round(share * whole), 8), **examples}

    return changes


STUDY = Study(
    name="data_size",
    question="How do results grow with the number of training records?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="100_percent",
    rows=(
        Variant("1_percent", part(0.01)),
        Variant("10_percent", part(0.1)),
        Variant("100_percent"),
    ),
)
get_config = STUDY.get_config
