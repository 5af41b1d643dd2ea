"""The training program, from a config and a workdir to a fine-tuned checkpoint and its metrics.

Where the state comes from, in this order: this workdir's newest checkpoint; a pretrained Gemma backbone; random weights.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from gemma_encoder.data.pipeline import TrainStream, evaluation_stream
from gemma_encoder.evaluation.evaluator import Predictions, predict
from gemma_encoder.inputs.batch import Batch, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import skeleton
from gemma_encoder.training import recipe as recipes
from gemma_encoder.training.checkpoint import Checkpoints
from gemma_encoder.training.metrics_log import MetricsLog, Progress
from gemma_encoder.training.recipe import Recipe
from gemma_encoder.training.state import TrainState, initial_state
from gemma_encoder.training.step import Program, StepMetrics, compile_forward, make_program, place_batch
from gemma_encoder.weights import native
from gemma_encoder.weights.backbone import load_pretrained
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
    """

    step: int
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[Predictions]]
    checkpoint: epath.Path
    seconds: float


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Outcome:
    """Trains as `config` says, or goes on where the run in `workdir` stopped.

    Raises:
        InputError: something in the config, the data or the workdir cannot be used; nothing of an earlier run is lost.
    """
    recipe = recipes.build(config)
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(recipe, mesh)
    workdir = claim_workdir(workdir, config)
    recipe = recipe.measured()
    epoch = recipe.epoch()
    total = recipe.steps("train_for", epoch)
    cadence = {name: recipe.steps(name, epoch, total) for name in ("log_every", "evaluate_every", "checkpoint_every")}
    program = make_program(recipe, mesh, total, recipe.steps("warmup", epoch, total))
    stream = TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream, process=jax.process_index(), processes=jax.process_count())
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    state = _restore_or_start(recipe, program, mesh, checkpoints, stream)
    start = int(state.step)
    log, progress = MetricsLog(workdir, start), Progress(total, start)
    evaluator = Evaluator(recipe, mesh, workdir)
    window = Window(recipe, program.schedule)
    _describe(recipe, program.abstract, mesh, total, epoch, progress)
    seconds, began = 0.0, time.monotonic()
    previous: tuple[int, StepMetrics] | None = None
    evaluated = None
    try:
        for step in range(start + 1, total + 1):
            batch = program.place(window.wait_for(stream))
            state, metrics = program.step(state, batch)
            # Step n is under way before the numbers of step n − 1 are waited for.
            if previous is not None:
                progress.advance(window.add(*previous))
            previous = (step, metrics)
            due = {name for name, every in cadence.items() if step == total or (every and step % every == 0)}
            if not due:
                continue
            progress.advance(window.add(*previous))
            previous = None
            seconds += time.monotonic() - began
            if "log_every" in due:
                values = window.close(step, stream.counts)
                log.write(step, "train", values)
                progress.report(step, f"loss {values['loss']:.4f}  {values['texts_per_second']:.0f} texts/s")
            if "evaluate_every" in due:
                evaluated = evaluator.run(state.parameters, step, log)
                progress.say(f"step {step}: {evaluator.line(evaluated[0])}")
            if "checkpoint_every" in due:
                checkpoints.save(state, _bundle(recipe, step), stream.state())
            window.restart()
            began = time.monotonic()
        if evaluated is None:  # the run had ended before: say what it reached
            evaluated = evaluator.run(state.parameters, start, None)
    finally:
        stream.close()
        progress.close()
        log.close()
        checkpoints.close()
    return Outcome(total, *evaluated, epath.Path(checkpoints.folder) / str(total), seconds)


def claim_workdir(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> epath.Path:
    """Makes the workdir this config's own; raises InputError when it holds another config's run, or cannot be written."""
    workdir = native.absolute(workdir)
    stored = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    try:
        if stored.exists():
            changed = recipes.differences(json.loads(stored.read_text()), now)
            if changed:
                raise InputError(f"{workdir} holds a run of another config; choose another --workdir, or undo: {'; '.join(changed)}")
        elif jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            stored.write_text(json.dumps(now, indent=1))
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from error
    return workdir


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, parts = recipe.stream.shape.rows, recipe.stream.micro_batches
    if rows // parts % shards:
        cut = f" / micro_batches={parts}" if parts > 1 else ""
        raise InputError(f"batch.rows={rows}{cut} must be a multiple of data x fsdp = {shards} of the mesh {dict(mesh.shape)}")


def _restore_or_start(recipe: Recipe, program: Program, mesh: Mesh, checkpoints: Checkpoints, stream: TrainStream) -> TrainState:
    """The state to go on from, by the order at the top of this file; `stream` is set to the same moment."""
    step = checkpoints.latest_step()
    if step is not None:
        if native.load_bundle(epath.Path(checkpoints.folder) / str(step)).tokenizer.model != recipe.tokenizer.model:
            raise InputError(
                f"{recipe.tokenizer.name} is not the tokenizer that the run in {checkpoints.folder} began with; restore that file, or choose another --workdir"
            )
        state, readers = checkpoints.restore(step, program.abstract, stream.names)
        stream.restore(readers)
        logging.info("resumed from step %d of %s", step, checkpoints.folder)
        return state
    path = recipe.config.model.pretrained
    pretrained = load_pretrained(path, recipe.encoder, program.abstract.parameters) if path else None
    return initial_state(recipe.encoder, program.optimizer, mesh, recipe.config.seed, pretrained)


def _bundle(recipe: Recipe, step: int) -> Bundle:
    shape = recipe.stream.shape
    return Bundle(recipe.encoder, recipe.tasks, recipe.tokenizer, recipe.stream.max_length, shape.row_length, recipe.stream.padding, step)


def _describe(recipe: Recipe, abstract: TrainState, mesh: Mesh, total: int, epoch: int, progress: Progress) -> None:
    """Says what is about to happen, and logs the table of parameters."""
    from clu import parameter_overview

    logging.info("%s", parameter_overview.get_parameter_overview(abstract.parameters, include_stats=False))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.parameters))
    shape, encoder = recipe.stream.shape, recipe.encoder
    progress.say(
        f"{recipe.config.model.size}, {count / 1e6:.1f} M parameters, {encoder.attention}, {encoder.pooling.name} pooling, {encoder.compute_dtype}; "
        f"{', '.join(task.name for task in recipe.tasks)}: {epoch} examples an epoch; {total} steps of {shape.rows} x {shape.row_length} tokens, "
        f"about {recipe.losses.examples_per_step} examples, on {mesh.size} {mesh.devices.flat[0].platform} device(s) {dict(mesh.shape)}"
    )


class Window:
    """Training numbers since the last line of the log: means, not the last step's."""

    def __init__(self, recipe: Recipe, schedule):
        self._recipe, self._schedule = recipe, schedule
        self._warned = False
        self.restart()

    def restart(self) -> None:
        """Starts counting anew."""
        self._steps, self._sums, self._began, self._waited = 0, collections.Counter(), time.monotonic(), 0.0

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch; the time until it is there counts as waiting."""
        began = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - began
        return batch

    def add(self, step: int, metrics: StepMetrics) -> float:
        """Counts a step and returns its loss; raises InputError when it is not finite."""
        metrics = jax.device_get(metrics)
        loss = float(metrics.loss)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {step} is {loss} (gradient norm {float(metrics.gradient_norm)}); lower optimizer.learning_rate or lengthen warmup. "
                "Checkpoints before it are kept"
            )
        self._steps += 1
        self._sums.update(loss=loss, gradient_norm=float(metrics.gradient_norm), texts=float(metrics.texts), real_tokens=float(metrics.real_tokens))
        for task, part in metrics.tasks.items():
            self._sums.update({f"{task}/total": float(part.total), f"{task}/count": float(part.count)})
        return loss

    def close(self, step: int, counts: dict[str, dict[str, int]]) -> dict[str, float]:
        """The means, rates per second, each task's loss, and what was cut so far."""
        seconds, sums, shape = time.monotonic() - self._began, self._sums, self._recipe.stream.shape
        examples = sum(sums[f"{task.name}/count"] for task in self._recipe.tasks) / self._steps
        values = {
            "loss": sums["loss"] / self._steps,
            "learning_rate": float(self._schedule(step - 1)),
            "gradient_norm": sums["gradient_norm"] / self._steps,
            "examples_per_step": examples,
            "texts_per_second": sums["texts"] / seconds,
            "real_tokens_per_second": sums["real_tokens"] / seconds,
            "waiting_for_data_share": self._waited / seconds,
            "real_token_share": sums["real_tokens"] / (self._steps * shape.rows * shape.row_length),
        }
        for task in self._recipe.tasks:
            count = sums[f"{task.name}/count"]
            if count:
                values[f"{task.name}/loss"] = sums[f"{task.name}/total"] / count
            if counts[task.name]["texts"]:
                values[f"{task.name}/cut_share"] = counts[task.name]["cut_texts"] / counts[task.name]["texts"]
        wanted = self._recipe.losses.examples_per_step
        if not self._warned and not 0.75 < examples / wanted < 1.33:
            logging.warning(
                "a batch holds %.0f examples on average, batch.examples_per_step is %d: the loss and the length of an epoch are off by that ratio",
                examples,
                wanted,
            )
            self._warned = True
        return values


class Evaluator:
    """Evaluates all tasks of a recipe on its evaluation split and writes predictions.

    Args:
        recipe: what to evaluate.
        mesh: where.
        workdir: predictions go under it.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, workdir: epath.Path):
        self._recipe, self._mesh, self._workdir = recipe, mesh, workdir
        self._forward = compile_forward(recipe.encoder, mesh)
        shape = recipe.stream.shape
        # Candidates are scored one by one, so no list has to fit in a batch.
        self._stream = dataclasses.replace(recipe.stream, shape=dataclasses.replace(shape, groups=recipe.stream.readers, list_size=1), micro_batches=1)

    def run(self, parameters: Any, step: int, log: MetricsLog | None) -> tuple[dict[str, dict[str, float]], dict[str, list[Predictions]]]:
        """Metrics and predictions by task; metrics go to the log, predictions to files."""
        metrics, predictions = {}, {}
        for number, source in enumerate(self._recipe.sources):
            task, values, counts = source.task, {}, collections.Counter()
            for part, split in source.evaluation_splits(self._recipe.config.evaluate_split).items():
                found = self._predict(parameters, number, split)
                if jax.process_index() == 0:
                    found.write(self._workdir / "predictions")
                values |= {f"{name}_{part}" if part else name: value for name, value in found.metrics().items()}
                counts.update(found.table.counts[task.name], examples=len(found.table.labels))
                predictions.setdefault(task.name, []).append(found)
            if not counts:
                continue
            metrics[task.name] = values
            if log is not None:
                figures = {"examples": counts["examples"], "cut_share": counts["cut_texts"] / max(counts["texts"], 1)}
                log.write(step, self._recipe.config.evaluate_split, values | figures, task.name)
        return metrics, predictions

    def _predict(self, parameters: Any, number: int, split: str) -> Predictions:
        """What the model says of every example of a split of the recipe's task `number`."""
        source, table = self._recipe.sources[number], ExampleTable()
        stream = evaluation_stream(
            source, number, split, self._recipe.tokenizer, self._stream, table, process=jax.process_index(), processes=jax.process_count()
        )
        outputs = predict(source.task, self._everywhere(stream), lambda batch: self._forward(parameters, place_batch(batch, self._mesh)))
        return Predictions(source.task, split, outputs, table, source.qrels(split))

    def _everywhere(self, stream):
        """The same number of batches on every process: those that end early go on with empty ones."""
        if jax.process_count() == 1:
            yield from stream
            return
        from jax.experimental import multihost_utils

        share = self._stream.shape.rows // jax.process_count()
        empty = empty_batch(dataclasses.replace(self._stream.shape, rows=share))
        while True:
            batch: Batch | None = next(stream, None)
            if not np.any(multihost_utils.process_allgather(np.array(batch is not None))):
                return
            yield empty if batch is None else batch

    @staticmethod
    def line(metrics: dict[str, dict[str, float]]) -> str:
        """All metrics on one line."""
        return "  ".join(f"{task} {' '.join(f'{name} {value:.3f}' for name, value in values.items()) or '(no labels)'}" for task, values in metrics.items())


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Outcome:
    """Evaluates the newest checkpoint of a workdir on `config.evaluate_split`; the log gets the lines, the predictions their files."""
    workdir = native.absolute(workdir)
    if not native.checkpoint_steps(workdir):
        raise InputError(f"{workdir} holds no checkpoint to evaluate; train first, with the same command and --mode=train")
    recipe = recipes.build(config)
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(recipe, mesh)
    checkpoint = native.find(workdir)
    bundle = native.load_bundle(checkpoint)
    trained = {task.name for task in bundle.tasks}
    for task in recipe.tasks:
        if task.head not in bundle.encoder.heads:
            raise InputError(f"the checkpoint was not trained on {task.name!r}; it knows {', '.join(sorted(trained))}")
    recipe = dataclasses.replace(recipe, encoder=bundle.encoder, tokenizer=bundle.tokenizer)
    parameters = native.load_parameters(checkpoint, bundle.encoder, sharding.parameter_shardings(skeleton(bundle.encoder).shapes, mesh))
    log = MetricsLog(workdir, bundle.step)
    try:
        result = Evaluator(recipe, mesh, workdir).run(parameters, bundle.step, log)
    finally:
        log.close()
    return Outcome(bundle.step, *result, checkpoint, 0.0)
