"""Fine-tunes a re-ranker on passage-ranking files in MS MARCO's layout.

    MSMARCO_DIR=DATA gemma-encoder train --config=msmarco --workdir=runs/msmarco
    MSMARCO_DIR=DATA gemma-encoder train --config=msmarco:size=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/msmarco

Argument: `size=…` (by default tiny: random weights, the small tokenizer, two CPU cores) and `smoke`
(a slice of the real data, in seconds). Data: the folder MSMARCO_DIR with collection.tsv,
queries.{train,dev}.tsv, qrels.{train,dev}.tsv and run.{train,dev}.tsv. The re-ranked run is written
to WORKDIR/predictions/msmarco.validation.trec.
"""

from gemma_encoder.training import recipe


def get_config(arg: str = ""):
    """Returns the config; `arg` may have "size=…" and "smoke"."""
    _, options, smoke = recipe.parse_arg(arg)
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = ("msmarco",)
    config.losses.ranking = "softmax"
    config.evaluate_every = "100 percent"
    if recipe.is_small(size):
        config.max_length = config.batch.row_length = 256
        config.ranking.list_size = 8
        config.ranking.negative_ranks = (1, 100)
        config.batch.rows = 32
        config.batch.segments = 4
        config.optimizer.learning_rate = 5e-4
        config.train_for = "5 epochs"
    else:
        config.max_length = config.batch.row_length = 512
        # Listwise softmax needs lists of about 20 to 30 documents or more (RankT5, arXiv
        # 2210.10634); 36 is common: one positive, 35 negatives.
        config.ranking.list_size = 36
        config.ranking.negative_ranks = (1, 1000)
        config.batch.rows = 256  # a power of two is divisible over any slice
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-5
        config.train_for = "100000 steps"
        config.checkpoint_every = "5000 steps"
    return recipe.smoke(config) if smoke else config
