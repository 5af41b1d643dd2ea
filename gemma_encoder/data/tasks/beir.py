"""BEIR's datasets (arXiv 2104.08663): task `beir_NAME` reads the folder NAME under the one that `BEIR_DIR` names.

    corpus.jsonl                    {"_id": …, "title": …, "text": …}
    queries.jsonl                   {"_id": …, "text": …}
    qrels/{train,dev,test}.tsv      query-id, corpus-id, score, under a header
    run.{train,dev,test}.tsv        the first stage's candidates, or the path that `--config.ranking.run` gives; `{split}` stands for the
                                    split, and a TREC run (qid Q0 docid rank score tag) or MS MARCO's (qid, pid, rank) will do

Each may be .gz. A document's text is its title, then its text. As in BEIR's own evaluation, a query's candidates leave out a document with the
query's own id. The head is MS MARCO's, so a model that was trained there is evaluated here without training (zero-shot):
`gemma-encoder evaluate --config.tasks="('beir_scifact',)" --config.evaluate_split=test`.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gemma_encoder.data.files.lines import Lines, Spans
from gemma_encoder.data.files.passages import Texts
from gemma_encoder.data.files.runs import Candidates, Judgements
from gemma_encoder.data.ranking import TEMPLATE, RankingFiles, RankingSource, find_file, run_path
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

# The public ones that are one folder each.
DATASETS = (
    "arguana",
    "climate-fever",
    "dbpedia-entity",
    "fever",
    "fiqa",
    "hotpotqa",
    "nfcorpus",
    "nq",
    "quora",
    "scidocs",
    "scifact",
    "trec-covid",
    "webis-touche2020",
)
SPLITS = {"train": "train", "validation": "dev", "test": "test"}  # our names, and the files'


class JsonLayout:
    """One JSON object a line, with `_id`, `text` and, in a corpus, `title`.

    Args:
        may_be_empty: whether a text may be blank; some documents are, as published.
    """

    what = "_id"

    def __init__(self, may_be_empty: bool):
        self._may_be_empty = may_be_empty

    def ids(self, lines: Lines) -> Spans:
        """The ids, each object checked."""
        names = []
        for place in range(len(lines.starts)):
            try:
                names.append(self.parse(lines.text(place))[0].encode())
            except ValueError as error:
                raise InputError(f"{lines.where(place)}: {error}") from None
        return Spans.of(names)

    def parse(self, line: str) -> tuple[str, str]:
        """Id, and title and text as one."""
        try:
            record: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a JSON object ({error.msg}): {line[:80]!r}") from None
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object with _id and text, got {line[:80]!r}")
        name, title, text = record.get("_id"), record.get("title") or "", record.get("text")
        if (
            not isinstance(name, str)
            or not name.strip()
            or not isinstance(title, str)
            or not isinstance(text, str)
        ):
            raise ValueError(
                f"expected _id and text, and title if there is one, as strings, got {line[:80]!r}"
            )
        whole = f"{title} {text}".strip()
        if not whole and not self._may_be_empty:
            raise ValueError(f"the text of {name!r} is empty")
        return name, whole


class BeirSource(RankingSource):
    """One dataset.

    Args:
        task: what is learnt.
        options: what the config says about sources.
        dataset: its folder.
    """

    def __init__(self, task: Task, options: DataOptions, dataset: str):
        super().__init__(task, options)
        self._corpus = dataset

    def check(self) -> None:
        """Raises InputError where BEIR_DIR names no folder that holds the dataset."""
        if not os.environ.get("BEIR_DIR"):
            raise InputError(
                f"task {self.task.name!r}: BEIR_DIR is not set; it names a folder with {self._corpus}/corpus.jsonl and so on, one folder a dataset"
            )
        if not self.folder.is_dir():
            raise InputError(
                f"task {self.task.name!r}: BEIR_DIR={os.environ['BEIR_DIR']} holds no folder {self._corpus}"
            )
        self._find("corpus.jsonl")
        self._find("queries.jsonl")

    @property
    def folder(self) -> pathlib.Path:
        """Where the dataset lies."""
        return pathlib.Path(os.environ["BEIR_DIR"]).expanduser() / self._corpus

    def _find(self, *names: str) -> pathlib.Path:
        return find_file(
            self.folder,
            names,
            "BEIR's layout is corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; and a first stage's run.SPLIT.tsv",
        )

    @functools.cached_property
    def _texts(self) -> tuple[Texts, Texts]:
        return Texts(self._find("queries.jsonl"), JsonLayout(False), in_memory=True), Texts(
            self._find("corpus.jsonl"), JsonLayout(True)
        )

    def _open(self, split: str) -> RankingFiles:
        name, (queries, documents) = SPLITS[split], self._texts
        judgements = Judgements(self._find(f"qrels/{name}.tsv"), queries, documents)
        run = run_path(
            self.options.run, name, lambda: self._find(f"run.{name}.tsv", f"run.{name}.trec")
        )
        return RankingFiles(
            queries, documents, Candidates(run, queries, documents, drop_same_id=True), judgements
        )


def _declare(dataset: str) -> Callable[[DataOptions], Source]:
    task = Task(
        f"beir_{dataset.replace('-', '_')}",
        "ranking",
        TEMPLATE,
        metrics=("ndcg@10", "recall@100"),
        head="msmarco",
    )
    return lambda options: BeirSource(task, options, dataset)


TASKS: dict[str, Callable[[DataOptions], Source]] = {
    f"beir_{dataset.replace('-', '_')}": _declare(dataset) for dataset in DATASETS
}
