"""Evaluates a checkpoint by tasks of mteb, the extra "mteb".

    import mteb
    from gemma_encoder.retrieval.mteb_model import MtebModel

    mteb.evaluate(MtebModel("runs/retriever"), mteb.get_tasks(["SciFact"]))

Shapes: N texts, W width of the vectors.
"""

import importlib.util
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.embedding import Embedder, sparse_head, unit_vectors
from gemma_encoder.identity import identify
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval.build import role_of, selected_task
from gemma_encoder.retrieval.collection import Document, document_inputs
from gemma_encoder.weights.sentence_prompts import SIMILARITIES, similarity_name


class MtebModel:
    """A checkpoint as mteb's `EncoderProtocol`.

    Queries and documents are formatted by the task's templates of their roles, or by the prompts
    of a sentence-transformers folder; texts of other tasks are embedded as by `Predictor.embed`.

    Args:
        model: a path, as `Predictor.load` reads it, or a model.
        revision: name of this state of the model; by default its step and digest, so that mteb's
            cache does not return the results of another checkpoint.
        task: the task whose templates format texts; optional if only one has roles.
        width: use the first dimensions only.
        name: name in mteb's results; by default that of the path.

    Attributes:
        mteb_model_meta: mteb's description of the model.

    Raises:
        InputError: mteb is not installed, the task has sparse vectors, the vectors are compared by
            another similarity than cosine or dot, or they have fewer dimensions than `width`.
    """

    def __init__(
        self,
        model: str | pathlib.Path | Embedder,
        revision: str | None = None,
        *,
        task: str | None = None,
        width: int | None = None,
        name: str | None = None,
        device: str | None = None,
    ):
        del device  # of mteb's protocol; JAX has its own choice
        if importlib.util.find_spec("mteb") is None:
            raise InputError("mteb is not installed; pip install 'gemma_encoder[mteb]'")
        is_path = isinstance(model, str | pathlib.Path)
        self.model = Predictor.load(model) if is_path else model
        self._task = selected_task(self.model, task)
        self._similarity = similarity_name(self.model.spec)
        self._width = self._checked_width(width)
        self._check()
        name = name or (pathlib.Path(model).name if is_path else "model")
        self.mteb_model_meta = self._meta(f"gemma_encoder/{name}", revision)

    def _checked_width(self, width: int | None) -> int:
        full = self.model.spec.encoder.pooled_dim
        if width is not None and not 1 <= width <= full:
            raise InputError(f"width={width}: the model's vectors have {full} dimensions")
        return full if width is None else width

    def _check(self) -> None:
        """Raises InputError for vectors that mteb does not compare as training did."""
        if self._task and sparse_head(self.model.spec.encoder, self._task):
            raise InputError(
                f"task {self._task.name!r} has sparse vectors: evaluate them by gemma-encoder "
                "search --qrels, or export the model and give mteb the SparseEncoder"
            )
        if self._similarity not in SIMILARITIES:
            raise InputError(
                f"the folder's vectors are compared by similarity {self._similarity!r}; expected "
                f"{' or '.join(SIMILARITIES)}"
            )

    def _meta(self, name: str, revision: str | None) -> Any:
        """Returns mteb's description of the model."""
        from mteb.models import ModelMeta

        spec = self.model.spec
        state = identify(self.model, self._task)
        return ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision or state.replace(",", "").replace(" ", "-"),
                "max_tokens": spec.max_length,
                "embed_dim": self._width,
                "similarity_fn_name": self._similarity,
                "framework": ["JAX"],
                "use_instructions": bool(self._task or spec.prompts),
                "experiment_kwargs": {"width": self._width},
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        show_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeds texts.

        Args:
            inputs: batches with "text", of documents also "title" and "body".
            prompt_type: mteb's "query" or "document"; None for texts without a role.
            show_progress_bar: see `Predictor.predict`.
            task_metadata, hf_split, hf_subset, kwargs: of mteb's protocol; not used.

        Returns:
            [N, W] float32.
        """
        del task_metadata, hf_split, hf_subset, kwargs
        role = role_of(self.model, self._task, str(getattr(prompt_type, "value", prompt_type)))
        texts: Any = [text for batch in inputs for text in _texts(batch)]
        task = self._task
        if task is not None and task.role_templates and not role:
            task = None  # its templates are for queries and documents, not for these texts
        if role == "document":
            texts = document_inputs(task, role, texts)
        name = task.name if task else None
        return self._narrowed(self.model.embed(texts, name, role=role, progress=show_progress_bar))

    def _narrowed(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the first dimensions, of length 1 again if that is how they are compared."""
        if vectors.shape[1] == self._width:
            return vectors
        vectors = np.ascontiguousarray(vectors[:, : self._width])
        return unit_vectors(vectors) if self._similarity == "cosine" else vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns similarities of vectors, [N, W] and [M, W], as [N, M] float32."""
        first, second = self._comparable(embeddings1), self._comparable(embeddings2)
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns similarities of pairs of vectors, [N, W] each, as [N] float32."""
        first, second = self._comparable(embeddings1), self._comparable(embeddings2)
        return np.einsum("nw,nw->n", first, second)

    def _comparable(self, vectors: Any) -> np.ndarray:
        vectors = np.atleast_2d(np.asarray(vectors, np.float32))
        return unit_vectors(vectors) if self._similarity == "cosine" else vectors


def _texts(batch: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the texts of a batch; those of documents know their title and body."""
    if "title" not in batch:
        return list(batch["text"])
    parts = zip(batch["text"], batch["title"], batch["body"], strict=True)
    return [Document(text, title, body) for text, title, body in parts]
