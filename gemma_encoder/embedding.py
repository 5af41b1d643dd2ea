"""Embedding: vectors of texts, and how texts of a role are formatted.

Shapes: N texts, E width of a vector, K weights of a sparse vector.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_encoder import activity
from gemma_encoder.evaluation.columns import check_finite, to_frame
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import ROLES, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.text_inputs import (
    as_list,
    index_of,
    named_fields,
    with_field_names,
)
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.text_encoder import TextEncoder
from gemma_encoder.weights.native import InferenceSpec
from gemma_encoder.weights.sentence_prompts import SIMILARITIES, similarity_name, stored_prompt

if TYPE_CHECKING:
    import pandas

TextInputs = Iterable[str | Mapping[str, str] | Sequence[str]]

BARE = Template("{text}")
SPARSE = "sparse"  # the kind of head whose scores are K weights, then K token ids


def task_with_roles(tasks: Iterable[Task], role: str = "") -> Task | None:
    """Returns the only task with templates for roles, or the only such retrieval task.

    Args:
        tasks: the tasks of a checkpoint.
        role: the role that needs it, for the message.

    Returns:
        The task; None if no task has roles.

    Raises:
        InputError: several tasks have roles.
    """
    candidates = [task for task in tasks if task.role_templates]
    retrieval = [task for task in candidates if task.kind.embeds]
    candidates = retrieval if len(retrieval) == 1 else candidates
    if len(candidates) > 1:
        names = ", ".join(task.name for task in candidates)
        reason = f"several tasks have templates for role {role!r}" if role else "several have roles"
        raise InputError(f"name a task: {reason} ({names})")
    return candidates[0] if candidates else None


def check_role(role: str, task: Task | None) -> None:
    """Raises InputError if a task has no template for a role."""
    if role not in ROLES[1:]:
        raise unknown("role", role, ROLES[1:])
    if task is None:
        raise InputError(
            f"role {role!r} needs a task with templates for queries and documents, and the "
            "checkpoint has none; leave the role out, or give prompt=…"
        )
    if role not in dict(task.role_templates):
        raise InputError(
            f"task {task.name!r} has no template for role {role!r}; leave the role out to use the "
            "template that all its texts share"
        )


def with_prompt(template: Template, prompt: str) -> Template:
    """Returns a template with a literal text before it."""
    literal = prompt.replace("{", "{{").replace("}", "}}")
    return Template(literal + template.text, template.truncation, template.protected_share)


def as_fields(
    task: Task, texts: Any, names: Sequence[str] | None = None, role: str = ""
) -> list[Mapping[str, str]]:
    """Returns each text as a dictionary of the fields of the task's template for a role.

    Args:
        task: the task.
        texts: strings, dictionaries or tuples, or a DataFrame.
        names: names of the texts in messages; by default "text 0", "text 1", …
        role: the role of the texts.
    """
    result = []
    for index, text in enumerate(as_list(texts, "texts")):
        if isinstance(text, Mapping):
            result.append(with_field_names(task, text, role))
        else:
            where = names[index] if names else f"text {index}"
            result.append(named_fields(task, text, where, role))
    return result


def bare_fields(texts: Any) -> list[dict[str, Any]]:
    """Returns texts that no task formats as fields of `BARE`."""
    items = as_list(texts, "texts")
    if items and isinstance(items[0], Mapping):
        raise InputError(
            "texts with fields, such as a DataFrame's, need task=…, whose template they "
            'fill; or give the texts alone, e.g. frame["text"]'
        )
    return [{"text": text} for text in items]


@dataclasses.dataclass(frozen=True)
class SparseVectors:
    """Sparse vectors as the largest weights of each text, largest first.

    Attributes:
        ids: token ids, [N, K] int32.
        weights: [N, K] float32; 0 where a text has fewer than K tokens with a weight.
    """

    ids: np.ndarray
    weights: np.ndarray

    @classmethod
    def of_scores(cls, scores: np.ndarray) -> "SparseVectors":
        """Returns the vectors from the scores of a sparse head, [N, 2 K]."""
        weights, ids = np.split(scores, 2, axis=1)
        return cls(ids.astype(np.int32), np.ascontiguousarray(weights, np.float32))


def sparse_head(encoder: EncoderConfig, task: Task | None) -> str | None:
    """Returns the sparse head of a task, without a task the only one; None if there is none."""
    heads = [name for name, head in encoder.heads.items() if head.kind == SPARSE]
    if task is not None:
        return task.head if task.head in heads else None
    return heads[0] if len(heads) == 1 else None


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors scaled to length 1; those of length 0 stay as they are."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Embedder:
    """An encoder with its tasks, templates and tokenizer, as far as vectors need them.

    Args:
        spec: the inference spec.
        parameters: nested dict, as returned by `backbone.load_encoder`.
        mesh: the mesh over which rows are sharded; by default the first device.

    Attributes:
        tasks: the tasks by name.
    """

    def __init__(self, spec: InferenceSpec, parameters: dict, mesh: Mesh | None = None):
        self.spec = spec
        self.parameters = parameters
        self.mesh = one_device() if mesh is None else mesh
        self.tasks: dict[str, Task] = {task.name: task for task in spec.tasks}
        self._encoder = TextEncoder(spec, parameters, self.mesh)

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
                f"the checkpoint has no {kind} task; there are "
                f"{describe_tasks(self.tasks.values())}"
            )
        if len(tasks) != 1:
            raise InputError(f"name a task: the checkpoint has {describe_tasks(tasks)}")
        return tasks[0]

    def embed(
        self,
        texts: TextInputs,
        task: str | None = None,
        *,
        role: str = "",
        prompt: str | None = None,
        prompt_name: str | None = None,
        as_frame: bool = False,
        progress: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> "np.ndarray | pandas.DataFrame":
        """Embeds texts.

        Args:
            texts: strings; with a task, as in `predict`.
            task: formats texts with this task's template; by default they are embedded as they are.
            role: "query" or "document", for the task's template of that role; the task is optional
                if only one has roles.
            prompt: a literal text to put before each text, or before the task's template.
            prompt_name: a prompt by its name in a sentence-transformers folder; by default the
                role's, where no task has roles, else the folder's default prompt.
            as_frame: return a DataFrame with a column per dimension, and the texts' index.
            progress, names: see `predict`.

        Returns:
            Pooled states, [N, D] float32, in the order of the texts.

        Raises:
            InputError: as in `predict`; or the role is unknown, or no task has a template for it.
        """
        if prompt_name is not None and (task or role or prompt is not None):
            raise InputError("prompt_name stands alone: leave task, role and prompt out")
        if prompt is None and task is None:
            role, prompt = stored_prompt(self.spec, role, prompt_name)
        _, pooled, _ = self._run_role(texts, task, role, prompt, progress, names)
        check_finite(pooled, "embeddings", names.__getitem__ if names else "text {}".format)
        if as_frame:
            columns = {str(index): pooled[:, index] for index in range(pooled.shape[1])}
            return to_frame(columns, index_of(texts))
        return pooled

    def embed_sparse(
        self,
        texts: TextInputs,
        task: str | None = None,
        *,
        role: str = "",
        prompt: str | None = None,
        progress: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds texts as weights of tokens, by a head of kind "sparse".

        Args:
            texts, task, role, prompt, progress, names: see `embed`.

        Returns:
            Token ids [N, K] int32 and their weights [N, K] float32, the largest first; weights are
            0 where a text has fewer than K tokens with a weight.

        Raises:
            InputError: as in `embed`, or the task has no sparse head.
        """
        selected, _, scores = self._run_role(texts, task, role, prompt, progress, names, True)
        vectors = SparseVectors.of_scores(scores[sparse_head(self.spec.encoder, selected)])
        where = names.__getitem__ if names else "text {}".format
        check_finite(vectors.weights, "sparse weights", where)
        return vectors.ids, vectors.weights

    def words(
        self, texts: TextInputs, task: str | None = None, *, role: str = "", count: int = 10
    ) -> list[list[tuple[str, float]]]:
        """Returns the tokens of the largest weights of each text, by a head of kind "sparse".

        Args:
            texts, task, role: see `embed`.
            count: number of tokens, fewer for texts with fewer weights.

        Returns:
            Per text (token, weight), the largest first; a blank begins a word.
        """
        ids, weights = self.embed_sparse(texts, task, role=role)
        return [
            [
                (piece, float(weight))
                for piece, weight in zip(self.spec.tokenizer.pieces(row), of_row, strict=True)
                if weight > 0
            ]
            for row, of_row in zip(ids[:, :count].tolist(), weights[:, :count], strict=True)
        ]

    @contextlib.contextmanager
    def reporting_truncated_once(self, total: int) -> Iterator[None]:
        """Reports truncated texts at the end of the context, rather than after each call.

        Args:
            total: number of texts that the context embeds.
        """
        self._encoder.truncated = 0
        try:
            yield
            self._encoder.report_truncated(self._encoder.truncated, total)
        finally:
            self._encoder.truncated = None

    def _run_role(
        self,
        texts: TextInputs,
        task: str | None,
        role: str,
        prompt: str | None,
        progress: bool | None,
        names: Sequence[str] | None,
        is_sparse: bool = False,
    ) -> tuple[Task | None, np.ndarray, dict[str, np.ndarray]]:
        """Returns the task that formats the texts, their pooled states, and scores by head."""
        selected = None if task is None else self.task(task)
        if role:
            selected = selected or task_with_roles(self.tasks.values(), role)
            check_role(role, selected)
        if is_sparse and sparse_head(self.spec.encoder, selected) is None:
            subject = "the checkpoint" if selected is None else f"task {selected.name!r}"
            raise InputError(f"{subject} has no head of kind 'sparse'; use embed")
        if selected is None:
            template, fields = BARE, bare_fields(texts)
        else:
            template = selected.template_for(role)
            fields = as_fields(selected, texts, names, role)
        if prompt:
            template = with_prompt(template, prompt)
        return selected, *self._encoder.run(template, fields, names, shows_progress(progress))

    def similarity(
        self,
        texts: TextInputs | np.ndarray,
        others: TextInputs | np.ndarray | None = None,
        task: str | None = None,
    ) -> np.ndarray:
        """Computes similarities of embeddings: cosines, or the products that a retriever compares.

        Args:
            texts: N texts, as in `embed`, or their embeddings [N, D].
            others: M texts or embeddings; by default `texts`.
            task: see `embed`.

        Returns:
            [N, M] float32.

        Raises:
            InputError: embeddings have another shape, or as in `embed`; or a sentence-transformers
                folder states another similarity.
        """
        rows = self._comparable(texts, task)
        columns = rows if others is None else self._comparable(others, task)
        return rows @ columns.T

    def _comparable(self, items: TextInputs | np.ndarray, task: str | None) -> np.ndarray:
        """Returns vectors whose products are the similarities, from embeddings or from texts."""
        similarity = similarity_name(self.spec)
        if similarity not in SIMILARITIES:
            raise InputError(
                f"the folder's vectors are compared by similarity {similarity!r}; expected "
                f"{' or '.join(SIMILARITIES)}, compute it from the vectors of embed"
            )
        is_array = isinstance(items, np.ndarray) and np.issubdtype(items.dtype, np.floating)
        vectors = items if is_array else self.embed(items, task)
        width = self.spec.encoder.pooled_dim
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise InputError(f"embeddings must be [N, {width}], got {list(vectors.shape)}")
        check_finite(vectors, "embeddings", "text {}".format)
        return unit_vectors(vectors) if similarity == "cosine" else vectors

    def fields(
        self, task: str | None, texts: TextInputs, names: Sequence[str] | None = None
    ) -> list[Mapping[str, str]]:
        """Returns each text as a dictionary of the task's fields; arguments as in `predict`."""
        return as_fields(self.task(task), texts, names)


def describe_tasks(tasks: Iterable[Task]) -> str:
    """Returns names and kinds of tasks, for messages."""
    return ", ".join(f"{task.name} ({task.kind})" for task in tasks)


def one_device() -> Mesh:
    """Returns the mesh of this process's first device."""
    return sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])


def shows_progress(progress: bool | None) -> bool:
    """Returns True if progress bars are shown; by default on a terminal and in a notebook."""
    return activity.shows_bars() if progress is None else progress
