"""Study 4: does it matter on which side a text is padded, and does packing texts into rows cost anything?

    gemma-encoder sweep --study=padding --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/padding:task=sst2,row=left --workdir=runs/left

Rows that are not packed hold one text each. A batch has then as many rows as the packed one holds texts, so that an update sees as many
examples.
"""

from ml_collections import ConfigDict

from gemma_encoder.experiments.studies.study import Changes, Study, Variant

# Texts in a packed batch divided by its rows, by the recipes of the scale `mini` and of real sizes.
MINI_TEXTS_PER_ROW = {"sst2": 3, "stsb": 3, "msmarco": 1}
TEXTS_PER_ROW = {"sst2": 6, "stsb": 3, "msmarco": 4}


def unpacked(side: str):
    """The change to one text a row, padded on `side`."""

    def changes(config: ConfigDict, task: str) -> Changes:
        texts = (MINI_TEXTS_PER_ROW if config.model.size == "pretrained" else TEXTS_PER_ROW)[task]
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
