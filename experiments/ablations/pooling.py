"""Study 2: poolers, with a bidirectional and a causal mask.

    gemma-encoder sweep --study=pooling --results=RESULTS --scale=mini --seeds=3
    TFDS_DATA_DIR=DATA gemma-encoder train --config=ablations/pooling:task=sst2,row=last_k_causal \
      --workdir=runs/last_k_causal

KV-probe pooling has 32 latents: with a single latent, the softmax would have one term, and every
text would have the same vector.
"""

from gemma_encoder.experiments.studies.study import Study, Variant

POOLERS = {
    "mean": {},
    "last_k": {},
    "first_k": {},
    "attention_query": {},
    "attention_kv": {"model.pooling.probes": 32},
}


def _rows() -> list[Variant]:
    rows = []
    for attention in ("bidirectional", "causal"):
        mask = {"model.attention": attention} if attention == "causal" else {}
        for name, options in POOLERS.items():
            pooler = {"model.pooling.name": name} if name != "mean" else {}
            rows.append(Variant(f"{name}_{attention}", mask | pooler | options))
    rows += [
        Variant(f"{name}_{k}", {"model.pooling.name": name, "model.pooling.k": k})
        for name in ("last_k", "first_k")
        for k in (4, 16)
    ]
    probes = {"attention_query": (4, 32), "attention_kv": (4, 128)}
    return rows + [
        Variant(f"{name}_{n}", {"model.pooling.name": name, "model.pooling.probes": n})
        for name, counts in probes.items()
        for n in counts
    ]


STUDY = Study(
    name="pooling",
    question="Which pooler suits which mask, and how many states (K) or probes should it take?",
    tasks=("sst2", "stsb", "msmarco"),
    baseline="mean_bidirectional",
    rows=tuple(_rows()),
)
get_config = STUDY.get_config
