"""Fine-tunes one GLUE task.

    TFDS_DATA_DIR=DATA gemma-encoder train --config=glue:sst2 --workdir=runs/sst2
    TFDS_DATA_DIR=DATA gemma-encoder train --config=glue:stsb,size=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/stsb

Argument: a task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli), then `size=…` (by default
tiny: random weights, the small tokenizer, two CPU cores) and `smoke` (a slice of the real data, in
seconds). Data: prepared once with TensorFlow Datasets in the folder TFDS_DATA_DIR, for example by
`tfds build glue/sst2 --data_dir=DATA`.

For the leaderboard, predict the test splits (with MNLI's run, the diagnostic set, too) and collect
the predictions:

    gemma-encoder evaluate --config=glue:sst2 --workdir=runs/sst2 --config.evaluate_split=test
    gemma-encoder evaluate --config=glue:mnli --workdir=runs/mnli --config.evaluate_split=test \
      "--config.tasks=('glue_mnli','glue_ax')"
    gemma-encoder submit make --benchmark=glue --output=glue.zip runs/*
"""

from gemma_encoder.training import recipe

# Duration and row length of the tiny size from random weights; pairs need longer rows.
TINY = {
    "cola": ("3 epochs", 128),
    "sst2": ("2 epochs", 128),
    "mrpc": ("3 epochs", 256),
    "qqp": ("1 epochs", 128),
    "stsb": ("5 epochs", 128),
    "mnli": ("1 epochs", 128),
    "qnli": ("1 epochs", 256),
    "rte": ("5 epochs", 256),
    "wnli": ("3 epochs", 128),
}


def get_config(arg: str = "sst2"):
    """Returns the config for a GLUE task."""
    name, options, smoke = recipe.parse_arg(arg, tuple(TINY))
    name = name or "sst2"
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = (f"glue_{name}",)
    epochs, length = TINY[name]
    config.max_length = config.batch.row_length = length
    if recipe.is_small(size):
        config.batch.rows = 16
        config.batch.segments = 16
        config.optimizer.learning_rate = 1e-3
        config.train_for = epochs
        config.optimizer.weight_decay = 0.01
    else:
        config.batch.rows = 32
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-5
        config.train_for = "3 epochs"
    config.evaluate_every = "50 percent"
    return recipe.smoke(config) if smoke else config
