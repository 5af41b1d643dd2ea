"""Study 3: how much dropout, and where?

gemma-encoder sweep --study=dropout --results=RESULTS --scale=mini --seeds=3
TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/dropout:task=sst2,row=none --workdir=runs/none
"""

from gemma_encoder.experiments.studies.study import Study, Variant


def _rows() -> list[Variant]:
    both = ("model.attention_dropout", "model.feed_forward_dropout")
    rows = [Variant("none", dict.fromkeys(both, 0.0))]
    for rate in (0.05, 0.1, 0.2):
        for name, rates in (
            ("attention", (rate, 0.0)),
            ("feed_forward", (0.0, rate)),
            ("both", (rate, rate)),
        ):
            rows.append(Variant(f"{name}_{rate}", dict(zip(both, rates, strict=True))))
    return rows


STUDY = Study(
    name="dropout",
    question="How much dropout helps fine-tuning: on attention probabilities, on feed-forward outputs, or on both?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="feed_forward_0.1",
    rows=tuple(_rows()),
)
get_config = STUDY.get_config
