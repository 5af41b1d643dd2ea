"""The training loop: trains a config in a workdir, and evaluates its checkpoints."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from gemma_encoder import activity, distributed, runtime
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.evaluation.evaluator import Evaluation
from gemma_encoder.evaluation.forward import report_slow_dtype
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError, described
from gemma_encoder.model import sharding
from gemma_encoder.training.accumulator import MetricsAccumulator
from gemma_encoder.training.baselines import constants_of
from gemma_encoder.training.build import Recipe, build
from gemma_encoder.training.calibrate import SPLIT, Calibrated, calibrate_checkpoint
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.compute_dtype import describe_dtype, report_dtype
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.hooks import Hook, Hooks, checked_hooks
from gemma_encoder.training.metrics_log import MetricsLog, Progress
from gemma_encoder.training.run import Cadence, Run
from gemma_encoder.training.standard_hooks import standard_hooks
from gemma_encoder.training.state import TrainState
from gemma_encoder.training.stored_tasks import StoredTasks
from gemma_encoder.training.trainer import Trainer
from gemma_encoder.training.workdir import check_run, claim_workdir, exclusive_workdir
from gemma_encoder.weights import failed_writes, native, precision
from gemma_encoder.whole_files import write_whole

SELECTION = "the selection of held-out records"


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """Result of a run.

    Attributes:
        step: training steps taken in total.
        metrics: metrics by task, the main one first; tasks without the evaluation split are
            absent. If a task has several evaluation splits, metric names end with the split.
        predictions: predictions for each evaluated split, by task.
        checkpoint: folder of the newest checkpoint.
        seconds: training time of this process, without evaluation and checkpoints.
        preempted: True if the run was preempted before its end; rerun it to resume.
        best: step and value of the checkpoint on disk with the best `best_metric`; None if none
            was evaluated.
        stop_reason: the reason for ending before the last step, or "".
        notes: lines to show above the metrics.
    """

    step: int
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[Predictions]]
    checkpoint: epath.Path
    seconds: float
    preempted: bool = False
    best: tuple[int, float] | None = None
    stop_reason: str = ""
    notes: tuple[str, ...] = ()


def train(
    config: ConfigDict | TrainConfig,
    workdir: epath.PathLike,
    command: str = "",
    hooks: Sequence[Hook] = (),
) -> TrainingResult:
    """Trains a config, or resumes the run in `workdir`.

    Args:
        config: a config with the fields of `config.default_config`, or a typed config.
        workdir: folder of the run.
        command: the command that started the run; it is stored in checkpoints.
        hooks: the user's hooks, called after the program's own at each step.

    Raises:
        InputError: the config, the data or the workdir cannot be used, or a hook failed; nothing
            of an earlier run is lost.
    """
    with activity.reporting() as reporter:
        with activity.during("reading the data"):
            config = TrainConfig.from_config_dict(config)
            check_run(workdir, config)
            recipe = build(config, for_training=True, stored=StoredTasks.of_newest(workdir))
            _ = recipe.fingerprints  # a file that changes during training cannot alter them
        reporter.is_quiet = not distributed.is_main_process()
        return _train(recipe, workdir, command, hooks)


def _train(
    recipe: Recipe, workdir: epath.PathLike, command: str, hooks: Sequence[Hook]
) -> TrainingResult:
    """Trains a recipe; arguments as for `train`."""
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    cadence = Cadence.of(recipe)
    user_hooks = (*checked_hooks(hooks), *recipe.hooks)
    all_hooks = Hooks(standard_hooks(recipe, cadence), user_hooks)
    with activity.during("setting up the training step"):
        trainer = Trainer(recipe, mesh, cadence.total, cadence.warmup)
        trainer.trace()
    runtime.enable_compilation_cache(config.compilation_cache)

    with contextlib.ExitStack() as resources:
        resources.enter_context(failed_writes.reported_once())
        advice = "wait for it, or choose another workdir"
        workdir = resources.enter_context(exclusive_workdir(workdir, advice))
        claim_workdir(workdir, config)
        with activity.during("opening the workdir"):
            run = _open_run(trainer, cadence, workdir, command, resources)
        resources.enter_context(activity.during(run.progress.__str__))
        all_hooks.start(run)
        run.progress.start_training()
        while not run.is_over:
            all_hooks.before_step(run)
            batch = _next_batch(run)
            run.advance(batch)  # dispatches this step, then reads the previous step's metrics
            all_hooks.after_step(run)
        all_hooks.end(run)
    return _result(run)


def _next_batch(run: Run) -> Batch:
    """Returns the next batch; saves the steps taken if the data cannot be read."""
    try:
        return run.accumulator.wait_for(run.stream)
    except Exception:
        run.rescue()
        raise


def _open_run(
    trainer: Trainer,
    cadence: Cadence,
    workdir: epath.Path,
    command: str,
    resources: contextlib.ExitStack,
) -> Run:
    """Restores or initializes the state, and opens the files of the workdir."""
    recipe = trainer.recipe
    preemption = resources.enter_context(distributed.PreemptionSignal())
    lowest = lowest_is_best(recipe.best_metric[1])
    checkpoints = Checkpoints(workdir, recipe.config.keep_checkpoints, lowest=lowest)
    resources.callback(checkpoints.close)
    stream = resources.enter_context(contextlib.closing(trainer.stream()))
    with activity.during("initializing the model"):
        trainer.initialize(_restore_latest(trainer, checkpoints, stream))
    start = trainer.step_number
    log = resources.enter_context(contextlib.closing(MetricsLog(workdir, start)))
    progress = resources.enter_context(contextlib.closing(Progress(cadence.total, start)))
    _log_parameters(trainer, workdir)
    progress.say(_summary(trainer, cadence))
    report_dtype(recipe, start > 0, progress.say)
    return Run(
        trainer=trainer,
        cadence=cadence,
        workdir=workdir,
        command=command,
        best_metric=recipe.best_metric,
        stream=stream,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
        accumulator=MetricsAccumulator(recipe, trainer.mesh),
        preemption=preemption,
        resources=resources,
        saved_step=start,
    )


def _restore_latest(
    trainer: Trainer, checkpoints: Checkpoints, stream: TrainStream
) -> TrainState | None:
    """Restores the newest checkpoint, `stream` included; returns None if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    tokenizer = trainer.recipe.tokenizer
    spec = native.load_inference_spec(checkpoints.folder / str(step))
    if spec.tokenizer.model != tokenizer.model:
        raise InputError(
            f"{tokenizer.name} is not the tokenizer that the run in {checkpoints.folder} was "
            "started with; restore that tokenizer, or choose another workdir"
        )
    _check_data(trainer.recipe, spec, checkpoints.folder)
    calibrated = [task.name for task in spec.tasks if task.calibration.is_fitted]
    if calibrated:
        logging.warning(
            "the calibration of %s belongs to step %d: later checkpoints have none; run "
            "gemma-encoder evaluate --calibrate again after training",
            ", ".join(calibrated),
            step,
        )
    state, readers = checkpoints.restore(step, trainer.program.abstract, stream.names)
    try:
        stream.restore(readers)
    except InputError as error:
        raise InputError(f"{checkpoints.folder / str(step)}: {error}") from error
    logging.info("resumed from step %d of %s", step, checkpoints.folder)
    return state


def _check_data(recipe: Recipe, spec: native.InferenceSpec, folder: epath.Path) -> None:
    """Raises InputError if the data changed since the run started, or it has no fingerprints."""
    stored = spec.record.get("data")
    if stored is None:
        raise InputError(
            f"the run in {folder.parent} was started by an earlier version of gemma_encoder, which "
            "read its data in another order: finish it with that version, or start a new run from "
            f"its weights with --config.model.warm_start={folder.parent} and another --workdir"
        )
    for task, splits in recipe.fingerprints.items():
        for split, current in splits.items():
            before = stored.get(task, {}).get(split, [])
            if before == current:
                continue
            name = _first_difference(before, current)
            remedy = "restore the data"
            if name.startswith(SELECTION):
                remedy = "set own.held_out as it was, finish it with the version that started it"
            raise InputError(
                f"task {task!r}: {name} of its {split} split changed since the run in "
                f"{folder.parent} was started; {remedy}, or choose another workdir"
            )


def _first_difference(before: Sequence[Sequence[str]], current: Sequence[Sequence[str]]) -> str:
    """Describes the first difference between two lists of [file, fingerprint] pairs."""
    for old, new in itertools.zip_longest(before, current, fillvalue=("", "")):
        if old[0] != new[0]:
            return f"the list of files ({old[0] or 'none'} -> {new[0] or 'none'})"
        if old != new and old[1].split(", ")[0] == new[1].split(", ")[0]:
            return f"{SELECTION} of {new[0]}"
        if old != new:
            return new[0]
    raise AssertionError("the lists are equal")


def _log_parameters(trainer: Trainer, workdir: epath.Path) -> None:
    """Logs the table of parameters with their shardings, and writes it to `parameters.txt`."""
    from clu import parameter_overview

    parameters = trainer.program.abstract.parameters
    table = parameter_overview.get_parameter_overview(parameters, include_stats="sharding")
    logging.info("%s", table)
    if distributed.is_main_process():
        write_whole(workdir / "parameters.txt", table + "\n")


def _summary(trainer: Trainer, cadence: Cadence) -> str:
    """Summarizes the run in a line: model, tasks, steps and devices."""
    recipe = trainer.recipe
    mesh = trainer.mesh
    encoder = recipe.encoder
    shape = recipe.stream.shape
    leaves = jax.tree.leaves(trainer.program.abstract.parameters)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    tasks = ", ".join(task.name for task in recipe.tasks)
    platform = mesh.devices.flat[0].platform
    return (
        f"{recipe.config.model.size}, {count / 1e6:.1f} M parameters, {encoder.attention}, "
        f"{encoder.pooling.name} pooling, {describe_dtype(recipe)}; "
        f"{tasks}: {cadence.examples_per_epoch} examples per epoch; "
        f"{cadence.total} steps of {shape.rows} x {shape.row_length} tokens, "
        f"about {recipe.losses.examples_per_step} examples, "
        f"on {mesh.size} {platform} device(s) {dict(mesh.shape)}"
    )


def _result(run: Run) -> TrainingResult:
    evaluation = run.evaluation or Evaluation(run.step, {}, {})
    return TrainingResult(
        step=run.step,
        metrics=evaluation.metrics,
        predictions=evaluation.predictions,
        checkpoint=run.checkpoints.folder / str(run.step),
        seconds=run.accumulator.seconds,
        preempted=run.preempted,
        best=run.checkpoints.best(),
        stop_reason=run.stop_reason,
    )


def evaluate(
    config: ConfigDict | TrainConfig,
    workdir: epath.PathLike,
    *,
    calibrate: bool = False,
    quantization: str | None = None,
    compute_dtype: str | None = None,
) -> TrainingResult:
    """Evaluates the newest checkpoint of a workdir on `config.evaluate_split`.

    Writes the predictions to files, and appends the metrics to the log, from which lines after the
    checkpoint's step are dropped. Model, tokenizer, tasks and calibrations are those of the
    checkpoint.

    Args:
        config: see `train`.
        workdir: folder of a run.
        calibrate: first fit the calibration of each task with classes or of a regression on its
            validation split, and store it in the checkpoint.
        quantization, compute_dtype: see `Predictor.load`; the workdir is then left as it is.

    Raises:
        InputError: there is no checkpoint, it was not trained on a task of the config, a task of
            the config contradicts it, or there is nothing to calibrate.
    """
    given = {"quantization": quantization, "compute_dtype": compute_dtype}
    options = {name: value for name, value in given.items() if value is not None}
    if calibrate and options:
        rest = " and ".join(options)
        raise InputError(
            f"calibrate is for a checkpoint as it was trained; leave out calibrate or {rest}"
        )
    with activity.reporting() as reporter:
        reporter.is_quiet = not distributed.is_main_process()
        with activity.during("setting up the evaluation"):
            return _evaluate(config, native.absolute(workdir), calibrate, options)


def _evaluate(
    config: ConfigDict | TrainConfig, workdir: epath.Path, calibrate: bool, options: dict[str, str]
) -> TrainingResult:
    """Evaluates the newest checkpoint of a workdir, see `evaluate`."""
    stored = StoredTasks.of_newest(workdir)
    if stored is None:
        raise InputError(
            f"{workdir} holds no checkpoint to evaluate; "
            "train first: gemma-encoder train with the same arguments"
        )
    advice = "wait for it, or evaluate a copy of the workdir"
    with exclusive_workdir(workdir, advice):
        try:
            return _evaluate_stored(config, workdir, stored, calibrate, options)
        except OSError as error:
            raise InputError(
                f"the evaluation of {workdir} failed: {described(error)}; free disk space or "
                "restore the file, then rerun the same command"
            ) from error


def _evaluate_stored(
    config: ConfigDict | TrainConfig,
    workdir: epath.Path,
    stored: StoredTasks,
    calibrate: bool,
    options: dict[str, str],
) -> TrainingResult:
    """Evaluates the newest checkpoint of a workdir, whose tasks are `stored`; see `evaluate`."""
    with activity.during("reading the data"):
        recipe = build(config, stored=stored)
        for split in dict.fromkeys((recipe.config.evaluate_split, *([SPLIT] if calibrate else []))):
            stored.report_other_records(recipe.sources, split)
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    spec = stored.spec
    if config.max_length != spec.max_length:
        logging.warning(
            "texts are truncated to max_length=%d tokens; the checkpoint was trained with %d",
            config.max_length,
            spec.max_length,
        )
    runtime.enable_compilation_cache(config.compilation_cache)
    encoder = precision.with_precision(spec.encoder, mesh, **options)
    report_slow_dtype(encoder, mesh)
    recipe = dataclasses.replace(recipe, encoder=encoder, tokenizer=spec.tokenizer)
    with activity.during("loading the weights"):
        parameters = precision.load_in_precision(stored.checkpoint, spec.encoder, encoder, mesh)
    calibrated = Calibrated.stored(spec)
    if calibrate:
        calibrated = calibrate_checkpoint(recipe, mesh, parameters, stored.checkpoint, spec)
    recipe = calibrated.applied(recipe)
    log = None if options else MetricsLog(workdir, spec.step)
    with contextlib.closing(log) if log else contextlib.nullcontext():
        constants = constants_of(recipe.tasks, spec.tasks, spec.record.get("constants", {}))
        evaluator = recipe.evaluator(mesh, log and workdir, constants=constants)
        write = log and log.write
        evaluation = evaluator.run(parameters, spec.step, write, calibrated.predictions)
    return TrainingResult(
        spec.step,
        evaluation.metrics,
        evaluation.predictions,
        stored.checkpoint,
        seconds=0.0,
        notes=calibrated.notes,
    )
