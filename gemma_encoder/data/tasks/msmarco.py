"""MS MARCO passage ranking and the TREC Deep Learning tracks.

Reads the official files in the folder `MSMARCO_DIR`:

    collection.tsv           pid, passage
    queries.SPLIT.tsv        qid, query
    qrels.SPLIT.tsv          qid, 0, pid, relevance
    run.SPLIT.tsv            first-stage candidates: qid, pid, rank; or a TREC run; or
    top1000.SPLIT.tsv        qid, pid, query, passage

Files may be compressed (.gz). SPLIT is train, dev, eval, dl19 or dl20. If dev.small exists (the
6,980 queries of published results), it replaces dev. The tracks' official file names are also
accepted. `--config.ranking.run=PATH` selects another run, with `{split}` for SPLIT. top1000 files
are sorted by pid, so their ranks, and `ranking.negative_ranks`, have no meaning.

The Deep Learning tracks have grades 0 to 3, which nDCG uses. For binary metrics, passages are
relevant from grade 2 (arXiv 2003.07820), as in the metrics' names. All tasks share one head, so a
model trained on `msmarco` is evaluated by
`gemma-encoder evaluate --config.tasks="('msmarco_dl19',)"`. The tasks with the suffix `_retrieval`
search the passages, see `data.retrieval`; they need no run unless they train on hard negatives.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable

from gemma_encoder.data import ranking
from gemma_encoder.data.files.corpus import Corpus, TsvLayout
from gemma_encoder.data.files.runs import Candidates, Qrels
from gemma_encoder.data.ranking import RankingFiles, RankingSource
from gemma_encoder.data.retrieval import on_files_of
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

# Split -> its names in file names, in order of preference.
SPLITS = {"train": ("train",), "validation": ("dev.small", "dev"), "test": ("eval.small", "eval")}
TRACKS = {"msmarco_dl19": "dl19", "msmarco_dl20": "dl20"}
OFFICIAL = {  # names of a track's files as published by NIST
    "queries": "msmarco-test{year}-queries.tsv",
    "qrels": "{year}qrels-pass.txt",
    "top1000": "msmarco-passagetest{year}-top1000.tsv",
}
_CONTENT = (
    "collection.tsv, queries.{train,dev}.tsv, qrels.{train,dev}.tsv and run.{train,dev}.tsv, as "
    "published at https://microsoft.github.io/msmarco/"
)
_HINT = (
    "MSMARCO_DIR must name a folder with MS MARCO passage-ranking files (collection.tsv, "
    "queries.*.tsv, qrels.*.tsv, run.*.tsv)"
)


def _file_names(kind: str, split: str) -> list[str]:
    names = [f"{kind}.{split}.tsv"]
    if split.startswith("dl") and kind in OFFICIAL:
        names.append(OFFICIAL[kind].format(year=f"20{split[2:]}"))
    return names


class MsMarcoSource(RankingSource):
    """A set of queries over the passages of MS MARCO.

    Args:
        task: the task to learn.
        options: the data options of the config.
        names: names of each split in file names, in order of preference.
    """

    def __init__(self, task: Task, options: DataOptions, names: dict[str, tuple[str, ...]]):
        super().__init__(task, options)
        self._names = names
        self.splits = tuple(names)

    def check(self) -> None:
        """Raises InputError if MSMARCO_DIR does not contain a collection."""
        if not self.folder.is_dir():
            raise InputError(f"MSMARCO_DIR={os.environ['MSMARCO_DIR']} is not a folder")
        self._find("collection.tsv")

    @property
    def folder(self) -> pathlib.Path:
        """Folder of the files."""
        return ranking.named_folder("MSMARCO_DIR", self.task, _CONTENT)

    def _find(self, *names: str) -> pathlib.Path:
        return ranking.find_file(self.folder, names, _HINT)

    @functools.cached_property
    def passages(self) -> Corpus:
        """The passage collection, shared by all splits."""
        return Corpus(self._find("collection.tsv"), TsvLayout("pid", "passage"))

    def _open(self, split: str) -> RankingFiles:
        names = self._names[split]

        def find(*kinds: str) -> pathlib.Path:
            candidates = [_file_names(kind, name) for kind in kinds for name in names]
            return self._find(*itertools.chain.from_iterable(candidates))

        queries = Corpus(find("queries"), TsvLayout("qid", "query"), in_memory=True)
        has_qrels = split != "test"
        qrels = Qrels(find("qrels"), queries, self.passages) if has_qrels else None

        def open_candidates() -> Candidates:
            run = ranking.run_path(
                self.options.run, names[-1], lambda: find("run", "top1000", "top100")
            )
            return Candidates(run, queries, self.passages)

        return RankingFiles(queries, self.passages, qrels, open_candidates)


def _declare(
    name: str, names: dict[str, tuple[str, ...]], *metrics: str
) -> tuple[str, Callable[[DataOptions], RankingSource]]:
    task = Task(name, "ranking", ranking.TEMPLATE, metrics, head="msmarco")
    return name, lambda options: MsMarcoSource(task, options, names)


_RANKING: dict[str, Callable[[DataOptions], RankingSource]] = dict(
    [
        _declare("msmarco", SPLITS, "mrr@10", "ndcg@10"),
        *(
            _declare(name, {"validation": (track,)}, "ndcg@10", "mrr(rel=2)@10", "map(rel=2)")
            for name, track in TRACKS.items()
        ),
    ]
)

TASKS: dict[str, Callable[[DataOptions], Source]] = {**_RANKING, **on_files_of(_RANKING)}
