"""Evaluates a model on a split: batches in, predictions of every example, metrics and files out."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task


@dataclasses.dataclass
class Predictions:
    """What a model said about every example of a split.

    Attributes:
        task: the task.
        outputs: [N, C] class probabilities, or [N] scores (regression in the task's own units).
        labels: [N] in the task's own units; -1 where unknown.
        query_ids, document_ids: of ranking examples.
        qrels: the judgements to rank against.
    """

    task: Task
    outputs: np.ndarray
    labels: np.ndarray
    query_ids: list[str]
    document_ids: list[str]
    qrels: Mapping[str, Mapping[str, float]] | None = None

    def metrics(self) -> dict[str, float]:
        """The task's metrics over all examples at once."""
        if self.task.kind != "ranking":
            return metrics.compute(self.task, self.labels, self.outputs)
        return ranking.compute(self.task.metrics, self._qrels(), self.run())

    def run(self) -> ranking.Run:
        """The ranking of every query's candidates."""
        return ranking.make_run(self.query_ids, self.document_ids, self.outputs)

    def _qrels(self) -> Mapping[str, Mapping[str, float]]:
        if self.qrels is not None:
            return self.qrels
        grades: dict[str, dict[str, float]] = {}
        for query, document, label in zip(self.query_ids, self.document_ids, self.labels, strict=True):
            grades.setdefault(query, {})[document] = label
        return grades

    def write(self, folder: epath.Path, split: str) -> epath.Path:
        """Writes a TREC run (ranking) or one JSON object per example, and returns the file's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.task.name}.{split}.{'trec' if self.task.kind == 'ranking' else 'jsonl'}"
        if self.task.kind == "ranking":
            ranking.write_trec(self.run(), path)
            return path
        lines = []
        for number, (output, label) in enumerate(zip(self.outputs, self.labels, strict=True)):
            line: dict = {"example": number, "label": float(label)}
            if self.task.kind == "classification":
                line |= {"label": int(label), "prediction": int(output.argmax()), "probabilities": [round(float(p), 6) for p in output]}
            else:
                line |= {"prediction": float(output)}
            lines.append(json.dumps(line) + "\n")
        path.write_text("".join(lines))
        return path


def to_outputs(task: Task, scores: np.ndarray) -> np.ndarray:
    """A head's scores [N, C] as predictions: class probabilities [N, C], or scores [N] (regression in the task's own units)."""
    scores = np.asarray(scores, np.float32)
    if task.kind == "classification":
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)
    return task.unscale(scores[:, 0]) if task.kind == "regression" else scores[:, 0]


def predict(task: Task, batches: Iterator[Batch], forward: Callable[[Batch], tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]) -> np.ndarray:
    """The outputs of every example, by example id.

    Args:
        task: whose head is read.
        batches: that hold every example once; slots with weight 0 are passed over.
        forward: from a batch to (scores of each head [B, S, C], example ids [B, S], weights [B, S]) of the *global* batch.

    Raises:
        InputError: the model's scores are not finite.
    """
    ids, scores = [], []
    for batch in batches:
        heads, example_id, weight = forward(batch)
        real = weight > 0
        ids.append(example_id[real])
        scores.append(heads[task.head][real])
    if not ids:
        raise InputError(f"task {task.name!r}: there is no example to evaluate")
    order, flat = np.concatenate(ids), np.concatenate(scores)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise AssertionError(f"task {task.name!r}: examples were not counted exactly once")
    if not np.isfinite(flat).all():
        raise InputError(f"task {task.name!r}: the model's scores are not finite; the checkpoint is broken or training diverged")
    result = np.empty_like(flat)
    result[order] = flat
    return to_outputs(task, result)
