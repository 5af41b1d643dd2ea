"""Predictions for every example of a split, with their metrics and files."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.evaluation import metrics, ranking, ranking_baselines
from gemma_encoder.evaluation.columns import check_finite
from gemma_encoder.evaluation.prediction_files import (
    json_lines,
    mistake_file,
    prediction_file,
    write_prediction_files,
)
from gemma_encoder.evaluation.vector_search import search_run
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.ids import FIRST_STAGE_TAG
from gemma_encoder.inputs.task import ExampleTable, Task


@dataclasses.dataclass
class Predictions:
    """A model's outputs for every example of a split.

    Attributes:
        task: the predicted task.
        split: name of the split.
        outputs: [N, …], from `Kind.postprocess`.
        scores: [N, K] float32, the head's outputs that `outputs` were made from, if at hand.
        table: the N examples.
        qrels: relevance grades of documents by query, if the benchmark has them.
        first_stage: True if the table lists each query's documents in first-stage order.
        constant: the constant output that fits the task's training labels best; None if unknown.
        intervals: bounds of metrics by name, kept by `details.intervals_of`, since they take long.
    """

    task: Task
    split: str
    outputs: np.ndarray
    scores: np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    table: ExampleTable
    qrels: Mapping[str, Mapping[str, float]] | None = None
    first_stage: bool = False
    constant: Any = None
    intervals: dict[str, list[float]] | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    _run: ranking.Run | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )  # metrics, intervals and files read it

    def of_task(self, task: Task) -> "Predictions":
        """Returns the same predictions for the task with another calibration."""
        return dataclasses.replace(
            self, task=task, outputs=task.kind.postprocess(task, self.scores)
        )

    def metrics(self) -> dict[str, float]:
        """Computes the task's metrics over all examples; empty without labels."""
        if self.task.kind.ranks:
            return ranking.compute_ranking_metrics(
                self.task.metrics, self.relevance_grades(), self.run()
            )
        return metrics.compute_metrics(self.task, self.outputs, self.table)

    def run(self) -> ranking.Run:
        """Returns the ranking of every query's candidates, or what it found by a search."""
        if self._run is None:
            table = self.table
            if self.task.kind.embeds:
                self._run = search_run(self.task.kind, table, self.outputs)
            else:
                self._run = ranking.make_run(table.query_ids, table.document_ids, self.outputs)
        return self._run

    def first_stage_run(self) -> ranking.Run | None:
        """Returns the ranking of the first stage; None if its order is unknown."""
        if not self.first_stage:
            return None
        ranks = np.empty(len(self.table.query_ids), np.float32)
        for group in self.table.groups().values():  # float32 counts exactly within a query
            ranks[group] = np.arange(len(group))
        return ranking.make_run(self.table.query_ids, self.table.document_ids, -ranks)

    def random_order_metrics(self) -> dict[str, float]:
        """Computes the expected metrics of a ranking task for candidates in random order.

        Empty for retrieval, where every document is a candidate.
        """
        if self.task.kind.embeds:
            return {}
        groups = self.table.groups()
        documents = self.table.document_ids
        candidates = {query: [documents[i] for i in group] for query, group in groups.items()}
        return ranking_baselines.random_order(
            self.task.metrics, self.relevance_grades(), candidates
        )

    def first_stage_metrics(self) -> dict[str, float]:
        """Computes the metrics of the first stage's order; empty if it is unknown."""
        run = self.first_stage_run()
        if run is None:
            return {}
        return ranking.compute_ranking_metrics(self.task.metrics, self.relevance_grades(), run)

    def relevance_grades(self) -> Mapping[str, Mapping[str, float]]:
        """Returns grades of documents by query: `qrels`, else the candidates' labels."""
        if self.qrels is not None:
            return self.qrels
        grades: dict[str, dict[str, float]] = {}
        for query, document, label in zip(
            self.table.query_ids, self.table.document_ids, self.table.labels, strict=True
        ):
            grades.setdefault(query, {})[document] = label
        return grades

    def write(self, folder: epath.Path) -> epath.Path:
        """Writes one JSON object per example, or for ranking a TREC and an MS MARCO run.

        Also writes files for inspection: the worst mistakes with their texts; for ranking, the
        queries, the qrels and the first stage's run.

        Returns:
            The path of the predictions or of the TREC run.
        """
        if self.task.kind.ranks:
            path = folder / f"{self.task.name}.{self.split}.trec"
            run = self.run()
            files = {
                path.name: ranking.trec_lines(run),
                f"{self.task.name}.{self.split}.tsv": ranking.msmarco_lines(run),
                **self._query_files(),
            }
        else:
            path = prediction_file(folder, self.task.name, self.split)
            files = {path.name: json_lines(map(self._line, range(len(self.outputs))))}
            if self.task.kind.mistake_measure:
                mistakes = (
                    {**self._line(index), "fields": self.table.fields[index]}
                    for index in self.mistakes()
                )
                name = mistake_file(folder, self.task.name, self.split).name
                files[name] = json_lines(mistakes)
        write_prediction_files(folder, files)
        return path

    def mistakes(self, count: int = 50) -> list[int]:
        """Returns the example ids of the worst mistakes, the worst first.

        Only examples with stored texts are considered, see `ExampleTable.MAX_TEXTS`.
        """
        severity = self.task.kind.severity(self.task, self.outputs, self.table.labels)
        if severity is None:
            return []
        candidates = [
            index
            for index in range(len(self.table.fields))
            if not self.task.is_unlabeled(self.table.labels[index]) and severity[index] > -np.inf
        ]
        return sorted(candidates, key=lambda index: -severity[index])[:count]

    def _query_files(self) -> dict[str, Iterator[str]]:
        """Returns the lines of the files about queries, by file name."""
        name = f"{self.task.name}.{self.split}"
        table = self.table
        files = {f"{name}.qrels": ranking.qrels_lines(self.relevance_grades())}
        if first_stage := self.first_stage_run():
            files[f"{name}.first_stage.trec"] = ranking.trec_lines(first_stage, FIRST_STAGE_TAG)
        query_field = self.task.template_for("query").fields[0]
        texts = {
            query: fields.get(query_field, "")
            for query, fields in zip(table.query_ids, table.fields, strict=False)
            if query
        }
        lines = ({"query": query, "text": text} for query, text in texts.items())
        return {**files, f"{name}.queries.jsonl": json_lines(lines)}

    def _line(self, index: int) -> dict[str, Any]:
        """Returns one line of the prediction file; `idx` is the benchmark's own index."""
        table = self.table
        line: dict[str, Any] = {"example": index, **table.infos[index]}
        if table.query_ids[index]:
            line["query"] = table.query_ids[index]
        if table.document_ids[index]:
            line["document"] = table.document_ids[index]
        return line | self.task.kind.line(self.task, self.outputs[index], table.labels[index])


def score_split(
    task: Task,
    batches: Iterator[Batch],
    forward: Callable[[Batch], tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Computes the head's scores [N, K] float32 of every example, by example id.

    Args:
        task: the task to predict; its head is read.
        batches: contain every example once; slots with weight 0 are ignored.
        forward: function from a process's batch to (scores by head [B, S, C], example ids [B, S],
            weights [B, S]) of the *global* batch.

    Raises:
        InputError: there are no examples, or scores are NaN or infinite.
    """
    batch_ids = []
    batch_scores = []
    for batch in batches:
        heads, example_id, weight = forward(batch)
        filled = weight > 0
        batch_ids.append(example_id[filled])
        batch_scores.append(heads[task.head][filled])
    if not batch_ids:
        raise InputError(f"task {task.name!r}: there is no example to evaluate")
    ids = np.concatenate(batch_ids)
    scores = np.concatenate(batch_scores)
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise AssertionError(f"task {task.name!r}: examples were not counted exactly once")
    result = np.empty_like(scores)
    result[ids] = scores
    check_finite(result, "scores", f"task {task.name!r}, example {{}}".format)
    return np.asarray(result, np.float32)
