"""Prompts of sentence-transformers, which put a text before another, from templates of tasks."""

from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.weights.native import InferenceSpec


def task_prompts(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns the prompts of tasks: of retrieval by role, else by the task's name.

    The prompts of a single retrieval task are named "query" and "document", which
    sentence-transformers' `encode_query` and `encode_document` look for; those of several are
    TASK_query and TASK_document. Templates of several fields, or with words after the field, have
    none; of other tasks than retrieval they are left out.

    Raises:
        InputError: a template of retrieval has no prompt.
    """
    prompts = {}
    retrieval = [task for task in tasks if task.kind.embeds]
    for task in tasks:
        if not task.kind.embeds:
            prefix = prefix_of(task.template)
            if prefix is not None:
                prompts[task.name] = prefix
            continue
        for role in ("query", "document"):
            template = task.template_for(role)
            prefix = prefix_of(template)
            if prefix is None:
                raise InputError(
                    f"cannot be exported: sentence-transformers puts a prompt before a text, which "
                    f"cannot express the template {template.text!r} of task {task.name!r}; "
                    "heads=False does not help: use Predictor, or train with a prefix and one field"
                )
            prompts[role if len(retrieval) == 1 else f"{task.name}_{role}"] = prefix
    return prompts


def prefix_of(template: Template) -> str | None:
    """Returns the words before the only field; None if there are other fields or words after it."""
    literals, fields = zip(*template.parts, strict=True)  # an escaped brace ends a literal
    return "".join(literals) if len(template.fields) == 1 and fields[-1] is not None else None


def similarity_name(spec: InferenceSpec) -> str:
    """Returns sentence-transformers' name of the similarity of the vectors."""
    compares_products = any(task.kind.embeds for task in spec.tasks)
    return "dot" if compares_products and not spec.encoder.pooling.normalize else "cosine"
