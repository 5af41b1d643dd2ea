"""Evaluation of a model on the mesh: metrics and predictions of every split of every task."""

import collections
import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from gemma_encoder import activity, distributed
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.evaluation import details
from gemma_encoder.evaluation.forward import compile_forward, shard_batch
from gemma_encoder.evaluation.prediction_files import FOLDER
from gemma_encoder.evaluation.predictions import Predictions, score_split
from gemma_encoder.inputs.batch import Batch, empty_batch
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.tokenizer import Tokenizer
from gemma_encoder.model.config import EncoderConfig

WriteMetrics = Callable[[int, str, Mapping[str, Any], str], None]  # step, split, values, task


class EvaluationInterrupted(Exception):
    """Raised if the run is preempted during evaluation."""


class Evaluation(NamedTuple):
    """Results of all tasks that have the split.

    Attributes:
        step: training step of the parameters.
        metrics: values by task and metric name, suffixed with the part if the split has several
            parts. Empty for a task without labels.
        predictions: one `Predictions` per part of the split, by task.
    """

    step: int
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[Predictions]]

    def line(self) -> str:
        """Formats all metrics on one line."""
        tasks = []
        for task, values in self.metrics.items():
            metrics = " ".join(
                f"{name} {details.format_metric(name, value)}" for name, value in values.items()
            )
            tasks.append(f"{task} {metrics or '(no labels)'}")
        return "  ".join(tasks)


class Evaluator:
    """Evaluates tasks on a split.

    Args:
        sources: tasks with their data; a task's index is its `task_id`.
        split: name of the split; a task may have several parts of it, such as
            validation_matched and validation_mismatched.
        encoder: config of the model.
        tokenizer: encodes the texts.
        stream: shapes of the batches.
        mesh: mesh of devices.
        workdir: folder for the predictions; None to write none.
        stop: called before every batch, with the same result on all processes; when it returns
            True, evaluation raises `EvaluationInterrupted`.
        constants: by task, the constant output that fits its training labels best; empty if
            unknown.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        encoder: EncoderConfig,
        tokenizer: Tokenizer,
        stream: StreamOptions,
        mesh: Mesh,
        workdir: epath.Path | None = None,
        stop: Callable[[], bool] = lambda: False,
        constants: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        self._sources = sources
        self._split = split
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._workdir = workdir
        self._stop = stop
        self._constants = constants
        self._forward = compile_forward(encoder, mesh)
        self._is_compiled = False
        self._truncated: set[str] = set()  # tasks whose truncated texts were logged
        # Candidates are scored independently, so lists need not fit in a batch.
        self._stream = dataclasses.replace(
            stream,
            shape=dataclasses.replace(stream.shape, groups=stream.readers, list_size=1),
            micro_batches=1,
        )

    def run(
        self,
        parameters: Any,
        step: int,
        write: WriteMetrics | None = None,
        scored_before: Mapping[str, Sequence[Predictions]] = types.MappingProxyType({}),
    ) -> Evaluation:
        """Evaluates all tasks; logs metrics and writes predictions to files.

        Args:
            parameters: the model's parameters, on the mesh.
            step: training step of the parameters.
            write: logs the metrics of a task, e.g. `MetricsLog.write`; None to log nothing.
            scored_before: predictions by task of the same parameters, whose scores are used again.
        """
        reused = {
            (task, item.split): item for task, items in scored_before.items() for item in items
        }
        metrics = {}
        predictions = {}
        lines = []
        for task_id, source in enumerate(self._sources):
            task = source.task
            values = {}
            counts = collections.Counter()
            for part, split in source.evaluation_splits(self._split).items():
                before = reused.get((task.name, split))
                with activity.during(f"evaluating {task.name} on {split}"):
                    scored = before and before.of_task(task)
                    if scored is None:
                        scored = self._predict(parameters, task_id, split)
                    of_part = self._score(scored, step)
                for name, value in of_part.items():
                    values[f"{name}_{part}" if part else name] = value
                counts.update(scored.table.counts[task.name], examples=len(scored.table.labels))
                predictions.setdefault(task.name, []).append(scored)
            if not counts:
                continue
            metrics[task.name] = values
            if counts["cut_texts"]:
                self._log_truncation(task.name, counts)
            figures = {
                "examples": counts["examples"],
                "cut_share": counts["cut_texts"] / max(counts["texts"], 1),
            }
            lines.append((step, self._split, values | figures, task.name))
        if write is not None:  # after all tasks: an interrupted evaluation must log nothing
            for line in lines:
                write(*line)
        return Evaluation(step, metrics, predictions)

    def _score(self, scored: Predictions, step: int) -> dict[str, float]:
        """Returns the metrics of a split; writes its predictions and details to files."""
        writes = self._workdir is not None and distributed.is_main_process()
        if writes:
            scored.write(self._workdir / FOLDER)
        values = scored.metrics()
        if writes:
            details.write_details(
                self._workdir / FOLDER,
                scored.task.name,
                scored.split,
                details.describe(scored, step, values),
            )
        return values

    def _log_truncation(self, task: str, counts: Mapping[str, int]) -> None:
        """Logs how many texts of a task were truncated, in its first evaluation."""
        if task in self._truncated:
            return
        self._truncated.add(task)
        logging.warning(
            "%s: %d of %d texts of %s exceed max_length=%d tokens and were truncated",
            task,
            counts["cut_texts"],
            counts["texts"],
            self._split,
            self._stream.max_length,
        )

    def _predict(self, parameters: Any, task_id: int, split: str) -> Predictions:
        """Returns predictions for every example of a split of the task at index `task_id`."""
        source = self._sources[task_id]
        table = ExampleTable()
        stream = evaluation_stream(
            source,
            task_id,
            split,
            self._tokenizer,
            self._stream,
            table,
            process=jax.process_index(),
            processes=jax.process_count(),
        )

        def forward(batch: Batch) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
            sharded = shard_batch(batch, self._mesh)
            with contextlib.ExitStack() as stack:
                if not self._is_compiled:
                    stack.enter_context(activity.compiling("the evaluation"))
                encoded = self._forward(parameters, sharded)
            self._is_compiled = True
            return jax.device_get((encoded.scores, encoded.example_id, encoded.weight))

        task = source.task
        scores = score_split(task, self._same_length(stream), forward)
        outputs = task.kind.postprocess(task, scores)
        return Predictions(
            task,
            split,
            outputs,
            table,
            source.qrels(split),
            source.first_stage,
            self._constants.get(task.name),
            scores=scores,
        )

    def _same_length(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Pads the stream with empty batches, so that all processes yield equally many."""
        rows_per_process = self._stream.shape.rows // jax.process_count()
        empty = empty_batch(dataclasses.replace(self._stream.shape, rows=rows_per_process))
        while True:
            batch = next(stream, None)
            if not distributed.any_process(batch is not None):
                return
            if self._stop():
                raise EvaluationInterrupted
            yield empty if batch is None else batch
