"""MS MARCO passage ranking and the TREC Deep Learning tracks, from the official files in the folder that `MSMARCO_DIR` names.

    collection.tsv           pid, passage
    queries.SPLIT.tsv        qid, query
    qrels.SPLIT.tsv          qid, 0, pid, relevance
    run.SPLIT.tsv            the first stage's candidates: qid, pid, rank; or a TREC run; or
    top1000.SPLIT.tsv        qid, pid, query, passage

Each may be .gz. SPLIT is train, dev (dev.small where it is there: the 6,980 queries that results are reported on), eval, dl19, dl20; the
tracks' own file names are known too. `--config.ranking.run=PATH` names another run, with `{split}` for SPLIT.
top1000 files are sorted by pid: with them, `ranking.negative_ranks` chooses no ranks.

The Deep Learning tracks have grades 0 to 3. nDCG uses them; a passage counts as relevant for the binary metrics from grade 2
(arXiv 2003.07820), which the metrics' names say. All share one head, so a model that was trained on `msmarco` is evaluated by
`gemma-encoder evaluate --config.tasks="('msmarco_dl19',)"`.
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
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

# For each split of ours, the files' names for it, the preferred one first.
SPLITS = {"train": ("train",), "validation": ("dev.small", "dev"), "test": ("eval.small", "eval")}
TRACKS = {"msmarco_dl19": "dl19", "msmarco_dl20": "dl20"}
OFFICIAL = {  # names under which NIST publishes a track's files
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
    """One set of queries over MS MARCO's passages.

    Args:
        task: what is learnt.
        options: what the config says about sources.
        names: for each split, the files' names for it, the preferred one first.
    """

    def __init__(self, task: Task, options: DataOptions, names: dict[str, tuple[str, ...]]):
        super().__init__(task, options)
        self._names, self.splits = names, tuple(names)

    def check(self) -> None:
        """Raises InputError where MSMARCO_DIR names no folder with a collection."""
        if not self.folder.is_dir():
            raise InputError(f"MSMARCO_DIR={os.environ['MSMARCO_DIR']} is not a folder")
        self._find("collection.tsv")

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the files."""
        return ranking.named_folder("MSMARCO_DIR", self.task, _CONTENT)

    def _find(self, *names: str) -> pathlib.Path:
        return ranking.find_file(self.folder, names, _HINT)

    @functools.cached_property
    def passages(self) -> Corpus:
        """The collection."""
        return Corpus(self._find("collection.tsv"), TsvLayout("pid", "passage"))

    def _open(self, split: str) -> RankingFiles:
        names = self._names[split]

        def find(*kinds: str) -> pathlib.Path:
            candidates = [_file_names(kind, name) for kind in kinds for name in names]
            return self._find(*itertools.chain.from_iterable(candidates))

        queries = Corpus(find("queries"), TsvLayout("qid", "query"), in_memory=True)
        has_qrels = split != "test"
        qrels = Qrels(find("qrels"), queries, self.passages) if has_qrels else None
        run = ranking.run_path(
            self.options.run, names[-1], lambda: find("run", "top1000", "top100")
        )
        candidates = Candidates(run, queries, self.passages)
        return RankingFiles(queries, self.passages, candidates, qrels)


def _declare(
    name: str, names: dict[str, tuple[str, ...]], *metrics: str
) -> tuple[str, Callable[[DataOptions], Source]]:
    task = Task(name, "ranking", ranking.TEMPLATE, metrics, head="msmarco")
    return name, lambda options: MsMarcoSource(task, options, names)


TASKS: dict[str, Callable[[DataOptions], Source]] = dict(
    [
        _declare("msmarco", SPLITS, "mrr@10", "ndcg@10"),
        *(
            _declare(name, {"validation": (track,)}, "ndcg@10", "mrr(rel=2)@10", "map(rel=2)")
            for name, track in TRACKS.items()
        ),
    ]
)
