"""A checkpoint in your hands: predict, rank and embed, without TensorFlow and without the data it was trained on.

predictor = Predictor.load("runs/sst2")
predictor.predict(["a fine film"], task="glue_sst2")
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from jax.sharding import Mesh

from gemma_encoder import runtime
from gemma_encoder.evaluation.evaluator import said_of_text, to_outputs
from gemma_encoder.evaluation.forward import compile_forward, place_batch
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.packing import Packer, Segment, Unit
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Encoded, Template, encode
from gemma_encoder.model import sharding
from gemma_encoder.weights import backbone, card, export, native

if TYPE_CHECKING:
    import pandas

MAX_ROWS = 32  # of a batch, which has a power of two of them
SHORTEST_ROW = 128  # tokens; attention on accelerators works on blocks of so many
CHUNK = 4096  # texts that are tokenised at a time
PATIENCE = 2.0  # seconds of work before a progress bar appears
BARE = Template("{text}")

Texts = Iterable[str | Mapping[str, str] | Sequence[str]]


class Predictor:
    """A fine-tuned encoder with its tasks, templates and tokenizer.

    Texts share rows inside, so that short ones do not pay for long ones; results come in the order of the texts. Rows are as long as
    training's, or halved to a multiple of 128 tokens as often as the longest text at hand allows. However many texts there are, one program
    is compiled for each such length and each power of two up to 32 rows (fewer on several devices).

    Args:
        bundle: everything but the parameters.
        parameters: nested dict, as `backbone.load_encoder` gives it.
        mesh: what rows are spread over; by default the first device.

    Attributes:
        tasks: what it can predict, by name.
    """

    def __init__(self, bundle: native.Bundle, parameters: dict, mesh: Mesh | None = None):
        self.bundle, self.parameters = bundle, parameters
        self.mesh = _one_device() if mesh is None else mesh
        self.tasks: dict[str, Task] = {task.name: task for task in bundle.tasks}
        self._forward = compile_forward(bundle.encoder, self.mesh)

    @classmethod
    def load(cls, path: epath.PathLike, mesh: Sequence[int] | None = None) -> "Predictor":
        """From a workdir (its newest checkpoint), one of its checkpoints, or an exported folder.

        A sentence-transformers folder of another Gemma, such as EmbeddingGemma, is loaded too: it has no task, but it embeds.

        Args:
            path: local or `gs://`.
            mesh: (data, fsdp, tensor) over all devices, -1 for all that are left: (-1, 1, 1) gives each device texts of its own,
                (1, -1, 1) cuts up a model that is too large for one. By default it works on the first device.

        Raises:
            InputError: there is no checkpoint, or the mesh does not fit the devices.
        """
        runtime.enable_compilation_cache()
        chosen = _one_device() if mesh is None else sharding.make_mesh(mesh)
        return cls(*backbone.load_encoder(path, chosen), chosen)

    def __repr__(self) -> str:
        encoder = self.bundle.encoder
        return f"Predictor({', '.join(self.tasks) or 'no task'}; {encoder.attention}, {encoder.pooling.name} pooling, step {self.bundle.step})"

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return card.to_html(self.bundle)

    def task(self, name: str | None = None, kind: str | None = None) -> Task:
        """A task by name, or the only one there is.

        Args:
            name: as in `tasks`; may be left out when the checkpoint knows only one (of that kind).
            kind: what it must be, e.g. "ranking".

        Raises:
            InputError: there is no such task, or more than one.
        """
        known = [task for task in self.tasks.values() if kind in (None, task.kind)]
        if name is None:
            if len(known) != 1:
                knows = ", ".join(task.name for task in known) or " ".join(
                    filter(None, ("no", kind, "task"))
                )
                raise InputError(f"name a task: the checkpoint knows {knows}")
            return known[0]
        if name not in self.tasks:
            raise unknown(
                "task for this checkpoint, which was not trained on it:", name, self.tasks
            )
        if kind not in (None, self.tasks[name].kind):
            raise InputError(
                f"task {name!r} is a {self.tasks[name].kind} task; a {kind} task is needed here"
            )
        return self.tasks[name]

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
            texts: for a task of one field, strings; for any task, dictionaries of its fields, or tuples in their order; or a
                DataFrame with columns of these names.
            task: by name; may be left out when the checkpoint knows only one.
            as_frame: give a DataFrame: the fields, "prediction", and for classes "probability_CLASS" of each; of a language model the
                prediction is the perplexity, with "nll" and "tokens" beside it.
            progress: show a bar on long work; by default on a terminal and in a notebook.
            names: what the texts are called in messages; by default "text 0", "text 1", …

        Returns:
            [N, C] class probabilities; [N] targets in the task's own units (regression) or scores (ranking); of a language model [N, 2], each
            text's summed negative log-likelihood in nats and how many tokens it predicted, so that exp(first / second) is its perplexity.

        Raises:
            InputError: no text, one that is empty, or fields that are not the task's.
        """
        chosen = self.task(task)
        fields = self.fields(chosen.name, texts, names)
        outputs = to_outputs(
            chosen, self._run(chosen.template, fields, names, progress)[1][chosen.head]
        )
        return _frame(prediction_columns(chosen, fields, outputs)) if as_frame else outputs

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        task: str | None = None,
        *,
        as_frame: bool = False,
        progress: bool | None = None,
    ) -> "list[tuple[int, float]] | pandas.DataFrame":
        """(index, score) of each document, best first; equal scores keep the documents' order.

        Args:
            query: what is looked for.
            documents: the candidates.
            task: a ranking task; may be left out when the checkpoint knows only one.
            as_frame: give a DataFrame with the columns "index", "score" and "document".
            progress: as in `predict`.
        """
        chosen = self.task(task, "ranking")
        if len(chosen.template.fields) != 2:
            raise InputError(
                f"task {chosen.name!r} has the fields {chosen.template.fields}, not a query and a document; use predict"
            )
        documents = _listed(documents, "documents")
        scores = self.predict(
            [(query, document) for document in documents], chosen.name, progress=progress
        )
        order = np.argsort(-scores, kind="stable")
        if as_frame:
            return _frame(
                {"index": order, "score": scores[order], "document": [documents[i] for i in order]}
            )
        return [(int(i), float(scores[i])) for i in order]

    def embed(
        self,
        texts: Texts,
        task: str | None = None,
        *,
        as_frame: bool = False,
        progress: bool | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Pooled states, [N, D] float32, of the bare texts, or of a task's template around them when a task is named.

        Args:
            texts: as in `predict`; without a task, strings.
            task: whose template to use.
            as_frame: give a DataFrame with a column for each of the D numbers.
            progress: as in `predict`.
        """
        template = BARE if task is None else self.task(task).template
        fields = (
            [{"text": text} for text in _listed(texts, "texts")]
            if task is None
            else self.fields(task, texts)
        )
        pooled = self._run(template, fields, None, progress)[0]
        return (
            _frame({str(i): pooled[:, i] for i in range(pooled.shape[1])}) if as_frame else pooled
        )

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

        def unit(items) -> np.ndarray:
            vectors = (
                items
                if isinstance(items, np.ndarray) and items.dtype.kind == "f"
                else self.embed(items, task)
            )
            if vectors.ndim != 2 or vectors.shape[1] != self.bundle.encoder.pooled_dim:
                raise InputError(
                    f"embeddings must be [N, {self.bundle.encoder.pooled_dim}], got {list(vectors.shape)}"
                )
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

        first = unit(texts)
        return first @ (first if others is None else unit(others)).T

    def fields(
        self, task: str | None, texts: Texts, names: Sequence[str] | None = None
    ) -> list[Mapping[str, str]]:
        """Each text as a dictionary of the task's fields; arguments as in `predict`."""
        chosen = self.task(task)
        fields = chosen.template.fields
        result = []
        for number, text in enumerate(_listed(texts, "texts")):
            if isinstance(text, Mapping):
                result.append(text)
                continue
            where = names[number] if names else f"text {number}"
            if not isinstance(text, str | Sequence):
                raise InputError(
                    f"{where}: expected a string, a dictionary of fields or a tuple of them, got {type(text).__name__}"
                )
            values = (text,) if isinstance(text, str) else tuple(text)
            if len(values) != len(fields):
                raise InputError(
                    f"{where}: task {chosen.name!r} needs {len(fields)} fields ({', '.join(fields)}), got {len(values)}"
                )
            result.append(dict(zip(fields, values, strict=True)))
        return result

    def _encode(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool,
    ) -> list[Encoded]:
        """The tokens of every text; all are checked before the model is asked for the first."""
        if not len(texts):
            raise InputError("there is no text to encode; give at least one")
        names = names or [f"text {i}" for i in range(len(texts))]
        encoded: list[Encoded] = []
        with _bar("tokenising", len(texts), progress) as bar:
            for start in range(0, len(texts), CHUNK):
                part = slice(start, start + CHUNK)
                encoded += encode(
                    self.bundle.tokenizer,
                    template,
                    texts[part],
                    self.bundle.max_length,
                    names[part],
                )
                bar.update(len(encoded) - start)
        cut = sum(text.cut > 0 for text in encoded)
        if cut:
            logging.warning(
                "%d of %d texts exceed max_length=%d tokens and were cut",
                cut,
                len(texts),
                self.bundle.max_length,
            )
        return encoded

    def _shape(self, lengths: Sequence[int]) -> BatchShape:
        """Of the batches for texts of so many tokens: rows that are not longer than needed, and not more than fill."""
        length, rows = self.bundle.row_length, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        longest, tokens = max(lengths), sum(lengths)
        while length % (2 * SHORTEST_ROW) == 0 and length // 2 >= longest:
            length //= 2
        while rows < MAX_ROWS and rows * length < tokens:
            rows *= 2
        return BatchShape(rows, length, max(length // 8, 1))

    def _run(
        self,
        template: Template,
        texts: Sequence[Mapping[str, str]],
        names: Sequence[str] | None,
        progress: bool | None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pooled states [N, D] and scores [N, C] of each head, in the order of the texts, which share rows."""
        bundle, progress = self.bundle, _has_viewer() if progress is None else progress
        encoded = self._encode(template, texts, names, progress)
        packer = Packer(self._shape([len(text.tokens) for text in encoded]), bundle.padding)
        pooled = np.empty((len(texts), bundle.encoder.pooled_dim), np.float32)
        scores = {
            name: np.empty((len(texts), width), np.float32)
            for name, width in bundle.encoder.heads.items()
        }
        waiting = iter(enumerate(encoded))
        more, under_way = True, None
        with _bar("encoding", len(texts), progress) as bar:
            while more or len(packer) or under_way:
                while more and not packer.ready:
                    number, text = next(waiting, (None, None))
                    more = number is not None
                    if more:
                        packer.add(Unit((Segment(text.tokens, 0, 0.0, number),)))
                before, under_way = under_way, None
                if len(
                    packer
                ):  # one batch is worked on while the one before it is fetched and the one after it is packed
                    batch = packer.emit()
                    under_way = batch, self._forward(self.parameters, place_batch(batch, self.mesh))
                if before is None:
                    continue
                batch, said = before[0], jax.device_get(before[1])
                real = batch.weight > 0
                ids = batch.example_id[real]
                pooled[ids] = said.pooled[real]
                for name, head in said.scores.items():
                    scores[name][ids] = head[real]
                bar.update(len(ids))
        return pooled, scores


def prediction_columns(
    task: Task, fields: Sequence[Mapping[str, Any]], outputs: np.ndarray
) -> dict[str, Any]:
    """Predictions as columns: those of the given fields, "prediction", and what goes with it: see `Predictor.predict`.

    Args:
        task: what was predicted.
        fields: of each text.
        outputs: as `Predictor.predict` gives them.
    """
    columns: dict[str, Any] = {
        name: [values[name] for values in fields] for name in (fields[0] if fields else ())
    }
    if task.kind == "language_model":
        said = [said_of_text(output) for output in outputs]
        return columns | {name: np.array([one[name] for one in said]) for name in said[0]}
    if task.kind != "classification":
        return columns | {"prediction": outputs}
    probabilities = {
        f"probability_{name}": outputs[:, number] for number, name in enumerate(task.classes)
    }
    return (
        columns
        | {"prediction": [task.classes[number] for number in outputs.argmax(axis=1)]}
        | probabilities
    )


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
    return export.export(predictor.bundle, predictor.parameters, folder, heads)


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


def _has_viewer() -> bool:
    """Whether somebody looks on: a terminal, or a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _bar(what: str, total: int, shown: bool) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=what, total=total, unit=" texts", disable=not shown, delay=PATIENCE, dynamic_ncols=True
    )
