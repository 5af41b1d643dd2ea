"""Study 1: does a decoder become a better encoder when its causal mask is opened for fine-tuning?

    gemma-encoder sweep --study=attention --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train \
      --config=ablations/attention:task=sst2,row=causal,seed=1 --workdir=runs/causal

The rows from random weights separate adaptation from architecture: they show the effect of the
bidirectional mask without causal pretraining.
"""

from gemma_encoder.experiments.studies.study import Study, Variant, random_weights

STUDY = Study(
    name="attention",
    question="Does fine-tuning with a bidirectional mask beat fine-tuning with the causal one that "
    "the decoder was pretrained with?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="bidirectional",
    rows=(
        Variant("bidirectional"),
        Variant("causal", {"model.attention": "causal"}),
        Variant("bidirectional_random", random_weights),
        Variant(
            "causal_random",
            lambda config, task: {"model.attention": "causal", **random_weights(config, task)},
        ),
    ),
)
get_config = STUDY.get_config
