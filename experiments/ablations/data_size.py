"""Study 7: fine-tuning on 1 %, 10 % or all of the training set.

    gemma-encoder sweep --study=data_size --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train \
      --config=ablations/data_size:task=sst2,row=10_percent --workdir=runs/tenth

A row trains on the first records, at least eight. All rows train on equally many examples: fewer
records are repeated more often.
"""

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import Changes, Study, Variant, num_training_records
from gemma_encoder.training.durations import Duration


def part(share: float):
    """Returns the changes that train on a share of the records."""

    def changes(config: ConfigDict, task: str) -> Changes:
        num_records = num_training_records(config, task)
        duration = Duration.parse(config.train_for, "train_for")
        result = {"max_train_examples": max(round(share * num_records), 8)}
        if duration.unit == "epochs":
            result["train_for"] = f"{round(duration.value * num_records)} examples"
        return result

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
