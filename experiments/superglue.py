"""Fine-tunes one SuperGLUE task.

    TFDS_DATA_DIR=DATA gemma-encoder train --config=superglue:boolq --workdir=runs/boolq
    TFDS_DATA_DIR=DATA gemma-encoder train --config=superglue:copa,size=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/copa

Argument: a task (boolq, cb, copa, multirc, record, rte, wic, wsc), then `size=…` (by default tiny:
random weights, the small tokenizer, two CPU cores) and `smoke` (a slice of the real data, in
seconds). Data: prepared once with TensorFlow Datasets in the folder TFDS_DATA_DIR, for example by
`tfds build super_glue/boolq --data_dir=DATA`; WSC is `super_glue/wsc.fixed`.

COPA and ReCoRD are lists: each option is one text, and the loss is the listwise softmax over a
question's options. For the leaderboard, predict the test splits (with RTE's run, the two diagnostic
sets, too) and collect the predictions:

    gemma-encoder evaluate --config=superglue:rte --workdir=runs/rte --config.evaluate_split=test \
      "--config.tasks=('superglue_rte','superglue_axb','superglue_axg')"
    gemma-encoder submit make --benchmark=superglue --output=superglue.zip runs/*
"""

from gemma_encoder.training import recipe

# Duration and row length of the tiny size from random weights. Long passages are truncated;
# metrics.jsonl has the share of truncated texts.
TINY = {
    "boolq": ("3 epochs", 256),
    "cb": ("20 epochs", 128),
    "copa": ("20 epochs", 128),
    "multirc": ("1 epochs", 384),
    "record": ("1 epochs", 256),
    "rte": ("5 epochs", 256),
    "wic": ("5 epochs", 128),
    "wsc": ("10 epochs", 128),
}
# Options per training list: both of COPA; of ReCoRD, the correct entity and a sample of the others.
LIST_SIZES = {"copa": 2, "record": 8}


def get_config(arg: str = "boolq"):
    """Returns the config for a SuperGLUE task."""
    name, options, smoke = recipe.parse_arg(arg, tuple(TINY))
    name = name or "boolq"
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = (f"superglue_{name}",)
    config.ranking.list_size = LIST_SIZES.get(name, config.ranking.list_size)
    epochs, length = TINY[name]
    if recipe.is_small(size):
        config.max_length = config.batch.row_length = length
        config.batch.rows = 16
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-3
        config.train_for = epochs
        config.optimizer.weight_decay = 0.01
    else:
        config.max_length = config.batch.row_length = max(length, 512)
        config.batch.rows = 32
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-5
        few_records = name in ("cb", "copa", "wsc")  # a few hundred
        config.train_for = "10 epochs" if few_records else "3 epochs"
    config.evaluate_every = "50 percent"
    return recipe.smoke(config) if smoke else config
