"""The trainer: takes training steps in memory, without a workdir."""

import contextlib

import jax
from jax.sharding import Mesh

from gemma_encoder import activity
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
        >>> mesh = sharding.make_mesh(config.mesh)
        >>> trainer = Trainer(build(config, for_training=True), mesh, total=3)
        >>> trainer.initialize()
        >>> with contextlib.closing(trainer.stream()) as stream:
        ...     losses = [float(trainer.step(batch).loss) for batch in itertools.islice(stream, 3)]
        >>> trainer.step_number, len(losses)
        (3, 3)
        >>> list(trainer.evaluate().metrics["toy_sentiment"])
        ['accuracy']

    Args:
        recipe: a recipe that is built for training.
        mesh: the devices.
        total: steps of the whole training, which the learning-rate schedule spans.
        warmup: steps of the learning-rate warmup.

    Attributes:
        recipe: the recipe.
        mesh: the devices.
        total: steps of the whole training.
        program: the compiled step, and the shapes and shardings of the state.
        state: parameters, optimizer state and step; None before `initialize`. Each step donates
            it: do not read older references.
        step_number: steps taken.
        is_compiled: whether a step was taken here, so that the program is compiled.

    Raises:
        InputError: the batch does not shard over the mesh, or `warmup` exceeds `total`.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, total: int, warmup: int = 0):
        recipe.check_rows(mesh)
        self.recipe = recipe
        self.mesh = mesh
        self.total = total
        self.program = make_program(recipe, mesh, total, warmup)
        self.state: TrainState | None = None
        self.step_number = 0
        self.is_compiled = False
        self._evaluator: Evaluator | None = None

    def trace(self) -> None:
        """Traces the step, before the weights are loaded; the first step uses the same trace.

        Raises:
            InputError: the model cannot run on these devices.
        """
        self.program.step.trace(self.program.abstract, self.program.batch)

    def initialize(self, restored: TrainState | None = None) -> None:
        """Sets the initial state, from the first of these sources that is given.

        1. `restored`: the complete state of this run's newest checkpoint.
        2. `model.warm_start`: the backbone, the pooler, and the heads of the same name and shape of
           a fine-tuned encoder.
        3. `model.pretrained`: the backbone of a pretrained Gemma, and the projection of the pooler
           where a sentence-transformers folder has one that fits.
        4. Random values from the seed, also for the parameters that 2 and 3 lack. A
           regression head starts at the mean training target for every text.
        """
        if restored is not None:
            self.state = restored
            self.step_number = int(restored.step)
            return
        self.state = initial_state(
            self.recipe.encoder,
            self.program.optimizer,
            self.mesh,
            self.recipe.config.seed,
            self._weights(),
            self.program.is_trainable,
            self.recipe.head_constants(),
        )
        self.step_number = 0

    def _weights(self) -> dict | None:
        """Loads the parameters that come from another checkpoint, on the mesh."""
        recipe = self.recipe
        if recipe.checkpoint is None:
            return None
        abstract = self.program.abstract.parameters
        if recipe.config.model.warm_start:
            return load_warm(recipe.checkpoint, recipe.encoder, abstract, recipe.tasks)
        return load_pretrained(recipe.checkpoint, recipe.encoder, abstract)

    def stream(self) -> TrainStream:
        """Returns this process's part of the infinite stream of batches; close it when done."""
        return TrainStream(
            self.recipe.sources,
            self.recipe.rates(),
            self.recipe.tokenizer,
            self.recipe.stream,
            process=jax.process_index(),
            processes=jax.process_count(),
        )

    def step(self, batch: Batch) -> StepMetrics:
        """Dispatches a step and returns without waiting for it.

        Args:
            batch: this process's rows of the global batch, as `stream` yields them.

        Returns:
            The step's metrics, on the devices; reading them blocks until the step is done.
        """
        sharded = self.program.shard(batch)
        with contextlib.ExitStack() as stack:
            if not self.is_compiled:
                stack.enter_context(activity.compiling("the training step"))
            self.state, metrics = self.program.step(self.state, sharded)
        self.is_compiled = True
        self.step_number += 1
        return metrics

    def evaluate(self) -> Evaluation:
        """Evaluates the current parameters on `evaluate_split`, without writing files."""
        if self._evaluator is None:
            self._evaluator = self.recipe.evaluator(self.mesh)
        return self._evaluator.run(self.state.parameters, self.step_number)
