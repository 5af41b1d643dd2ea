"""Study 6: learning rate × batch size × training duration, as multiples of the recipe's values.

    gemma-encoder sweep --study=hyperparameters --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train \
      --config=ablations/hyperparameters:task=sst2,row=rate_3_rows_2_length_1 --workdir=runs/rate

`rate_R_rows_B_length_E`: R times the learning rate, B times the rows of a batch, E times the
duration. The row 1, 1, 1 is the recipe.
"""

import re

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import Changes, Study, Variant


def longer(train_for: str, times: float) -> str:
    """Multiplies a duration: twice "3 epochs" is "6 epochs"."""
    value, unit = re.fullmatch(r"\s*([0-9.]+)\s*(\w+)\s*", train_for).groups()
    return f"{float(value) * times:g} {unit}"


def _changes(rate: float, rows: int, length: float):
    def changes(config: ConfigDict, task: str) -> Changes:
        del task
        return {
            "optimizer.learning_rate": config.optimizer.learning_rate * rate,
            "batch.rows": config.batch.rows * rows,
            "train_for": longer(config.train_for, length) if length != 1 else config.train_for,
        }

    return changes


STUDY = Study(
    name="hyperparameters",
    question="How far do learning rate, batch size and length of training move the results?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="rate_1_rows_1_length_1",
    rows=tuple(
        Variant(f"rate_{rate:.3g}_rows_{rows}_length_{length}", _changes(rate, rows, length))
        for rate in (1 / 3, 1, 3)
        for rows in (1, 2)
        for length in (1, 2)
    ),
)
get_config = STUDY.get_config
