"""Predictor: predicts, ranks and embeds with a checkpoint, without TensorFlow or training data.

predictor = Predictor.load("runs/sst2")
predictor.predict(["a fine film"], task="glue_sst2")
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from gemma_encoder import activity, runtime
from gemma_encoder.evaluation.certainty import Certainty
from gemma_encoder.evaluation.columns import (
    check_column_names,
    check_finite,
    prediction_columns,
    to_frame,
)
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.text_inputs import as_list, index_of, named_fields, with_field_names
from gemma_encoder.inputs.untrusted import printable
from gemma_encoder.model import sharding
from gemma_encoder.text_encoder import MAX_ROWS, TextEncoder
from gemma_encoder.weights import backbone, card, export, native

if TYPE_CHECKING:
    import pandas

BARE = Template("{text}")

TextInputs = Iterable[str | Mapping[str, str] | Sequence[str]]


class Predictor:
    """A fine-tuned encoder with its tasks, templates and tokenizer.

    Short texts share rows, see `gemma_encoder.text_encoder.TextEncoder`, so that they are not
    padded to the longest one. Results are in the order of the texts.

    Args:
        spec: the inference spec.
        parameters: nested dict, as returned by `backbone.load_encoder`.
        mesh: the mesh over which rows are sharded; by default the first device.

    Attributes:
        tasks: the tasks that it predicts, by name.
    """

    def __init__(self, spec: native.InferenceSpec, parameters: dict, mesh: Mesh | None = None):
        self.spec = spec
        self.parameters = parameters
        self.mesh = _one_device() if mesh is None else mesh
        self.tasks: dict[str, Task] = {task.name: task for task in spec.tasks}
        self._encoder = TextEncoder(spec, parameters, self.mesh)

    @property
    def bundle(self) -> native.InferenceSpec:
        """The former name of `spec`."""
        return self.spec

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        mesh: Sequence[int] | None = None,
        *,
        quantization: str | None = None,
        weights: str | None = None,
        compute_dtype: str | None = None,
    ) -> "Predictor":
        """Loads a workdir (its latest checkpoint), one of its checkpoints, or an exported folder.

        Sentence-transformers folders of other Gemma models, such as EmbeddingGemma, load too; they
        have no task, but can embed.

        Compiled programs are cached in the user's cache folder, unless JAX has a cache folder
        already; see `runtime.enable_compilation_cache`.

        Args:
            path: local or `gs://`.
            mesh: (data, fsdp, tensor) sizes over all devices, -1 for the remaining ones: (-1, 1, 1)
                splits the texts between devices, (1, -1, 1) shards a model that is too large for
                one device. By default the first device is used.
            quantization: "int8" for products in int8, on a CPU, of weights that take a quarter of
                the memory; by default as in training.
            weights: "bfloat16" halves the memory of the weights; by default as in training.
            compute_dtype: "bfloat16", "float32" or "auto", the faster; by default as in training.

        Raises:
            InputError: there is no checkpoint, or an option does not fit it or the devices.
        """
        runtime.enable_compilation_cache()
        devices = _one_device() if mesh is None else sharding.make_mesh(mesh)
        options = {"quantization": quantization, "weights": weights, "compute_dtype": compute_dtype}
        return cls(*backbone.load_encoder(path, devices, **options), devices)

    def __repr__(self) -> str:
        encoder = self.spec.encoder
        tasks = ", ".join(self.tasks) or "no task"
        return printable(
            f"Predictor({tasks}; {encoder.attention}, {encoder.pooling.name} pooling, "
            f"step {self.spec.step})",
            allowed="",
        )

    def _repr_html_(self) -> str:
        """Returns the card that a notebook shows."""
        return card.to_html(self.spec)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the only classification task, in the order of the probabilities.

        Raises:
            InputError: no task or several tasks have classes; use `predictor.tasks[name].classes`.
        """
        tasks = [task for task in self.tasks.values() if task.classes]
        if not tasks:
            raise InputError(f"no task has classes; there are {_describe(self.tasks.values())}")
        if len(tasks) != 1:
            raise InputError(
                f"several tasks have classes; use predictor.tasks[name].classes of one of "
                f"{_describe(tasks)}"
            )
        return tasks[0].classes

    def task(self, name: str | None = None, kind: str | None = None) -> Task:
        """Returns a task by name, or the only one.

        Args:
            name: a name in `tasks`; optional if the checkpoint has only one task (of that kind).
            kind: the kind that the task must have, e.g. "ranking".

        Raises:
            InputError: there is no such task, or `name` is needed to select one.
        """
        if name is None:
            return self._only_task(kind)
        if name not in self.tasks:
            raise unknown(
                "task for this checkpoint, which was not trained on it:", name, self.tasks
            )
        task = self.tasks[name]
        if kind not in (None, task.kind.name):
            raise InputError(f"task {name!r} is a {task.kind} task; a {kind} task is needed here")
        return task

    def _only_task(self, kind: str | None) -> Task:
        """Returns the only task (of a kind)."""
        if not self.tasks:
            raise InputError("the checkpoint has no task; use embed, or another checkpoint")
        tasks = [task for task in self.tasks.values() if kind in (None, task.kind.name)]
        if not tasks:
            raise InputError(
                f"the checkpoint has no {kind} task; there are {_describe(self.tasks.values())}"
            )
        if len(tasks) != 1:
            raise InputError(f"name a task: the checkpoint has {_describe(tasks)}")
        return tasks[0]

    def warm_up(self, *, max_rows: int = MAX_ROWS, progress: bool | None = None) -> int:
        """Compiles every program that texts may need, so that no later call has to.

        Args:
            max_rows: the largest batch to compile for; a service that scores one text at a time
                needs 1.
            progress: show a progress bar; by default on a terminal and in a notebook.

        Returns:
            The number of programs.
        """
        return self._encoder.warm_up(max_rows, _shows_progress(progress))

    def predict(
        self,
        texts: TextInputs,
        task: str | None = None,
        *,
        as_frame: bool = False,
        conformal: float | None = None,
        progress: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Predicts a task for texts.

        Args:
            texts: strings, for a task of one field; or dictionaries of the task's fields, or tuples
                in their order; or a DataFrame with columns of these names.
            task: name of the task; optional if the checkpoint has only one.
            as_frame: return a DataFrame with the texts' index: the fields, "prediction", and for
                classes a column "probability_CLASS" each. For a language model the prediction is
                the perplexity, with the columns "nll" and "tokens".
            conformal: with `as_frame`, add the columns of `Task.conformal` at this level, e.g. 0.9:
                "prediction_set", or "low" and "high"; the checkpoint must be calibrated.
            progress: show a progress bar on long work; by default on a terminal and in a notebook.
            names: names of the texts in messages; by default "text 0", "text 1", …

        Returns:
            In the order of the texts: [N, C] class probabilities; [N] targets in the task's units
            (regression) or scores (ranking); for a language model [N, 2], the summed negative
            log-likelihood in nats and the number of predicted tokens. The perplexity is
            exp(nll / tokens).

        Raises:
            InputError: there is no text, a text is empty, its fields are not the task's, or scores
                are NaN or infinite.
        """
        selected = self.task(task)
        certainty = Certainty(conformal)
        certainty.check(selected, as_frame)
        fields = self.fields(selected.name, texts, names)
        if as_frame:
            extra = dict.fromkeys(name for values in fields for name in values)
            message = "column {!r} of the texts".format
            check_column_names(selected, extra, "table", message, certainty)
        _, scores = self._encoder.run(selected.template, fields, names, _shows_progress(progress))
        check_finite(
            scores[selected.head], "scores", names.__getitem__ if names else "text {}".format
        )
        outputs = selected.kind.postprocess(selected, scores[selected.head])
        if as_frame:
            columns = prediction_columns(selected, fields, outputs, certainty)
            return to_frame(columns, index_of(texts))
        return outputs

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        task: str | None = None,
        *,
        top_k: int | None = None,
        as_frame: bool = False,
        progress: bool | None = None,
    ) -> "list[tuple[int, float]] | pandas.DataFrame":
        """Ranks documents for a query.

        Args:
            query: the query.
            documents: the candidates.
            task: a ranking task; optional if the checkpoint has only one.
            top_k: number of documents to return; by default all.
            as_frame: return a DataFrame with the columns "index", "score" and "document", and the
                index of the documents if they are a Series.
            progress: see `predict`.

        Returns:
            (index, score) of the documents, best first; equal scores keep the documents' order.

        Raises:
            InputError: there is no document, the task's fields are not a query and a document, or
                `top_k` is less than 1.
        """
        ranking = self.task(task, "ranking")
        if len(ranking.template.fields) != 2:
            raise InputError(
                f"task {ranking.name!r} has the fields {ranking.template.fields}, not a query and "
                "a document; use predict"
            )
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, or None for all, got {top_k}")
        labels = index_of(documents)
        documents = as_list(documents, "documents")
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, ranking.name, progress=progress)
        order = np.argsort(-scores, kind="stable")[:top_k]
        if as_frame:
            texts = [documents[index] for index in order]
            columns = {"index": order, "score": scores[order], "document": texts}
            return to_frame(columns, None if labels is None else labels[order])
        return [(int(index), float(scores[index])) for index in order]

    def embed(
        self,
        texts: TextInputs,
        task: str | None = None,
        *,
        as_frame: bool = False,
        progress: bool | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Embeds texts.

        Args:
            texts: strings; with a task, as in `predict`.
            task: formats texts with this task's template; by default they are embedded as they are.
            as_frame: return a DataFrame with a column per dimension, and the texts' index.
            progress: see `predict`.

        Returns:
            Pooled states, [N, D] float32, in the order of the texts.

        Raises:
            InputError: as in `predict`.
        """
        if task is None:
            template = BARE
            items = as_list(texts, "texts")
            if items and isinstance(items[0], Mapping):
                raise InputError(
                    "texts with fields, such as a DataFrame's, need task=…, whose template they "
                    'fill; or give the texts alone, e.g. frame["text"]'
                )
            fields = [{"text": text} for text in items]
        else:
            template = self.task(task).template
            fields = self.fields(task, texts)
        pooled, _ = self._encoder.run(template, fields, None, _shows_progress(progress))
        check_finite(pooled, "embeddings", "text {}".format)
        if as_frame:
            columns = {str(index): pooled[:, index] for index in range(pooled.shape[1])}
            return to_frame(columns, index_of(texts))
        return pooled

    def similarity(
        self,
        texts: TextInputs | np.ndarray,
        others: TextInputs | np.ndarray | None = None,
        task: str | None = None,
    ) -> np.ndarray:
        """Computes cosine similarities of embeddings.

        Args:
            texts: N texts, as in `embed`, or their embeddings [N, D].
            others: M texts or embeddings; by default `texts`.
            task: see `embed`.

        Returns:
            [N, M] float32.

        Raises:
            InputError: embeddings have another shape, or as in `embed`.
        """
        rows = self._unit_vectors(texts, task)
        columns = rows if others is None else self._unit_vectors(others, task)
        return rows @ columns.T

    def _unit_vectors(self, items: TextInputs | np.ndarray, task: str | None) -> np.ndarray:
        """Returns vectors of length 1, from embeddings or from texts."""
        is_array = isinstance(items, np.ndarray) and np.issubdtype(items.dtype, np.floating)
        vectors = items if is_array else self.embed(items, task)
        width = self.spec.encoder.pooled_dim
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise InputError(f"embeddings must be [N, {width}], got {list(vectors.shape)}")
        check_finite(vectors, "embeddings", "text {}".format)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def fields(
        self, task: str | None, texts: TextInputs, names: Sequence[str] | None = None
    ) -> list[Mapping[str, str]]:
        """Returns each text as a dictionary of the task's fields; arguments as in `predict`."""
        selected = self.task(task)
        result = []
        for index, text in enumerate(as_list(texts, "texts")):
            if isinstance(text, Mapping):
                result.append(with_field_names(selected, text))
            else:
                where = names[index] if names else f"text {index}"
                result.append(named_fields(selected, text, where))
        return result


def export_huggingface(
    predictor: Predictor, folder: epath.PathLike, *, heads: bool = True
) -> epath.Path:
    """Writes a folder for Hugging Face transformers and sentence-transformers, with a model card.

    `SentenceTransformer(folder).encode(texts)` equals `predictor.embed(texts)`. For a task whose
    template ends with its only field, `encode(texts, prompt_name=task)` equals
    `predictor.embed(texts, task)`. A single head's output is "scores". See `weights.export`.

    Args:
        predictor: a fine-tuned encoder.
        folder: a new folder, local or `gs://`, which is returned.
        heads: False leaves heads out, so that an encoder with several can be exported for its
            embeddings.

    Raises:
        InputError: the format cannot represent the model (attention poolers, several heads, a reach
            that differs by side).
    """
    return export.export(predictor.spec, predictor.parameters, folder, heads)


def _describe(tasks: Iterable[Task]) -> str:
    return ", ".join(f"{task.name} ({task.kind})" for task in tasks)


def _one_device() -> Mesh:
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


def _shows_progress(progress: bool | None) -> bool:
    """Returns True if progress bars are shown; by default on a terminal and in a notebook."""
    return activity.shows_bars() if progress is None else progress
