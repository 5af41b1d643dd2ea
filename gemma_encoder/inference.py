"""Predictor: predicts, ranks and embeds with a checkpoint, without TensorFlow or training data.

predictor = Predictor.load("runs/sst2")
predictor.predict(["a fine film"], task="glue_sst2")
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from gemma_encoder import runtime
from gemma_encoder.embedding import Embedder, TextInputs, describe_tasks, one_device, shows_progress
from gemma_encoder.evaluation.certainty import Certainty
from gemma_encoder.evaluation.columns import (
    check_column_names,
    check_finite,
    prediction_columns,
    to_frame,
)
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.text_inputs import as_list, index_of
from gemma_encoder.inputs.untrusted import printable
from gemma_encoder.model import sharding
from gemma_encoder.text_encoder import MAX_ROWS
from gemma_encoder.weights import backbone, card, export, native

if TYPE_CHECKING:
    import pandas


class Predictor(Embedder):
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
        devices = one_device() if mesh is None else sharding.make_mesh(mesh)
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
            raise InputError(
                f"no task has classes; there are {describe_tasks(self.tasks.values())}"
            )
        if len(tasks) != 1:
            raise InputError(
                f"several tasks have classes; use predictor.tasks[name].classes of one of "
                f"{describe_tasks(tasks)}"
            )
        return tasks[0].classes

    def warm_up(self, *, max_rows: int = MAX_ROWS, progress: bool | None = None) -> int:
        """Compiles every program that texts may need, so that no later call has to.

        Args:
            max_rows: the largest batch to compile for; a service that scores one text at a time
                needs 1.
            progress: show a progress bar; by default on a terminal and in a notebook.

        Returns:
            The number of programs.
        """
        return self._encoder.warm_up(max_rows, shows_progress(progress))

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
        refuse_vectors(selected)
        certainty = Certainty(conformal)
        certainty.check(selected, as_frame)
        fields = self.fields(selected.name, texts, names)
        if as_frame:
            extra = dict.fromkeys(name for values in fields for name in values)
            message = "column {!r} of the texts".format
            check_column_names(selected, extra, "table", message, certainty)
        _, scores = self._encoder.run(selected.template, fields, names, shows_progress(progress))
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


def refuse_vectors(task: Task) -> None:
    """Raises InputError for a task whose outputs are vectors: a text's role must be named."""
    if task.kind.embeds:
        raise InputError(
            f"task {task.name!r} is for searching: index documents with gemma-encoder index, or "
            'use Predictor.embed(texts, role="query") or role="document"'
        )


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
