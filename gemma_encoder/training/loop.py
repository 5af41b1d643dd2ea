"""The training loop: from a config and a workdir to a fine-tuned checkpoint and its metrics."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from gemma_encoder import distributed, runtime
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.evaluation.evaluator import Evaluation
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.training.accumulator import MetricsAccumulator
from gemma_encoder.training.build import Recipe, build
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.hooks import Hook, Hooks, checked_hooks
from gemma_encoder.training.metrics_log import MetricsLog, Progress
from gemma_encoder.training.run import Cadence, Run
from gemma_encoder.training.standard_hooks import standard_hooks
from gemma_encoder.training.state import TrainState
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.training.workdir import claim_workdir
from gemma_encoder.weights import native


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        step: updates taken in all.
        metrics: by task that has the evaluation split, the main one first; of several splits, each
            named after its split.
        predictions: of each of these splits, by task.
        checkpoint: the newest checkpoint's folder.
        seconds: spent in training steps by this process, evaluation and checkpoints apart.
        preempted: whether the run was told to stop before its end; rerun to resume.
        best: the step of the checkpoint on disk whose `best_metric` is the best, and that value;
            None where none was evaluated.
        stop_reason: why the run ended before its last step; "" where it did not.
    """

    step: int
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[Predictions]]
    checkpoint: epath.Path
    seconds: float
    preempted: bool = False
    best: tuple[int, float] | None = None
    stop_reason: str = ""


def train(
    config: ConfigDict | TrainConfig,
    workdir: epath.PathLike,
    command: str = "",
    hooks: Sequence[Hook] = (),
) -> TrainingResult:
    """Trains as `config` says, or resumes the run in `workdir`.

    Args:
        config: as `config.default_config` has it, or typed.
        workdir: of the run.
        command: how the run was started; checkpoints hold it for whoever gets one.
        hooks: the user's, called after those of the program at each step.

    Raises:
        InputError: something in the config, the data or the workdir cannot be used, or a hook
            failed; nothing of an earlier run is lost.
    """
    recipe = build(config, for_training=True)
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    cadence = Cadence.of(recipe)
    _ = recipe.fingerprints  # of the data as they are now, before the first step
    every_hook = Hooks(standard_hooks(recipe, cadence), (*checked_hooks(hooks), *recipe.hooks))
    trainer = Trainer(recipe, mesh, cadence.total, cadence.warmup)
    workdir = claim_workdir(workdir, config)
    runtime.enable_compilation_cache(config.compilation_cache)
    with contextlib.ExitStack() as resources:
        run = _open(trainer, cadence, workdir, command, resources)
        every_hook.start(run)
        while not run.is_over:
            every_hook.before_step(run)
            batch = run.accumulator.wait_for(run.stream)
            run.advance(batch)  # under way before the numbers of the step before it are read
            every_hook.after_step(run)
        every_hook.end(run)
    return _outcome(run)


def _open(
    trainer: Trainer,
    cadence: Cadence,
    workdir: epath.Path,
    command: str,
    resources: contextlib.ExitStack,
) -> Run:
    """Restores or initializes the state, and opens the files of the workdir."""
    recipe, best_metric = trainer.recipe, trainer.recipe.best_metric
    preemption = resources.enter_context(distributed.PreemptionSignal())
    checkpoints = Checkpoints(
        workdir, recipe.config.keep_checkpoints, lowest=lowest_is_best(best_metric[1])
    )
    resources.callback(checkpoints.close)
    stream = resources.enter_context(contextlib.closing(trainer.stream()))
    trainer.initialize(_restored(trainer, checkpoints, stream))
    start = trainer.step_number
    log = resources.enter_context(contextlib.closing(MetricsLog(workdir, start)))
    progress = resources.enter_context(contextlib.closing(Progress(cadence.total, start)))
    _describe(trainer, cadence, workdir, progress)
    return Run(
        trainer=trainer,
        cadence=cadence,
        workdir=workdir,
        command=command,
        best_metric=best_metric,
        stream=stream,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
        accumulator=MetricsAccumulator(recipe, trainer.program.schedule, trainer.mesh),
        preemption=preemption,
        resources=resources,
        saved_step=start,
    )


def _restored(trainer: Trainer, checkpoints: Checkpoints, stream: TrainStream) -> TrainState | None:
    """The newest checkpoint's state, with `stream` set to the same step; None where none exists."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    tokenizer = trainer.recipe.tokenizer
    spec = native.load_inference_spec(epath.Path(checkpoints.folder) / str(step))
    if spec.tokenizer.model != tokenizer.model:
        raise InputError(
            f"{tokenizer.name} is not the tokenizer that the run in {checkpoints.folder} began "
            "with; restore that file, or choose another workdir"
        )
    _check_data(trainer.recipe, spec, checkpoints.folder)
    state, readers = checkpoints.restore(step, trainer.program.abstract, stream.names)
    stream.restore(readers)
    logging.info("resumed from step %d of %s", step, checkpoints.folder)
    return state


def _check_data(recipe: Recipe, spec: native.InferenceSpec, folder: epath.Path) -> None:
    """Refuses to resume on other data than the run began with, or a run of an earlier format."""
    stored = spec.record.get("data")
    if stored is None:
        raise InputError(
            f"the run in {folder.parent} was begun by an earlier version of gemma_encoder, which "
            "read its data in another order: finish it with that version, or begin a new run from "
            f"its weights with --config.model.warm_start={folder.parent} and another --workdir"
        )
    for task, splits in recipe.fingerprints.items():
        for split, now in splits.items():
            before = stored.get(task, {}).get(split, [])
            if before == now:
                continue
            name = _first_difference(before, now)
            raise InputError(
                f"task {task!r}: {name} of its {split} split changed since the run in "
                f"{folder.parent} began; restore the data, or choose another workdir"
            )


def _first_difference(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    """Names the first of two lists of files at which they differ."""
    for old, new in itertools.zip_longest(before, now, fillvalue=("", "")):
        if old[0] != new[0]:
            return f"the list of files ({old[0] or 'none'} -> {new[0] or 'none'})"
        if old != new:
            return new[0]
    raise AssertionError("the lists are equal")


def _describe(trainer: Trainer, cadence: Cadence, workdir: epath.Path, progress: Progress) -> None:
    """Says what is about to happen, and writes the table of parameters."""
    from clu import parameter_overview

    recipe, mesh, parameters = trainer.recipe, trainer.mesh, trainer.program.abstract.parameters
    table = parameter_overview.get_parameter_overview(parameters, include_stats="sharding")
    logging.info("%s", table)
    if distributed.is_main_process():
        runtime.write_whole(workdir / "parameters.txt", table + "\n")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    shape, encoder = recipe.stream.shape, recipe.encoder
    progress.say(
        f"{recipe.config.model.size}, {count / 1e6:.1f} M parameters, {encoder.attention}, "
        f"{encoder.pooling.name} pooling, {encoder.compute_dtype}; "
        f"{', '.join(task.name for task in recipe.tasks)}: {cadence.epoch} examples an epoch; "
        f"{cadence.total} steps of {shape.rows} x {shape.row_length} tokens, "
        f"about {recipe.losses.examples_per_step} examples, "
        f"on {mesh.size} {mesh.devices.flat[0].platform} device(s) {dict(mesh.shape)}"
    )


def _outcome(run: Run) -> TrainingResult:
    evaluation = run.evaluation or Evaluation(run.step, {}, {})
    return TrainingResult(
        run.step,
        evaluation.metrics,
        evaluation.predictions,
        epath.Path(run.checkpoints.folder) / str(run.step),
        run.accumulator.seconds,
        run.preempted,
        run.checkpoints.best(),
        run.stop_reason,
    )


def evaluate(config: ConfigDict | TrainConfig, workdir: epath.PathLike) -> TrainingResult:
    """Evaluates the newest checkpoint of a workdir on `config.evaluate_split`.

    Metrics are added to the log, predictions are written to their files.

    Raises:
        InputError: there is no checkpoint, or it was not trained on a task of the config.
    """
    workdir = native.absolute(workdir)
    if not native.checkpoint_steps(workdir):
        raise InputError(
            f"{workdir} holds no checkpoint to evaluate; "
            "train first: gemma-encoder train with the same arguments"
        )
    recipe = build(config)
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    checkpoint = native.find(workdir)
    spec = native.load_inference_spec(checkpoint)
    trained = {task.name for task in spec.tasks}
    for task in recipe.tasks:
        if task.head not in spec.encoder.heads:
            raise InputError(
                f"the checkpoint was not trained on {task.name!r}; "
                f"it knows {', '.join(sorted(trained))}"
            )
    runtime.enable_compilation_cache(config.compilation_cache)
    recipe = dataclasses.replace(recipe, encoder=spec.encoder, tokenizer=spec.tokenizer)
    parameters = native.load_parameters(
        checkpoint,
        spec.encoder,
        sharding.parameter_shardings(abstract_encoder(spec.encoder).shapes, mesh),
    )
    with contextlib.closing(MetricsLog(workdir, spec.step)) as log:
        evaluation = recipe.evaluator(mesh, workdir).run(parameters, spec.step, log.write)
    return TrainingResult(spec.step, evaluation.metrics, evaluation.predictions, checkpoint, 0.0)
