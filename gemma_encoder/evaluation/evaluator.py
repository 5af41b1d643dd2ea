"""Evaluates a model on a split: batches in, predictions of every example, metrics and files out."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.evaluation import metrics, ranking
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ExampleTable, Task


@dataclasses.dataclass
class Predictions:
    """What a model said about every example of a split.

    Attributes:
        task: the task.
        split: by name.
        outputs: as `to_outputs` gives them.
        table: the N examples.
        qrels: the judgements to rank against.
        first_stage: whether the table holds a query's documents in the order of a first stage.
    """

    task: Task
    split: str
    outputs: np.ndarray
    table: ExampleTable
    qrels: Mapping[str, Mapping[str, float]] | None = None
    first_stage: bool = False

    def metrics(self) -> dict[str, float]:
        """The task's metrics over all examples at once; none where no label is known."""
        if self.task.kind != "ranking":
            return metrics.compute(self.task, self.outputs, self.table)
        return ranking.compute(self.task.metrics, self.judgements(), self.run())

    def run(self) -> ranking.Run:
        """The ranking of every query's candidates."""
        return ranking.make_run(self.table.query_ids, self.table.document_ids, self.outputs)

    def judgements(self) -> Mapping[str, Mapping[str, float]]:
        """The grade of each judged document of each query: those of the benchmark, else the candidates' own labels."""
        if self.qrels is not None:
            return self.qrels
        grades: dict[str, dict[str, float]] = {}
        for query, document, label in zip(
            self.table.query_ids, self.table.document_ids, self.table.labels, strict=True
        ):
            grades.setdefault(query, {})[document] = label
        return grades

    def write(self, folder: epath.Path) -> epath.Path:
        """Writes one JSON object per example, or for ranking a TREC and an MS MARCO run; returns the first file's path.

        Beside them goes what a person wants to look at: the worst mistakes with their texts; for ranking the queries, the judgements
        and the first stage's run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.task.kind == "ranking":
            run, path = self.run(), folder / f"{self.task.name}.{self.split}.trec"
            ranking.write_trec(run, path)
            ranking.write_msmarco(run, folder / f"{self.task.name}.{self.split}.tsv")
            self._write_queries(folder)
            return path
        path = prediction_file(folder, self.task.name, self.split)
        path.write_text(
            "".join(json.dumps(self._line(number)) + "\n" for number in range(len(self.outputs)))
        )
        if self.task.kind not in ("choice", "language_model"):
            lines = (
                json.dumps({**self._line(number), "fields": self.table.fields[number]}) + "\n"
                for number in self.mistakes()
            )
            mistake_file(folder, self.task.name, self.split).write_text("".join(lines))
        return path

    def mistakes(self, count: int = 50) -> list[int]:
        """The worst ones among the examples whose texts are kept: wrong and most confident, or (regression) farthest off."""
        kept = [
            i
            for i in range(len(self.table.fields))
            if not self.task.is_unlabelled(self.table.labels[i])
        ]
        labels = np.array(self.table.labels)
        if self.task.kind == "classification":
            said, confidence = self.outputs.argmax(axis=-1), self.outputs.max(axis=-1)
            return sorted((i for i in kept if said[i] != labels[i]), key=lambda i: -confidence[i])[
                :count
            ]
        return sorted(kept, key=lambda i: -abs(self.outputs[i] - labels[i]))[:count]

    def _write_queries(self, folder: epath.Path) -> None:
        name, table = f"{self.task.name}.{self.split}", self.table
        ranking.write_qrels(self.judgements(), folder / f"{name}.qrels")
        if self.first_stage:
            order = -np.arange(len(table.query_ids), dtype=np.float32)
            ranking.write_trec(
                ranking.make_run(table.query_ids, table.document_ids, order),
                folder / f"{name}.first_stage.trec",
                "first_stage",
            )
        texts = {
            query: fields.get(self.task.template.fields[0], "")
            for query, fields in zip(table.query_ids, table.fields, strict=False)
        }
        (folder / f"{name}.queries.jsonl").write_text(
            "".join(
                json.dumps({"query": query, "text": text}) + "\n" for query, text in texts.items()
            )
        )

    def _line(self, number: int) -> dict[str, Any]:
        """What is said of one example. `idx` is the benchmark's own number of it."""
        output, label, table = self.outputs[number], self.table.labels[number], self.table
        line: dict[str, Any] = {"example": number, **table.infos[number]}
        if table.query_ids[number]:
            line["query"] = table.query_ids[number]
        if table.document_ids[number]:
            line["document"] = table.document_ids[number]
        if self.task.kind == "classification":
            return line | {
                "label": int(label),
                "prediction": int(output.argmax()),
                "probabilities": [round(float(p), 6) for p in output],
            }
        if self.task.kind == "language_model":
            return line | said_of_text(output)
        return line | {"label": float(label), "prediction": float(output)}


def said_of_text(output: np.ndarray) -> dict[str, Any]:
    """What a language model's output [2] of one text means: perplexity, and what it is made of (nll is a sum over `tokens`, in nats)."""
    return {
        "prediction": float(metrics.text_perplexity(output[None])[0]),
        "nll": float(output[0]),
        "tokens": int(output[1]),
    }


def prediction_file(folder: epath.Path, task: str, split: str) -> epath.Path:
    """Where the predictions of a task's split lie, one JSON object per example."""
    return folder / f"{task}.{split}.jsonl"


def mistake_file(folder: epath.Path, task: str, split: str) -> epath.Path:
    """Where the worst mistakes of a task's split lie, with their texts."""
    return folder / f"{task}.{split}.mistakes.jsonl"


def to_outputs(task: Task, scores: np.ndarray) -> np.ndarray:
    """A head's scores [N, C] as predictions: class probabilities [N, C], or scores [N] (regression in the task's own units).

    Of a language model [N, 2]: each text's summed negative log-likelihood in nats, and how many tokens it predicted.
    """
    scores = np.asarray(scores, np.float32)
    if task.kind == "language_model":
        return scores
    if task.kind == "classification":
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)
    return task.unscale(scores[:, 0]) if task.kind == "regression" else scores[:, 0]


def predict(
    task: Task,
    batches: Iterator[Batch],
    forward: Callable[[Batch], tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]],
) -> np.ndarray:
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
        raise InputError(
            f"task {task.name!r}: the model's scores are not finite; the checkpoint is broken or training diverged"
        )
    result = np.empty_like(flat)
    result[order] = flat
    return to_outputs(task, result)
