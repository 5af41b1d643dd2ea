"""Predictor: a checkpoint to predict, rank and embed with, without TensorFlow or training data.

predictor = Predictor.load("runs/sst2")
predictor.predict(["a fine film"], task="glue_sst2")
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from gemma_encoder import runtime
from gemma_encoder.evaluation.columns import prediction_columns
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model import sharding
from gemma_encoder.text_encoder import MAX_ROWS, TextEncoder
from gemma_encoder.weights import backbone, card, export, native

if TYPE_CHECKING:
    import pandas

BARE = Template("{text}")

Texts = Iterable[str | Mapping[str, str] | Sequence[str]]


class Predictor:
    """A fine-tuned encoder with its tasks, templates and tokenizer.

    Texts share rows inside, see `gemma_encoder.text_encoder.TextEncoder`, so that short ones do not
    pay for long ones; results come in the order of the texts.

    Args:
        bundle: everything but the parameters.
        parameters: nested dict, as `backbone.load_encoder` gives it.
        mesh: what rows are spread over; by default the first device.

    Attributes:
        tasks: what it can predict, by name.
    """

    def __init__(self, spec: native.InferenceSpec, parameters: dict, mesh: Mesh | None = None):
        self.spec, self.parameters = spec, parameters
        self.mesh = _one_device() if mesh is None else mesh
        self.tasks: dict[str, Task] = {task.name: task for task in spec.tasks}
        self._encoder = TextEncoder(spec, parameters, self.mesh)

    @property
    def bundle(self) -> native.InferenceSpec:
        """The former name of `spec`."""
        return self.spec

    @classmethod
    def load(cls, path: epath.PathLike, mesh: Sequence[int] | None = None) -> "Predictor":
        """Loads a workdir (its newest checkpoint), one of its checkpoints, or an exported folder.

        A sentence-transformers folder of another Gemma, such as EmbeddingGemma, is loaded too: it
        has no task, but it embeds.

        Programs that it compiles are stored in the user's cache folder, for later processes, unless
        JAX has a folder for them already; see `runtime.enable_compilation_cache`.

        Args:
            path: local or `gs://`.
            mesh: (data, fsdp, tensor) over all devices, -1 for all that are left: (-1, 1, 1) gives
                each device texts of its own, (1, -1, 1) cuts up a model that is too large for one.
                By default it works on the first device.

        Raises:
            InputError: there is no checkpoint, or the mesh does not fit the devices.
        """
        runtime.enable_compilation_cache()
        devices = _one_device() if mesh is None else sharding.make_mesh(mesh)
        return cls(*backbone.load_encoder(path, devices), devices)

    def __repr__(self) -> str:
        encoder, tasks = self.spec.encoder, ", ".join(self.tasks) or "no task"
        return (
            f"Predictor({tasks}; {encoder.attention}, {encoder.pooling.name} pooling, "
            f"step {self.spec.step})"
        )

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        return card.to_html(self.spec)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of probabilities, of the only task that has classes.

        Raises:
            InputError: no task has classes, or several do: ask `predictor.tasks[name].classes`.
        """
        tasks = [task for task in self.tasks.values() if task.classes]
        if len(tasks) != 1:
            if not tasks:
                raise InputError(f"no task has classes; there are {_names(self.tasks.values())}")
            raise InputError(f"ask predictor.tasks[name].classes of one of {_names(tasks)}")
        return tasks[0].classes

    def task(self, name: str | None = None, kind: str | None = None) -> Task:
        """A task by name, or the only one there is.

        Args:
            name: as in `tasks`; may be left out when the checkpoint has only one (of that kind).
            kind: what it must be, e.g. "ranking".

        Raises:
            InputError: there is no such task, or more than one.
        """
        tasks = [task for task in self.tasks.values() if kind in (None, task.kind.name)]
        if name is None:
            if not self.tasks:
                raise InputError("the checkpoint knows no task")
            if not tasks:
                raise InputError(
                    f"the checkpoint has no {kind} task; {_names(self.tasks.values())}"
                )
            if len(tasks) != 1:
                raise InputError(f"name a task: the checkpoint has {_names(tasks)}")
            return tasks[0]
        if name not in self.tasks:
            raise unknown(
                "task for this checkpoint, which was not trained on it:", name, self.tasks
            )
        task = self.tasks[name]
        if kind not in (None, task.kind.name):
            raise InputError(f"task {name!r} is a {task.kind} task; a {kind} task is needed here")
        return task

    def warm_up(self, *, max_rows: int = MAX_ROWS, progress: bool | None = None) -> int:
        """Compiles every program that texts may need, so that no later call waits for one.

        Args:
            max_rows: of batches to compile for; a service that scores one text at a time needs 1.
            progress: show a bar; by default on a terminal and in a notebook.

        Returns:
            The number of programs.
        """
        return self._encoder.warm_up(max_rows, _show(progress))

    def predict(
        self,
        texts: Texts,
        task: str | None = None,
        *,
        as_frame: bool = False,
        progress: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Predictions in the order of the texts.

        Args:
            texts: for a task of one field, strings; for any task, dictionaries of its fields, or
                tuples in their order; or a DataFrame with columns of these names.
            task: by name; may be left out when the checkpoint has only one.
            as_frame: give a DataFrame: the fields, "prediction", and for classes
                "probability_CLASS" of each; of a language model the prediction is the perplexity,
                with "nll" and "tokens" beside it.
            progress: show a bar on long work; by default on a terminal and in a notebook.
            names: what the texts are called in messages; by default "text 0", "text 1", …

        Returns:
            [N, C] class probabilities; [N] targets in the task's own units (regression) or scores
            (ranking); of a language model [N, 2], each text's summed negative log-likelihood in
            nats and its number of predicted tokens: exp(first / second) is its perplexity.

        Raises:
            InputError: no text, one that is empty, or fields that are not the task's.
        """
        chosen_task = self.task(task)
        fields = self.fields(chosen_task.name, texts, names)
        _, scores = self._encoder.run(chosen_task.template, fields, names, _show(progress))
        outputs = chosen_task.kind.postprocess(chosen_task, scores[chosen_task.head])
        if as_frame:
            return _frame(prediction_columns(chosen_task, fields, outputs))
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
        """(index, score) of each document, best first; equal scores keep the documents' order.

        Args:
            query: what is looked for.
            documents: the candidates.
            task: a ranking task; may be left out when the checkpoint has only one.
            top_k: give only so many, the best ones; by default all.
            as_frame: give a DataFrame with the columns "index", "score" and "document".
            progress: as in `predict`.
        """
        ranking = self.task(task, "ranking")
        if len(ranking.template.fields) != 2:
            raise InputError(
                f"task {ranking.name!r} has the fields {ranking.template.fields}, not a query and "
                "a document; use predict"
            )
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, or None for all, got {top_k}")
        documents = _listed(documents, "documents")
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, ranking.name, progress=progress)
        order = np.argsort(-scores, kind="stable")[:top_k]
        if as_frame:
            texts = [documents[index] for index in order]
            return _frame({"index": order, "score": scores[order], "document": texts})
        return [(int(index), float(scores[index])) for index in order]

    def embed(
        self,
        texts: Texts,
        task: str | None = None,
        *,
        as_frame: bool = False,
        progress: bool | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Pooled states, [N, D] float32, of bare texts, or of a task's template around them.

        Args:
            texts: as in `predict`; without a task, strings.
            task: whose template to use.
            as_frame: give a DataFrame with a column for each of the D numbers.
            progress: as in `predict`.
        """
        if task is None:
            template, fields = BARE, [{"text": text} for text in _listed(texts, "texts")]
        else:
            template, fields = self.task(task).template, self.fields(task, texts)
        pooled, _ = self._encoder.run(template, fields, None, _show(progress))
        if as_frame:
            return _frame({str(index): pooled[:, index] for index in range(pooled.shape[1])})
        return pooled

    def similarity(
        self,
        texts: Texts | np.ndarray,
        others: Texts | np.ndarray | None = None,
        task: str | None = None,
    ) -> np.ndarray:
        """Cosine similarities, [N, M] float32, of embeddings.

        Args:
            texts: N texts as `embed` takes them, or their embeddings [N, D].
            others: M of either; by default `texts` again.
            task: as in `embed`.
        """
        width = self.spec.encoder.pooled_dim

        def unit(items) -> np.ndarray:
            is_array = isinstance(items, np.ndarray) and np.issubdtype(items.dtype, np.floating)
            vectors = items if is_array else self.embed(items, task)
            if vectors.ndim != 2 or vectors.shape[1] != width:
                raise InputError(f"embeddings must be [N, {width}], got {list(vectors.shape)}")
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

        first = unit(texts)
        return first @ (first if others is None else unit(others)).T

    def fields(
        self, task: str | None, texts: Texts, names: Sequence[str] | None = None
    ) -> list[Mapping[str, str]]:
        """Each text as a dictionary of the task's fields; arguments as in `predict`."""
        task_name, fields = self.task(task).name, self.task(task).template.fields
        result = []
        for index, text in enumerate(_listed(texts, "texts")):
            if isinstance(text, Mapping):
                result.append(text)
                continue
            where = names[index] if names else f"text {index}"
            if not isinstance(text, str | Sequence):
                raise InputError(
                    f"{where}: expected a string, a dictionary of fields or a tuple of them, got "
                    f"{type(text).__name__}"
                )
            values = (text,) if isinstance(text, str) else tuple(text)
            if len(values) != len(fields):
                raise InputError(
                    f"{where}: task {task_name!r} needs {len(fields)} fields "
                    f"({', '.join(fields)}), got {len(values)}"
                )
            result.append(dict(zip(fields, values, strict=True)))
        return result


def export_huggingface(
    predictor: Predictor, folder: epath.PathLike, *, heads: bool = True
) -> epath.Path:
    """Writes a folder that Hugging Face transformers and sentence-transformers load; see `gemma_encoder.weights.export`.

    `SentenceTransformer(folder).encode(texts)` is then `predictor.embed(texts)`, `encode(texts, prompt_name=task)` is
    `predictor.embed(texts, task)` for a task whose template ends with its only field, and a single head's scores are what the
    model itself returns as "scores". A model card, README.md, says what it is.

    Args:
        predictor: a fine-tuned encoder.
        folder: a new one, local or `gs://`.
        heads: False leaves heads out, so that an encoder with several can be exported for its embeddings.

    Raises:
        InputError: the format cannot express the model (attention poolers, several heads, a reach that differs by side).
    """
    return export.export(predictor.spec, predictor.parameters, folder, heads)


def _names(tasks: Iterable[Task]) -> str:
    return ", ".join(f"{task.name} ({task.kind})" for task in tasks)


def _one_device() -> Mesh:
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


def _listed(texts, name: str) -> list:
    """The texts as a list; a DataFrame gives its rows."""
    if isinstance(texts, str | Mapping):
        raise InputError(f"{name} must be a list; put the single one in brackets")
    if hasattr(texts, "columns") and hasattr(texts, "to_dict"):
        return texts.to_dict("records")
    try:
        return list(texts)
    except TypeError:
        raise InputError(f"{name} must be a list, got {type(texts).__name__}") from None


def _frame(columns: Mapping[str, Any]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError:
        raise InputError(
            "as_frame needs pandas: pip install pandas, or leave it out and get numpy arrays"
        ) from None
    return pandas.DataFrame(dict(columns))


def _show(progress: bool | None) -> bool:
    """Progress bars are shown by default where somebody looks on: a terminal, or a notebook."""
    if progress is not None:
        return progress
    return "ipykernel" in sys.modules or sys.stderr.isatty()
