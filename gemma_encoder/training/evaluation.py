"""Evaluating a model during and after training: every split of every task, over the mesh, predictions and metrics out."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.evaluation.evaluator import Predictions, predict
from gemma_encoder.evaluation.forward import compile_forward, place_batch
from gemma_encoder.inputs.batch import Batch, empty_batch
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.training.build import Recipe
from gemma_encoder.training.metrics_log import MetricsLog


class Stopped(Exception):
    """The run was told to stop while it was evaluating."""


class Evaluator:
    """Evaluates all tasks of a recipe on its evaluation split and writes predictions.

    Args:
        recipe: what to evaluate.
        mesh: where.
        workdir: predictions go under it.
        stop: asked before every batch, on all processes alike; evaluation is given up with Stopped once it says so.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        workdir: epath.Path,
        stop: Callable[[], bool] = lambda: False,
    ):
        self._recipe, self._mesh, self._workdir, self._stop = recipe, mesh, workdir, stop
        self._forward = compile_forward(recipe.encoder, mesh)
        shape = recipe.stream.shape
        # Candidates are scored one by one, so no list has to fit in a batch.
        self._stream = dataclasses.replace(
            recipe.stream,
            shape=dataclasses.replace(shape, groups=recipe.stream.readers, list_size=1),
            micro_batches=1,
        )

    def run(
        self, parameters: Any, step: int, log: MetricsLog | None
    ) -> tuple[dict[str, dict[str, float]], dict[str, list[Predictions]]]:
        """Metrics and predictions by task; metrics go to the log, predictions to files."""
        metrics, predictions, lines = {}, {}, []
        for number, source in enumerate(self._recipe.sources):
            task, values, counts = source.task, {}, collections.Counter()
            for part, split in source.evaluation_splits(self._recipe.config.evaluate_split).items():
                found = self._predict(parameters, number, split)
                if jax.process_index() == 0:
                    found.write(self._workdir / "predictions")
                values |= {
                    f"{name}_{part}" if part else name: value
                    for name, value in found.metrics().items()
                }
                counts.update(found.table.counts[task.name], examples=len(found.table.labels))
                predictions.setdefault(task.name, []).append(found)
            if not counts:
                continue
            metrics[task.name] = values
            figures = {
                "examples": counts["examples"],
                "cut_share": counts["cut_texts"] / max(counts["texts"], 1),
            }
            lines.append((step, self._recipe.config.evaluate_split, values | figures, task.name))
        if log is not None:  # once all are known: an evaluation that was given up has no line
            for line in lines:
                log.write(*line)
        return metrics, predictions

    def _predict(self, parameters: Any, number: int, split: str) -> Predictions:
        """What the model says of every example of a split of the recipe's task `number`."""
        source, table = self._recipe.sources[number], ExampleTable()
        stream = evaluation_stream(
            source,
            number,
            split,
            self._recipe.tokenizer,
            self._stream,
            table,
            process=jax.process_index(),
            processes=jax.process_count(),
        )

        def forward(batch: Batch) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
            said = self._forward(parameters, place_batch(batch, self._mesh))
            return jax.device_get((said.scores, said.example_id, said.weight))

        outputs = predict(source.task, self._everywhere(stream), forward)
        return Predictions(
            source.task, split, outputs, table, source.qrels(split), source.first_stage
        )

    def _everywhere(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same number of batches on every process: those that end early go on with empty ones."""
        share = self._stream.shape.rows // jax.process_count()
        empty = empty_batch(dataclasses.replace(self._stream.shape, rows=share))
        while True:
            batch = next(stream, None)
            if not _any_process(batch is not None):
                return
            if self._stop():
                raise Stopped
            yield empty if batch is None else batch

    @staticmethod
    def line(metrics: dict[str, dict[str, float]]) -> str:
        """All metrics on one line."""
        return "  ".join(
            f"{task} {' '.join(f'{name} {value:.3f}' for name, value in values.items()) or '(no labels)'}"
            for task, values in metrics.items()
        )


def _any_process(value: bool) -> bool:
    """Whether it is so on any process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(value))))
