"""Index: a searchable collection of documents.

index = Index.build("runs/retriever", "collection.tsv", "INDEX")
index = Index.load("INDEX")
index.search(["a query"], k=10)
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_encoder import runtime
from gemma_encoder.data import cache
from gemma_encoder.data.files.corpus import Ids
from gemma_encoder.embedding import Embedder, SparseVectors
from gemma_encoder.identity import identify
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.text_inputs import as_list
from gemma_encoder.inputs.untrusted import printable
from gemma_encoder.model import sharding
from gemma_encoder.progress import progress as progress_bar
from gemma_encoder.retrieval import build
from gemma_encoder.retrieval.approximate import Approximate
from gemma_encoder.retrieval.bm25 import Bm25
from gemma_encoder.retrieval.dense import narrowed, search_dense
from gemma_encoder.retrieval.description import IndexDescription, read_index_description
from gemma_encoder.retrieval.fusion import CONSTANT, fuse_rankings
from gemma_encoder.retrieval.sparse import search_sparse
from gemma_encoder.retrieval.top import Best
from gemma_encoder.weights import backbone, doors

Results = list[list[tuple[str, float]]]  # per query (id, score), best first


class Index:
    """An index of a collection, made by `build` and opened by `load`.

    Attributes:
        folder: the folder.
        description: how it was made.
        ids: ids of the documents.

    Args:
        folder: a folder that `build` wrote.
        model: the model, or its path; by default the path in the index. It is loaded by the first
            search for texts.
    """

    def __init__(self, folder: os.PathLike | str, model: Embedder | os.PathLike | str | None):
        self.folder = pathlib.Path(folder).expanduser()
        self.description: IndexDescription = read_index_description(self.folder)
        with doors.opened(self.folder, ["index.json", build.IDS]):
            self.ids = Ids(cache.load_arrays(self.folder / build.IDS))
            if len(self.ids) != self.description.count:
                raise InputError(
                    f"{self.folder} has {len(self.ids)} ids, but {self.description.count} "
                    "documents; index the collection again"
                )
        self._model = model
        self._is_checked = False  # the model
        self._is_read = False  # the blocks, once as a whole
        self._searcher: Any = None

    @classmethod
    def build(
        cls,
        model: Embedder | os.PathLike | str | None,
        collection: os.PathLike | str,
        output: os.PathLike | str,
        **options: Any,
    ) -> "Index":
        """Indexes a collection, see `gemma_encoder.retrieval.build`; a killed call is continued.

        Args:
            model: a predictor or the path of a model; None for BM25.
            collection: a .tsv file of pid and passage, or BEIR's corpus.jsonl; also compressed.
            output: a new folder.
            **options: fields of `IndexOptions`: task, kind, width, precision, approximate, k1, b,
                block.

        Raises:
            InputError: as in `build_index`.
        """
        settings = build.IndexOptions(**options)
        path = ""
        if settings.kind == "bm25":
            model = None
        elif model is not None and not isinstance(model, Embedder):
            path = os.fspath(model)
            model = load_model(path)
        paths = (pathlib.Path(collection).expanduser(), pathlib.Path(output).expanduser())
        build.build_index(model, _absolute(path), *paths, settings)
        return cls(output, model)

    @classmethod
    def load(
        cls, folder: os.PathLike | str, model: Embedder | os.PathLike | str | None = None
    ) -> "Index":
        """Opens an index; the model is loaded by the first search for texts.

        Args:
            folder: a folder that `build` wrote.
            model: the model that encodes queries, or its path; by default the path in the index.

        Raises:
            InputError: the folder is no index, or damaged.
        """
        return cls(folder, model)

    def __len__(self) -> int:
        return self.description.count

    def __repr__(self) -> str:
        about = self.description
        return printable(f"Index({about.kind}; {about.count} documents of {about.collection})")

    def search(
        self,
        queries: Sequence[str] | np.ndarray,
        k: int = 10,
        *,
        names: Sequence[str] | None = None,
        progress: bool | None = False,
    ) -> Results:
        """Searches for queries.

        Args:
            queries: texts, or for a dense index their vectors, [Q, W] or as wide as the model's.
            k: number of results.
            names: names of the queries in messages; by default "text 0", "text 1", …
            progress: show a progress bar; None for one on a terminal and in a notebook.

        Returns:
            Per query (id, score), best first; equal scores in the order of the collection. Sparse
            and BM25 searches return only documents with a token in common.

        Raises:
            InputError: a query is empty, k is less than 1, or the model is not that of the index.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        k = min(k, len(self))
        vectors = self._encode(queries, names, progress)
        # Blocks are read once as a whole before they are trusted.
        parts = [] if self._is_read else [""]
        with doors.opened(self.folder, parts):
            best = self._search(vectors, k, progress)
        self._is_read = True
        return [
            list(
                zip(
                    self.ids.texts(indices[indices >= 0]),
                    scores[indices >= 0].tolist(),
                    strict=True,
                )
            )
            for indices, scores in zip(*best, strict=True)
        ]

    def _encode(
        self, queries: Any, names: Sequence[str] | None, progress: bool | None
    ) -> np.ndarray | SparseVectors | list[str]:
        """Returns queries as the search needs them."""
        about = self.description
        if isinstance(queries, np.ndarray) and np.issubdtype(queries.dtype, np.floating):
            if about.kind != "dense":
                raise InputError(f"a {about.kind} index searches for texts, not for vectors")
            return self._narrowed(queries)
        if about.kind == "bm25":
            texts = as_list(queries, "queries")
            for index, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    where = names[index] if names else f"text {index}"
                    raise InputError(f"{where}: the text is empty, or no text")
            return texts
        predictor = self.model
        task = build.selected_task(predictor, about.task)
        role = build.role_of(predictor, task, "query")
        options = {"role": role, "names": names, "progress": progress}
        if about.kind == "sparse":
            return SparseVectors(*predictor.embed_sparse(queries, about.task or None, **options))
        return self._narrowed(predictor.embed(queries, about.task or None, **options))

    def _narrowed(self, vectors: np.ndarray) -> np.ndarray:
        """Returns vectors of the width of the index."""
        about = self.description
        if vectors.ndim != 2 or vectors.shape[1] not in (about.width, about.full_width):
            raise InputError(
                f"{self.folder} has vectors of width {about.width} (of {about.full_width}), the "
                f"queries' shape is {list(vectors.shape)}; use the model of the index"
            )
        return narrowed(vectors.astype(np.float32), about)

    def _search(self, queries: Any, k: int, progress: bool | None) -> Best:
        """Returns the indices and scores of the best documents."""
        about = self.description
        if about.kind == "bm25":
            self._searcher = self._searcher or Bm25(self.folder)
            with progress_bar("searching", 0, "queries", len(queries), progress) as advance:
                return self._searcher.search(queries, k, advance)
        if about.approximate:
            self._searcher = self._searcher or Approximate(self.folder, about)
            return self._searcher.search(queries, k)
        with progress_bar("searching", 0, "blocks", about.blocks, progress) as advance:
            if about.kind == "sparse":
                return search_sparse(self.folder, about, queries, k, advance)
            return search_dense(self.folder, about, queries, k, self._mesh(), advance)

    def _mesh(self) -> Mesh:
        """Returns the mesh of the model, else of all devices of this process."""
        return self._model.mesh if isinstance(self._model, Embedder) else local_mesh()

    @property
    def model(self) -> Embedder:
        """The model that encodes queries, which is loaded on first use.

        Raises:
            InputError: there is none, or it is not the one that encoded the documents.
        """
        about = self.description
        source = about.model if self._model is None else self._model
        if not source and not isinstance(source, Embedder):
            raise InputError(
                f"{self.folder} does not name its model, which was given in memory; load the index "
                "with the model"
            )
        if not isinstance(source, Embedder):
            source = load_model(source)
        if not self._is_checked:
            self._check_model(source)
        self._model = source
        self._is_checked = True
        return source

    def _check_model(self, predictor: Embedder) -> None:
        """Raises InputError for a model that has not encoded the documents."""
        about = self.description
        encoder = predictor.spec.encoder
        width = encoder.pooled_dim if about.kind == "dense" else encoder.transformer.vocab_size
        advice = "index the collection again, or name the model of the index"
        if width != about.full_width:
            raise InputError(
                f"{self.folder} was made from vectors of width {about.full_width}, the model's "
                f"have {width}; {advice}"
            )
        if about.task and about.task not in predictor.tasks:
            raise InputError(
                f"{self.folder} was made with the task {about.task!r}, which the model does not "
                f"have; {advice}"
            )
        digest = identify(predictor, build.selected_task(predictor, about.task))
        if digest != about.digest:
            raise InputError(
                f"{self.folder} was made by another model ({about.digest}) than this one "
                f"({digest}); {advice}"
            )

    def share_model(self, other: "Index") -> None:
        """Takes the model of another index, if it names the same and has none of its own."""
        path = self.description.model
        if path and path == other.description.model and self._model is None:
            self._model = other.model

    @staticmethod
    def fuse(
        indexes: Sequence["Index"],
        queries: Sequence[str],
        k: int = 10,
        *,
        constant: float = CONSTANT,
        depth: int = 0,
        names: Sequence[str] | None = None,
        progress: bool | None = False,
    ) -> Results:
        """Searches several indexes of one collection and fuses the results by their ranks.

        Args:
            indexes: the indexes.
            queries: the texts.
            k: number of results.
            constant: of reciprocal rank fusion, see `fuse_rankings`.
            depth: results of each index that are fused; by default k.
            names, progress: see `search`.

        Raises:
            InputError: the indexes are of different collections, or as in `search`.
        """
        check_same_collection(indexes)
        for index in indexes[1:]:
            for other in indexes:
                index.share_model(other)
        options = {"names": names, "progress": progress}
        rankings = [index.search(queries, depth or k, **options) for index in indexes]
        return fuse_rankings(rankings, k, constant)


def check_same_collection(indexes: Sequence[Index]) -> None:
    """Raises InputError if indexes are of different collections."""
    first = indexes[0].description
    for index in indexes[1:]:
        if index.description.fingerprint != first.fingerprint:
            raise InputError(
                f"{indexes[0].folder} is of {first.collection}, {index.folder} of another "
                f"{index.description.collection}; fuse indexes of one collection"
            )


def local_mesh() -> Mesh:
    """Returns the mesh of all devices of this process."""
    return sharding.make_mesh((-1, 1, 1), jax.local_devices())


def load_model(path: os.PathLike | str) -> Predictor:
    """Loads a model onto all devices of this process."""
    runtime.enable_compilation_cache()
    mesh = local_mesh()
    return Predictor(*backbone.load_encoder(path, mesh), mesh)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path and "://" not in path else path
