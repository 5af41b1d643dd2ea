"""Fine-tunes a tiny Gemma encoder on three embedded tasks, one of each kind, in one mixture: no download.

    gemma-encoder train --config=quickstart --workdir=runs/quickstart

Needs: two CPU cores. Argument `smoke` makes a run of seconds that learns nothing.
"""

from gemma_encoder.training import recipe


def get_config(arg: str = ""):
    """The config; `arg` may be "smoke" or "size=…"."""
    _, options, smoke = recipe.parse_arg(arg)
    config = recipe.default_config()
    recipe.set_size(config, options.get("size", "tiny"))
    config.tasks = ("toy_sentiment", "toy_similarity", "toy_ranking")
    config.mixture.mixing = "proportional"
    config.task_weights.toy_similarity = (
        2.0  # squared errors on [0, 1] are small beside the other losses
    )
    config.max_length = config.batch.row_length = 64
    config.batch.rows, config.batch.segments = 56, 6
    config.ranking.list_size = 10
    config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.schedule = (
        2e-3,
        0.98,
        "cosine",
    )
    config.train_for = "220 steps"
    config.evaluate_every = "50 percent"
    return recipe.smoke(config) if smoke else config
