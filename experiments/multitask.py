"""Fine-tunes one encoder on a mixture of tasks, with one head per task or per group of tasks.

    TFDS_DATA_DIR=DATA gemma-encoder train --config=multitask:glue --workdir=runs/glue
    TFDS_DATA_DIR=DATA gemma-encoder train \
      --config=multitask:superglue,mixing=equal,size=gemma2_2b \
      --config.model.pretrained=GEMMA --workdir=runs/superglue

Argument: a mixture (glue, superglue, glue_and_msmarco), then `mixing=…` (by default temperature;
equal, proportional), `size=…` (by default tiny: random weights, the small tokenizer, two CPU cores)
and `smoke` (a slice of the real data, in seconds). Data: as for glue.py, superglue.py and
msmarco.py. Diagnostic sets have no training split; they are scored with their task's head by
`gemma-encoder evaluate --config.evaluate_split=test`. A task's loss is weighted by
`--config.task_weights.glue_stsb=…`.
"""

from gemma_encoder.data.mixtures import MIXTURES
from gemma_encoder.training import recipe


def get_config(arg: str = "glue"):
    """Returns the config for a mixture."""
    name, options, smoke = recipe.parse_arg(arg, tuple(MIXTURES), ("size", "mixing"))
    size = options.get("size", "tiny")
    config = recipe.default_config()
    recipe.set_size(config, size)
    config.tasks = (name or "glue",)
    config.mixture.mixing = options.get("mixing", "temperature")
    config.mixture.temperature = 2.0
    config.task_weights = {task: 1.0 for task in MIXTURES[name or "glue"]}
    config.ranking.list_size = 8
    if recipe.is_small(size):
        config.max_length = config.batch.row_length = 256
        config.batch.rows = 32
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.01
        config.train_for = "20000 examples"
    else:
        config.max_length = config.batch.row_length = 512
        config.batch.rows = 64
        config.batch.segments = 8
        config.optimizer.learning_rate = 1e-5
        config.train_for = "3 epochs"
    config.evaluate_every = "50 percent"
    return recipe.smoke(config) if smoke else config
