"""Builds the parts of a recipe that only training needs."""

import functools

from gemma_encoder.data import mixtures
from gemma_encoder.data.pipeline import average_examples
from gemma_encoder.inputs.errors import unknown
from gemma_encoder.training.hooks import Hook, named_hooks
from gemma_encoder.training.parts import Parts


class TrainingParts(Parts):
    """Parts with a measured `examples_per_step`, and with `best_metric` and the hooks."""

    def _examples_per_step(self) -> int:
        """Returns the mean of examples in the first batches."""
        mixture = self.config.mixture
        rates = mixtures.rates(self.sources, mixture.mixing, mixture.temperature)
        average = average_examples(self.sources, rates, self.tokenizer, self.stream)
        return max(round(average), 1)

    @functools.cached_property
    def best_metric(self) -> tuple[str, str]:
        """(task, metric) that selects the best checkpoint; raises InputError for an unknown one."""
        valid_names = []
        for source in self.sources:
            parts = source.evaluation_splits(self.config.evaluate_split)
            for metric in source.task.metrics:
                metrics = [f"{metric}_{part}" if part else metric for part in parts]
                valid_names += [f"{source.task.name}/{name}" for name in metrics]
        name = self.config.best_metric or valid_names[0]
        if name not in valid_names:
            raise unknown("best_metric", name, valid_names)
        return tuple(name.split("/", 1))

    @functools.cached_property
    def hooks(self) -> tuple[Hook, ...]:
        """Hooks that the config names."""
        return named_hooks(self.config.hooks)
