"""Study 5: ranking losses, with lists of several lengths.

    gemma-encoder sweep --study=ranking_loss --results=RESULTS --scale=mini --seeds=3
    MSMARCO_DIR=DATA gemma-encoder train --config=ablations/ranking_loss:row=point_ce_16 \
      --workdir=runs/point_ce_16

Rows of a batch are proportional to the list length, so that all updates use equally many queries.
Lists of 36, common on MS MARCO, are for real sizes.
"""

import math

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import REAL, Changes, Study, Variant

LOSSES = ("point_ce", "pairwise_logistic", "softmax", "poly1")
SIZES = (4, 8, 16, 36)


def _changes(loss: str, size: int):
    def changes(config: ConfigDict, task: str) -> Changes:
        del task
        # A power of two is divisible over any mesh.
        rows = 2 ** round(math.log2(config.batch.rows * size / config.ranking.list_size))
        return {"losses.ranking": loss, "ranking.list_size": size, "batch.rows": rows}

    return changes


STUDY = Study(
    name="ranking_loss",
    question="Which ranking loss is best, and does it hang on the length of the lists?",
    tasks=("msmarco",),
    baseline="softmax_8",
    rows=tuple(
        Variant(f"{loss}_{size}", _changes(loss, size), REAL if size > 16 else ())
        for size in SIZES
        for loss in LOSSES
    ),
)
get_config = STUDY.get_config
