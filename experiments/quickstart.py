"""Fine-tunes a tiny Gemma encoder on a mixture of three embedded tasks, without downloads.

    gemma-encoder train --config=quickstart --workdir=runs/quickstart

The tasks are one classification, one regression and one ranking task. Needs two CPU cores.
Argument: `smoke`, a run of seconds that learns nothing.
"""

from gemma_encoder.training import recipe


def get_config(arg: str = ""):
    """Returns the config; `arg` may have "size=…" and "smoke"."""
    _, options, smoke = recipe.parse_arg(arg)
    config = recipe.default_config()
    recipe.set_size(config, options.get("size", "tiny"))
    config.tasks = ("toy_sentiment", "toy_similarity", "toy_ranking")
    config.mixture.mixing = "proportional"
    # Squared errors on [0, 1] are small beside the other losses.
    config.task_weights.toy_similarity = 2.0
    config.max_length = config.batch.row_length = 64
    config.batch.rows = 56
    config.batch.segments = 6
    config.ranking.list_size = 10
    config.optimizer.learning_rate = 2e-3
    config.optimizer.b2 = 0.98
    config.optimizer.schedule = "cosine"
    config.train_for = "220 steps"
    config.evaluate_every = "50 percent"
    return recipe.smoke(config) if smoke else config
