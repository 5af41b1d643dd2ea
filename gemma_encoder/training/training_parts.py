"""The parts of a recipe that training alone needs."""

import functools

from gemma_encoder.data import mixtures
from gemma_encoder.data.pipeline import average_examples
from gemma_encoder.inputs.errors import unknown
from gemma_encoder.training.hooks import Hook, named_hooks
from gemma_encoder.training.parts import Parts


class TrainingParts(Parts):
    """Parts with `examples_per_step` measured, and with `best_metric` and the hooks looked up."""

    def _examples_per_step(self) -> int:
        """The average of first batches."""
        mixture = self.config.mixture
        rates = mixtures.rates(self.sources, mixture.mixing, mixture.temperature)
        average = average_examples(self.sources, rates, self.tokenizer, self.stream)
        return max(round(average), 1)

    @functools.cached_property
    def best_metric(self) -> tuple[str, str]:
        """The task and the metric that the best checkpoint is chosen by; InputError for others."""
        names = [
            f"{source.task.name}/{name}{f'_{part}' if part else ''}"
            for source in self.sources
            if (parts := source.evaluation_splits(self.config.evaluate_split))
            for name in source.task.metrics
            for part in parts
        ]
        name = self.config.best_metric or names[0]
        if name not in names:
            raise unknown("best_metric", name, names)
        return tuple(name.split("/", 1))

    @functools.cached_property
    def hooks(self) -> tuple[Hook, ...]:
        """The hooks that the config names."""
        return named_hooks(self.config.hooks)
