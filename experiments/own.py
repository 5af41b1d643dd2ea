"""Fine-tunes on your own files: JSONL, CSV, TSV or Parquet.

    gemma-encoder train --config=own:classification --config.own.train=train.csv \
      --config.own.validation=dev.csv --workdir=runs/mine
    gemma-encoder train --config=own:ranking,size=gemma2_2b --config.own.train=pairs.jsonl \
      --workdir=runs/mine

Argument: the kind of task (classification, regression, ranking, retrieval, multi_label, ordinal),
then `size=…` (by default tiny: random weights, the small tokenizer, two CPU cores) and `smoke` (a
slice of the data, in seconds). `OwnOptions` in gemma_encoder/data/tasks/own_options.py documents
the fields of `config.own` with their defaults: columns, classes, template and metrics. To see the
model's inputs before training, run `gemma-encoder inspect` with the same --config flags.
"""

from gemma_encoder.data.tasks.own_options import OwnOptions, table_kinds
from gemma_encoder.inputs import kinds
from gemma_encoder.training import recipe


def get_config(arg: str = "classification"):
    """Returns the config for a kind of task."""
    kind, options, smoke = recipe.parse_arg(arg, table_kinds())
    kind = kind or OwnOptions.kind
    is_list = kinds.get(kind).is_list
    embeds = kinds.get(kind).embeds
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = ("own",)
    config.own.kind = kind
    config.model.pooling.normalize = embeds  # similarities are cosines
    config.evaluate_every = "50 percent"
    config.train_for = "3 epochs"
    if recipe.is_small(size):
        config.max_length = config.batch.row_length = 256
        # Small batches, because users' files are often small.
        config.batch.rows = 16 if is_list else 8
        config.batch.segments = 4 if is_list and not embeds else 8
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.01
    else:
        config.max_length = config.batch.row_length = 512
        config.batch.rows = 64 if is_list else 32
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-5
    return recipe.smoke(config) if smoke else config
