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

from gemma_encoder.data import ranking
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.files.lines import Lines, Spans
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.ranking import RankingFiles, RankingSource
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

# The public ones that are one folder each.
DATASETS = (
    *("arguana", "climate-fever", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "nfcorpus", "nq"),
    *("quora", "scidocs", "scifact", "trec-covid", "webis-touche2020"),
)
SPLITS = {"train": "train", "validation": "dev", "test": "test"}  # our names, and the files'
_HINT = (
    "BEIR's layout is corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; and a first stage's "
    "run.SPLIT.tsv"
)


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
        for line in range(len(lines.starts)):
            try:
                names.append(self.parse(lines.text(line))[0].encode())
            except ValueError as error:
                raise InputError(f"{lines.where(line)}: {error}") from None
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
        are_texts = all(isinstance(value, str) for value in (name, title, text))
        if not are_texts or not name.strip():
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
        if not self.folder.is_dir():
            raise InputError(
                f"task {self.task.name!r}: BEIR_DIR={os.environ['BEIR_DIR']} holds no folder "
                f"{self._corpus}"
            )
        self._find("corpus.jsonl")
        self._find("queries.jsonl")

    @property
    def folder(self) -> pathlib.Path:
        """The dataset's."""
        content = f"{self._corpus}/corpus.jsonl and so on, one folder a dataset"
        return ranking.named_folder("BEIR_DIR", self.task, content) / self._corpus

    def _find(self, *names: str) -> pathlib.Path:
        return ranking.find_file(self.folder, names, _HINT)

    @functools.cached_property
    def _texts(self) -> tuple[Corpus, Corpus]:
        queries = Corpus(self._find("queries.jsonl"), JsonLayout(False), in_memory=True)
        return queries, Corpus(self._find("corpus.jsonl"), JsonLayout(True))

    def _open(self, split: str) -> RankingFiles:
        name, texts = SPLITS[split], self._texts
        qrels = Qrels(self._find(f"qrels/{name}.tsv"), *texts)
        run = ranking.run_path(
            self.options.run, name, lambda: self._find(f"run.{name}.tsv", f"run.{name}.trec")
        )
        candidates = Candidates(run, *texts, drop_same_id=True)
        return RankingFiles(*texts, candidates, qrels)


def _declare(dataset: str) -> tuple[str, Callable[[DataOptions], Source]]:
    name, metrics = f"beir_{dataset.replace('-', '_')}", ("ndcg@10", "recall@100")
    task = Task(name, "ranking", ranking.TEMPLATE, metrics, head="msmarco")
    return name, lambda options: BeirSource(task, options, dataset)


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(map(_declare, DATASETS))
