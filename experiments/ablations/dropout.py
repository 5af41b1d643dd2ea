"""Study 3: rates of dropout on attention probabilities and feed-forward outputs.

    gemma-encoder sweep --study=dropout --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/dropout:task=sst2,row=none \
      --workdir=runs/none
"""

from gemma_encoder.experiments.studies.study import Study, Variant


def _rows() -> list[Variant]:
    def row(name: str, attention: float, feed_forward: float) -> Variant:
        rates = {
            "model.attention_dropout": attention,
            "model.feed_forward_dropout": feed_forward,
        }
        return Variant(name, rates)

    rows = [row("none", 0.0, 0.0)]
    for rate in (0.05, 0.1, 0.2):
        rows.append(row(f"attention_{rate}", rate, 0.0))
        rows.append(row(f"feed_forward_{rate}", 0.0, rate))
        rows.append(row(f"both_{rate}", rate, rate))
    return rows


STUDY = Study(
    name="dropout",
    question="How much dropout helps fine-tuning: on attention probabilities, on feed-forward "
    "outputs, or on both?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="feed_forward_0.1",
    rows=tuple(_rows()),
)
get_config = STUDY.get_config
