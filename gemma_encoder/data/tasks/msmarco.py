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
import os
import pathlib
from collections.abc import Callable

from gemma_encoder.data.files.passages import Texts, TsvLayout
from gemma_encoder.data.files.runs import Candidates, Judgements
from gemma_encoder.data.ranking import TEMPLATE, RankingFiles, RankingSource, find_file, run_path
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task

# For each split of ours, the files' names for it, the preferred one first.
SPLITS = {"train": ("train",), "validation": ("dev.small", "dev"), "test": ("eval.small", "eval")}
TRACKS = {"msmarco_dl19": "dl19", "msmarco_dl20": "dl20"}
_HINT = "MSMARCO_DIR must name a folder with MS MARCO passage-ranking files (collection.tsv, queries.*.tsv, qrels.*.tsv, run.*.tsv)"


def _official(kind: str, name: str) -> list[str]:
    """The names under which NIST publishes a track's files."""
    if not name.startswith("dl"):
        return []
    year = f"20{name[2:]}"
    names = {
        "queries": [f"msmarco-test{year}-queries.tsv"],
        "qrels": [f"{year}qrels-pass.txt"],
        "top1000": [f"msmarco-passagetest{year}-top1000.tsv"],
    }
    return names.get(kind, [])


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
        folder = os.environ.get("MSMARCO_DIR")
        if not folder:
            raise InputError(
                f"task {self.task.name!r}: MSMARCO_DIR is not set; it names a folder with collection.tsv, queries.{{train,dev}}.tsv, "
                "qrels.{train,dev}.tsv and run.{train,dev}.tsv, as published at https://microsoft.github.io/msmarco/"
            )
        if not self.folder.is_dir():
            raise InputError(f"MSMARCO_DIR={folder} is not a folder")
        self._find("collection.tsv")

    @property
    def folder(self) -> pathlib.Path:
        """Where the files lie."""
        return pathlib.Path(os.environ["MSMARCO_DIR"]).expanduser()

    def _find(self, *names: str) -> pathlib.Path:
        return find_file(self.folder, names, _HINT)

    @functools.cached_property
    def passages(self) -> Texts:
        """The collection."""
        return Texts(self._find("collection.tsv"), TsvLayout("pid", "passage"))

    def _open(self, split: str) -> RankingFiles:
        names = self._names[split]

        def of_split(*kinds: str) -> pathlib.Path:
            return self._find(
                *(
                    name
                    for kind in kinds
                    for split_name in names
                    for name in (f"{kind}.{split_name}.tsv", *_official(kind, split_name))
                )
            )

        queries = Texts(of_split("queries"), TsvLayout("qid", "query"), in_memory=True)
        judgements = (
            None if split == "test" else Judgements(of_split("qrels"), queries, self.passages)
        )
        run = run_path(self.options.run, names[-1], lambda: of_split("run", "top1000", "top100"))
        return RankingFiles(
            queries, self.passages, Candidates(run, queries, self.passages), judgements
        )


def _declare(task: Task, names: dict[str, tuple[str, ...]]) -> Callable[[DataOptions], Source]:
    return lambda options: MsMarcoSource(task, options, names)


TASKS: dict[str, Callable[[DataOptions], Source]] = {
    "msmarco": _declare(Task("msmarco", "ranking", TEMPLATE, metrics=("mrr@10", "ndcg@10")), SPLITS)
} | {
    name: _declare(
        Task(
            name,
            "ranking",
            TEMPLATE,
            metrics=("ndcg@10", "mrr(rel=2)@10", "map(rel=2)"),
            head="msmarco",
        ),
        {"validation": (track,)},
    )
    for name, track in TRACKS.items()
}
