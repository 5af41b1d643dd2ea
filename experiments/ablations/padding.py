"""Study 4: left padding, right padding and packing.

    gemma-encoder sweep --study=padding --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/padding:task=sst2,row=left \
      --workdir=runs/left

Without packing, a row has one text, and a batch has as many rows as a packed batch has texts, so
that all updates use equally many examples.
"""

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import Changes, Study, Variant

# Average number of texts per packed row, in the recipes of the scale `mini` and of real sizes.
MINI_TEXTS_PER_ROW = {"sst2": 3, "stsb": 3, "msmarco": 1}
TEXTS_PER_ROW = {"sst2": 6, "stsb": 3, "msmarco": 4}


def unpacked(side: str):
    """Returns the changes to one text per row, padded on `side`."""

    def changes(config: ConfigDict, task: str) -> Changes:
        is_mini = config.model.size == "pretrained"
        texts = MINI_TEXTS_PER_ROW[task] if is_mini else TEXTS_PER_ROW[task]
        return {"batch.padding": side, "batch.segments": 1, "batch.rows": config.batch.rows * texts}

    return changes


STUDY = Study(
    name="padding",
    question="Do left padding, right padding and packing lead to different results?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="packed",
    rows=(
        Variant("packed"),
        Variant("right", unpacked("right")),
        Variant("left", unpacked("left")),
    ),
)
get_config = STUDY.get_config
