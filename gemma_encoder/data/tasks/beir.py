"""BEIR (arXiv 2104.08663): the task `beir_NAME` reads the folder NAME in `BEIR_DIR`.

    corpus.jsonl                    {"_id": …, "title": …, "text": …}
    queries.jsonl                   {"_id": …, "text": …}
    qrels/{train,dev,test}.tsv      query-id, corpus-id, score, with a header
    run.{train,dev,test}.tsv        first-stage candidates: a TREC run (qid Q0 docid rank score tag)
                                    or an MS MARCO run (qid, pid, rank)

Files may be compressed (.gz). `--config.ranking.run=PATH` selects another run, with `{split}` for
the split. The text of a document is its title followed by its text. As in BEIR's evaluation, a
document with the id of the query is no candidate. The head is the one of MS MARCO, for zero-shot
evaluation of a model trained on it:
`gemma-encoder evaluate --config.tasks="('beir_scifact',)" --config.evaluate_split=test`. The tasks
`beir_NAME_retrieval` search the corpus, see `data.retrieval`.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gemma_encoder.data import ranking
from gemma_encoder.data.files.corpus import Corpus
from gemma_encoder.data.files.lines import Lines, Spans
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.ranking import RankingFiles, RankingSource
from gemma_encoder.data.retrieval import on_files_of
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.task import Task

# The public datasets that consist of a single folder.
DATASETS = (
    *("arguana", "climate-fever", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "nfcorpus", "nq"),
    *("quora", "scidocs", "scifact", "trec-covid", "webis-touche2020"),
)
SPLITS = {"train": "train", "validation": "dev", "test": "test"}  # split -> name in file names
_HINT = (
    "expected BEIR's corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, and a first-stage "
    "run.SPLIT.tsv"
)


class JsonLayout:
    """One JSON object per line, with `_id`, `text` and, in a corpus, `title`.

    Args:
        may_be_empty: accept blank texts; some published documents are empty.
    """

    id_name = "_id"
    condition = ""

    def __init__(self, may_be_empty: bool):
        self._may_be_empty = may_be_empty

    def ids(self, lines: Lines) -> Spans:
        """Returns the ids and checks the objects."""
        ids = []
        for index in range(len(lines.starts)):
            line = lines.text(index)
            try:
                text_id, text = self.parse(line)
                ids.append(text_id.encode())
                if "\\u" in line:  # an escape may be half of a character
                    text.encode()
            except ValueError as error:
                problem = getattr(error, "reason", None)
                problem = f"not valid Unicode ({problem})" if problem else error
                raise InputError(f"{lines.where(index)}: {problem}") from None
        return Spans.of(ids)

    def parse(self, line: str) -> tuple[str, str]:
        """Returns the id, and title and text joined; raises ValueError for a malformed line."""
        try:
            record: Mapping[str, Any] = from_json(line)
        except ValueError as error:
            problem = getattr(error, "msg", error)
            raise ValueError(f"not a JSON object ({problem}): {line[:80]!r}") from None
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object with _id and text, got {line[:80]!r}")
        text_id = record.get("_id")
        title = record.get("title") or ""
        text = record.get("text")
        are_texts = all(isinstance(value, str) for value in (text_id, title, text))
        if not are_texts or not text_id.strip():
            raise ValueError(
                f"expected _id and text, and title if there is one, as strings, got {line[:80]!r}"
            )
        content = f"{title} {text}".strip()
        if not content and not self._may_be_empty:
            raise ValueError(f"the text of {text_id!r} is empty")
        return text_id, content


class BeirSource(RankingSource):
    """A dataset of BEIR.

    Args:
        task: the task to learn.
        options: the data options of the config.
        dataset: name of the dataset's folder.
    """

    def __init__(self, task: Task, options: DataOptions, dataset: str):
        super().__init__(task, options)
        self._dataset = dataset

    def check(self) -> None:
        """Raises InputError if BEIR_DIR does not contain the dataset."""
        if not self.folder.is_dir():
            raise InputError(
                f"task {self.task.name!r}: BEIR_DIR={os.environ['BEIR_DIR']} has no folder "
                f"{self._dataset}"
            )
        self._find("corpus.jsonl")
        self._find("queries.jsonl")

    @property
    def folder(self) -> pathlib.Path:
        """Folder of the dataset."""
        content = f"{self._dataset}/corpus.jsonl and so on, one folder per dataset"
        return ranking.named_folder("BEIR_DIR", self.task, content) / self._dataset

    def _find(self, *names: str) -> pathlib.Path:
        return ranking.find_file(self.folder, names, _HINT)

    @functools.cached_property
    def _texts(self) -> tuple[Corpus, Corpus]:
        """Queries and documents, shared by all splits."""
        queries = Corpus(
            self._find("queries.jsonl"), JsonLayout(may_be_empty=False), in_memory=True
        )
        return queries, Corpus(self._find("corpus.jsonl"), JsonLayout(may_be_empty=True))

    def _open(self, split: str) -> RankingFiles:
        queries, documents = self._texts
        name = SPLITS[split]
        qrels = Qrels(self._find(f"qrels/{name}.tsv"), queries, documents)

        def open_candidates() -> Candidates:
            run = ranking.run_path(
                self.options.run, name, lambda: self._find(f"run.{name}.tsv", f"run.{name}.trec")
            )
            return Candidates(run, queries, documents, drop_same_id=True)

        return RankingFiles(queries, documents, qrels, open_candidates)


def _declare(dataset: str) -> tuple[str, Callable[[DataOptions], RankingSource]]:
    name = f"beir_{dataset.replace('-', '_')}"
    metrics = ("ndcg@10", "recall@100")
    task = Task(name, "ranking", ranking.TEMPLATE, metrics, head="msmarco")
    return name, lambda options: BeirSource(task, options, dataset)


_RANKING = dict(map(_declare, DATASETS))
TASKS: dict[str, Callable[[DataOptions], Source]] = {**_RANKING, **on_files_of(_RANKING)}
