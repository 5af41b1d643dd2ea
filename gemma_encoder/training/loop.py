"""The training program, from a config and a workdir to a fine-tuned checkpoint and its metrics.

Where the state comes from, in this order: this workdir's newest checkpoint; a fine-tuned encoder to start warm from; a pretrained
Gemma backbone; random weights.
"""

import dataclasses
import math
import time

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_encoder import runtime
from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.evaluation.evaluator import Predictions
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import skeleton
from gemma_encoder.training.build import Recipe, build
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.config import TrainConfig
from gemma_encoder.training.evaluation import Evaluator, Stopped
from gemma_encoder.training.failure import report_failure
from gemma_encoder.training.metrics_log import MetricsLog, Progress, read_metrics
from gemma_encoder.training.processes import Notice
from gemma_encoder.training.profile import Profile
from gemma_encoder.training.state import TrainState, initial_state
from gemma_encoder.training.step import Program, StepMetrics, make_program
from gemma_encoder.training.window import NotFinite, Window
from gemma_encoder.training.workdir import claim_workdir
from gemma_encoder.weights import native
from gemma_encoder.weights.backbone import load_pretrained, load_warm
from gemma_encoder.weights.native import Bundle


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Attributes:
        step: updates taken in all.
        metrics: by task that has the evaluation split, the main one first; of several splits, each named after its split.
        predictions: of each of these splits, by task.
        checkpoint: the newest checkpoint's folder.
        seconds: spent in training steps by this process, evaluation and checkpoints apart.
        preempted: whether the run was told to stop before its end; started again, it goes on.
        best: the step of the kept checkpoint whose `best_metric` is the best, and that value; None where none was evaluated.
    """

    step: int
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[Predictions]]
    checkpoint: epath.Path
    seconds: float
    preempted: bool = False
    best: tuple[int, float] | None = None


def train(config: ConfigDict | TrainConfig, workdir: epath.PathLike, command: str = "") -> Outcome:
    """Trains as `config` says, or goes on where the run in `workdir` stopped.

    Args:
        config: as `config.default_config` has it, or typed.
        workdir: of the run.
        command: how the run was started; checkpoints keep it for whoever gets one.

    Raises:
        InputError: something in the config, the data or the workdir cannot be used; nothing of an earlier run is lost.
    """
    recipe = build(config)
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    workdir = claim_workdir(workdir, config)
    runtime.enable_compilation_cache(config.compilation_cache)
    recipe = recipe.measured()
    epoch = recipe.epoch()
    total = recipe.steps("train_for", epoch)
    cadence = {
        name: recipe.steps(name, epoch, total)
        for name in ("log_every", "evaluate_every", "checkpoint_every")
    }
    program = make_program(recipe, mesh, total, recipe.steps("warmup", epoch, total))
    stream = TrainStream(
        recipe.sources,
        recipe.rates(),
        recipe.tokenizer,
        recipe.stream,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    best = recipe.best_metric()
    with Notice() as notice:
        checkpoints = Checkpoints(workdir, config.keep_checkpoints, lowest=lowest_is_best(best[1]))
        state = _restore_or_start(recipe, program, mesh, checkpoints, stream)
        start = int(state.step)
        log, progress = MetricsLog(workdir, start), Progress(total, start)
        evaluator, window = (
            Evaluator(recipe, mesh, workdir, notice.reached),
            Window(recipe, program.schedule, mesh),
        )
        profile = Profile(workdir, config.profile)
        _describe(recipe, program.abstract, mesh, total, epoch, progress, workdir)
        seconds, began = 0.0, time.monotonic()
        previous: tuple[int, StepMetrics, Batch] | None = None
        evaluated, step, stopped = None, start, False

        def evaluate_at(step: int) -> dict[str, float]:
            """Evaluates, and gives what a checkpoint is chosen by."""
            nonlocal evaluated
            evaluated = evaluator.run(state.parameters, step, log)
            progress.say(f"step {step}: {evaluator.line(evaluated[0])}")
            return (
                {"best": evaluated[0][best[0]][best[1]]}
                if best[1] in evaluated[0].get(best[0], {})
                else {}
            )

        try:
            was_due = start == total or (
                start and cadence["evaluate_every"] and start % cadence["evaluate_every"] == 0
            )
            if was_due and not _was_evaluated(workdir, start, config.evaluate_split):
                evaluate_at(start)  # a notice to stop had come before it could be done
                window.restart()
            for step in range(start + 1, total + 1):
                profile.before(step)
                batch = window.wait_for(stream)
                state, metrics = program.step(state, program.place(batch))
                # Step n is under way before the numbers of step n − 1 are waited for.
                if previous is not None:
                    progress.advance(window.add(*previous[:2]))
                previous = (step, metrics, batch)
                stopped = notice.reached()
                due = {
                    name
                    for name, every in cadence.items()
                    if step == total or (every and step % every == 0)
                }
                due |= {"log_every", "checkpoint_every"} if stopped else set()
                profile.after(step, metrics)
                if not due:
                    continue
                progress.advance(window.add(*previous[:2]))
                previous = None
                seconds += time.monotonic() - began
                if "log_every" in due:
                    values = window.close(step, stream.counts)
                    log.write(step, "train", values)
                    progress.report(
                        step, f"loss {values['loss']:.4f}  {values['texts_per_second']:.0f} texts/s"
                    )
                chosen_by: dict[str, float] = {}
                if "evaluate_every" in due and not stopped:
                    try:
                        chosen_by = evaluate_at(step)
                    except Stopped:
                        stopped, due = True, due | {"checkpoint_every"}
                if "checkpoint_every" in due:
                    checkpoints.save(
                        state, _bundle(recipe, step, command, log), stream.state(), chosen_by
                    )
                if stopped:
                    break
                window.restart()
                began = time.monotonic()
            if stopped:
                progress.say(
                    f"told to stop: saving step {step}; start the same command again to go on"
                )
            elif evaluated is None:  # the run had ended before: say what it reached
                evaluated = evaluator.run(state.parameters, start, None)
            checkpoints.wait()
        except Stopped:  # before anything had changed
            stopped = True
        except NotFinite as error:
            folder = report_failure(workdir, recipe, previous, str(error))
            raise InputError(
                f"{error}; lower optimizer.learning_rate or lengthen warmup. What led to it is in {folder}; checkpoints before it are kept"
            ) from error
        finally:
            profile.close()
            stream.close()
            progress.close()
            log.close()
            checkpoints.close()
    metrics, predictions = evaluated or ({}, {})
    return Outcome(
        step,
        metrics,
        predictions,
        epath.Path(checkpoints.folder) / str(step),
        seconds,
        stopped,
        checkpoints.best(),
    )


def _was_evaluated(workdir: epath.Path, step: int, split: str) -> bool:
    found = (
        any(line["step"] == step and line["split"] == split for line in read_metrics(workdir))
        if jax.process_index() == 0
        else False
    )
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(found)))


def _restore_or_start(
    recipe: Recipe, program: Program, mesh: Mesh, checkpoints: Checkpoints, stream: TrainStream
) -> TrainState:
    """The state to go on from, by the order at the top of this file; `stream` is set to the same moment."""
    step = checkpoints.latest_step()
    if step is not None:
        if (
            native.load_bundle(epath.Path(checkpoints.folder) / str(step)).tokenizer.model
            != recipe.tokenizer.model
        ):
            raise InputError(
                f"{recipe.tokenizer.name} is not the tokenizer that the run in {checkpoints.folder} began with; restore that file, or choose another --workdir"
            )
        state, readers = checkpoints.restore(step, program.abstract, stream.names)
        stream.restore(readers)
        logging.info("resumed from step %d of %s", step, checkpoints.folder)
        return state
    model, shapes = recipe.config.model, program.abstract.parameters
    pretrained = None
    if model.warm_start:
        pretrained = load_warm(recipe.checkpoint, recipe.encoder, shapes)
    elif model.pretrained:
        pretrained = load_pretrained(recipe.checkpoint, recipe.encoder, shapes)
    return initial_state(
        recipe.encoder, program.optimizer, mesh, recipe.config.seed, pretrained, program.changes
    )


def _bundle(recipe: Recipe, step: int, command: str, log: MetricsLog) -> Bundle:
    """What inference needs, and what a reader of the checkpoint wants to know."""
    stream = recipe.stream
    record = {
        "command": command,
        "config": recipe.config.to_dict(),
        "examples": {
            source.task.name: source.num_records("train")
            for source in recipe.sources
            if "train" in source.splits
        },
        "metrics": list(log.latest.values()),
    }
    return Bundle(
        recipe.encoder,
        recipe.tasks,
        recipe.tokenizer,
        stream.max_length,
        stream.shape.row_length,
        stream.padding,
        step,
        record,
    )


def _describe(
    recipe: Recipe,
    abstract: TrainState,
    mesh: Mesh,
    total: int,
    epoch: int,
    progress: Progress,
    workdir: epath.Path,
) -> None:
    """Says what is about to happen, and writes the table of parameters."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(abstract.parameters, include_stats="sharding")
    logging.info("%s", table)
    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(table + "\n")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.parameters))
    shape, encoder = recipe.stream.shape, recipe.encoder
    progress.say(
        f"{recipe.config.model.size}, {count / 1e6:.1f} M parameters, {encoder.attention}, {encoder.pooling.name} pooling, {encoder.compute_dtype}; "
        f"{', '.join(task.name for task in recipe.tasks)}: {epoch} examples an epoch; {total} steps of {shape.rows} x {shape.row_length} tokens, "
        f"about {recipe.losses.examples_per_step} examples, on {mesh.size} {mesh.devices.flat[0].platform} device(s) {dict(mesh.shape)}"
    )


def evaluate(config: ConfigDict | TrainConfig, workdir: epath.PathLike) -> Outcome:
    """Evaluates the newest checkpoint of a workdir on `config.evaluate_split`; the log gets the lines, the predictions their files."""
    workdir = native.absolute(workdir)
    if not native.checkpoint_steps(workdir):
        raise InputError(
            f"{workdir} holds no checkpoint to evaluate; train first: gemma-encoder train with the same arguments"
        )
    recipe = build(config)
    config = recipe.config
    mesh = sharding.make_mesh(config.mesh)
    recipe.check_rows(mesh)
    checkpoint = native.find(workdir)
    bundle = native.load_bundle(checkpoint)
    trained = {task.name for task in bundle.tasks}
    for task in recipe.tasks:
        if task.head not in bundle.encoder.heads:
            raise InputError(
                f"the checkpoint was not trained on {task.name!r}; it knows {', '.join(sorted(trained))}"
            )
    runtime.enable_compilation_cache(config.compilation_cache)
    recipe = dataclasses.replace(recipe, encoder=bundle.encoder, tokenizer=bundle.tokenizer)
    parameters = native.load_parameters(
        checkpoint,
        bundle.encoder,
        sharding.parameter_shardings(skeleton(bundle.encoder).shapes, mesh),
    )
    log = MetricsLog(workdir, bundle.step)
    try:
        result = Evaluator(recipe, mesh, workdir).run(parameters, bundle.step, log)
    finally:
        log.close()
    return Outcome(bundle.step, *result, checkpoint, 0.0)
