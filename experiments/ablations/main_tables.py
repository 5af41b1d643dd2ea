"""Study 8: the main tables: every GLUE and SuperGLUE task and MS MARCO at every size.

    gemma-encoder sweep --study=main_tables --results=RESULTS --scale=gemma2_2b --seeds=3 \
      --config.model.pretrained=GEMMA
    TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/main_tables:task=cola,row=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/cola

Rows are sizes. `PUBLISHED` has values from the literature, printed beside the results.
"""

from typing import NamedTuple

from gemma_encoder.experiments.studies.study import SCALES, TASKS, Study, Variant


class Published(NamedTuple):
    """A value from the literature, with its source."""

    benchmark: str
    split: str
    model: str
    value: str
    source: str


_RANKT5 = "RankT5, arXiv 2210.10634"
PUBLISHED = (
    Published("GLUE, average", "test", "BERT-large", "82.1", "BERT, arXiv 1810.04805"),
    *(
        Published("GLUE, average", "test", f"T5-{size}", value, "T5, arXiv 1910.10683")
        for size, value in {"base": "82.7", "large": "86.4", "3B": "88.5", "11B": "90.3"}.items()
    ),
    Published(
        "GLUE, average", "validation", "DeBERTa-v3-large", "91.4", "ModernBERT, arXiv 2412.13663"
    ),
    Published(
        "GLUE, average", "validation", "ModernBERT-large", "90.4", "ModernBERT, arXiv 2412.13663"
    ),
    Published("MS MARCO, MRR@10", "dev", "BM25", "0.187", "as commonly reported"),
    Published("MS MARCO, MRR@10", "dev", "monoT5", "0.4156", _RANKT5),
    *(
        Published("MS MARCO, MRR@10", "dev", f"BERT-large, {loss}", value, _RANKT5)
        for loss, value in {"PointCE": "0.3867", "softmax": "0.3928"}.items()
    ),
    *(
        Published("MS MARCO, MRR@10", "dev", f"RankT5 {model}, {loss}", value, _RANKT5)
        for model, values in {
            "large encoder": ("0.4216", "0.4305", "0.4296"),
            "large encoder-decoder": ("0.4209", "0.4278", "0.4343"),
        }.items()
        for loss, value in zip(("PointCE", "softmax", "Poly-1"), values, strict=True)
    ),
)

STUDY = Study(
    name="main_tables",
    question="How good is the encoder on GLUE, SuperGLUE and MS MARCO, at every size?",
    tasks=TASKS,
    baseline="",
    rows=tuple(Variant(scale, scales=(scale,)) for scale in SCALES),
)
get_config = STUDY.get_config
