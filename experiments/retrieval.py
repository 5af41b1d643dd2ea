"""Fine-tunes a retriever on passage-ranking files in MS MARCO's layout.

    MSMARCO_DIR=DATA gemma-encoder train --config=retrieval --workdir=runs/retrieval
    MSMARCO_DIR=DATA gemma-encoder train --config=retrieval:size=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/retrieval

Argument: `size=…` (by default tiny: random weights, the small tokenizer, two CPU cores), `sparse`
(weights of the vocabulary in place of dense vectors) and `smoke` (a slice of the real data, in
seconds). Data: the folder MSMARCO_DIR with collection.tsv, queries.{train,dev}.tsv,
qrels.{train,dev}.tsv and, for hard negatives, run.train.tsv or `--config.ranking.run=PATH`. Small
sizes train without hard negatives; `--config.retrieval.negatives=1` adds one per query.
From random weights, start from a bag of embeddings, see `pretraining/bag_of_embeddings.py`.
"""

from gemma_encoder.training import recipe


def get_config(arg: str = ""):
    """Returns the config; `arg` may have "size=…", "sparse" and "smoke"."""
    word, options, smoke = recipe.parse_arg(arg, names=("sparse",))
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = ("msmarco_retrieval",)
    config.model.pooling.normalize = not word
    if word == "sparse":
        config.retrieval.representation = "sparse"
        config.loss_options.retrieval.temperature = 1.0  # dot products, not cosines
        config.loss_options.retrieval.query_flops = 1e-4
        config.loss_options.retrieval.document_flops = 1e-4
        config.loss_options.retrieval.flops_ramp = 1000
    config.evaluate_every = "100 percent"
    if recipe.is_small(size):
        config.max_length = 128
        config.batch.row_length = 256
        config.batch.rows = 64
        config.batch.segments = 16
        config.retrieval.negatives = 0
        config.optimizer.learning_rate = 5e-4
        config.train_for = "2 epochs"
    else:
        # Contrastive losses improve with the batch; micro-batches keep its gradient exact.
        config.max_length = config.batch.row_length = 512
        config.retrieval.negatives = 1
        config.retrieval.eval_documents = 100_000
        config.ranking.negative_ranks = (1, 200)
        config.batch.rows = 4096
        config.batch.segments = 8
        config.batch.micro_batches = 16
        config.loss_options.retrieval.temperature = 0.02 if not word else 1.0
        config.optimizer.learning_rate = 1e-5
        config.train_for = "20000 steps"
        config.checkpoint_every = "1000 steps"
    return recipe.smoke(config) if smoke else config
