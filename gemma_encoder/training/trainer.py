"""The trainer: takes training steps in memory, without files or a workdir."""

import jax
from jax.sharding import Mesh

from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.evaluation.evaluator import Evaluation, Evaluator
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.state import TrainState, initial_state
from gemma_encoder.training.step import StepMetrics, make_program
from gemma_encoder.weights.backbone import load_pretrained, load_warm


class Trainer:
    """Trains the encoder of a recipe, step by step.

    Example, three steps on a toy task:

        >>> import contextlib, itertools
        >>> from gemma_encoder.model import sharding
        >>> from gemma_encoder.training import recipe
        >>> from gemma_encoder.training.build import build
        >>> from gemma_encoder.training.trainer import Trainer
        >>> config = recipe.default_config()
        >>> recipe.set_size(config, "tiny")
        >>> config = recipe.smoke(config)
        >>> config.tasks = ("toy_sentiment",)
        >>> trainer = Trainer(build(config, for_training=True), sharding.make_mesh(config.mesh), total=3)
        >>> trainer.initialize()
        >>> with contextlib.closing(trainer.stream()) as stream:
        ...     losses = [float(trainer.step(batch).loss) for batch in itertools.islice(stream, 3)]
        >>> trainer.step_number, len(losses)
        (3, 3)
        >>> list(trainer.evaluate().metrics["toy_sentiment"])
        ['accuracy']

    Args:
        recipe: what to train, built for training.
        mesh: the devices.
        total: steps of the whole training, which the learning rate's schedule spans.
        warmup: the first steps, over which the learning rate rises.

    Attributes:
        recipe: as given.
        mesh: the devices.
        total: as given.
        program: the compiled step, and the shapes and shardings of the state.
        state: parameters, optimizer state and step; None before `initialize`. Each step donates
            it, so that no older reference to it can be read.
        step_number: steps taken.

    Raises:
        InputError: the recipe fits neither the mesh nor the number of steps.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, total: int, warmup: int = 0):
        recipe.check_rows(mesh)
        self.recipe, self.mesh, self.total = recipe, mesh, total
        self.program = make_program(self.recipe, mesh, total, warmup)
        self.state: TrainState | None = None
        self.step_number = 0
        self._evaluator: Evaluator | None = None

    def initialize(self, restored: TrainState | None = None) -> None:
        """Sets the state to start from, by the first of these that applies.

        1. `restored`: this run's newest checkpoint, all of the state.
        2. `model.warm_start`: a fine-tuned encoder; the backbone, the pooler and the heads of the
           same name and shape.
        3. `model.pretrained`: a pretrained Gemma; the backbone.
        4. Random values from the seed, which also fill what 2 and 3 leave open.
        """
        if restored is not None:
            self.state, self.step_number = restored, int(restored.step)
            return
        self.state = initial_state(
            self.recipe.encoder,
            self.program.optimizer,
            self.mesh,
            self.recipe.config.seed,
            self._weights(),
            self.program.is_trainable,
        )
        self.step_number = 0

    def _weights(self) -> dict | None:
        """The part of the parameters that comes from another checkpoint, on the mesh."""
        recipe, shapes = self.recipe, self.program.abstract.parameters
        if recipe.checkpoint is None:
            return None
        load = load_warm if recipe.config.model.warm_start else load_pretrained
        return load(recipe.checkpoint, recipe.encoder, shapes)

    def stream(self) -> TrainStream:
        """This process's part of the endless training batches; close it when done."""
        return TrainStream(
            self.recipe.sources,
            self.recipe.rates(),
            self.recipe.tokenizer,
            self.recipe.stream,
            process=jax.process_index(),
            processes=jax.process_count(),
        )

    def step(self, batch: Batch) -> StepMetrics:
        """Dispatches one step and returns without waiting for it.

        Args:
            batch: this process's rows of the global batch, as `stream` yields them.

        Returns:
            The step's metrics, on the devices; reading them waits for the step.
        """
        self.state, metrics = self.program.step(self.state, self.program.shard(batch))
        self.step_number += 1
        return metrics

    def evaluate(self) -> Evaluation:
        """Evaluates the present parameters on `evaluate_split`; nothing is written."""
        if self._evaluator is None:
            self._evaluator = self.recipe.evaluator(self.mesh)
        return self._evaluator.run(self.state.parameters, self.step_number)
