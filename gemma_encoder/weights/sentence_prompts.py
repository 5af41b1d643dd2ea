"""Prompts of sentence-transformers, which put a text before another, from templates of tasks."""

from collections.abc import Sequence

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.weights.markdown_text import code_block, code_span, literal
from gemma_encoder.weights.native import InferenceSpec

# Names of prompts that sentence-transformers looks for, by role, the first one first.
ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
SIMILARITIES = {"cosine": "cosines", "dot": "dot products"}  # that this library computes


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


def stored_prompt(spec: InferenceSpec, role: str, name: str | None) -> tuple[str, str | None]:
    """Returns the role that remains, and the prompt that a sentence-transformers folder has for it.

    Args:
        spec: the inference spec.
        role: role of the texts, "" for none. Where no task has roles, a prompt may stand for it.
        name: name of a prompt; None for the role's, or the default one.

    Raises:
        InputError: there is no prompt of that name.
    """
    prompts = spec.prompts
    if name is not None:
        if name not in prompts:
            raise unknown("prompt_name", name, prompts)
        return "", prompts[name]
    if stored := role_prompt(spec, role):
        return "", prompts[stored]
    return role, None if role else prompts.get(spec.default_prompt)


def role_prompt(spec: InferenceSpec, role: str) -> str:
    """Returns the name of the prompt that stands for a role; "" if there is none."""
    if any(task.role_templates for task in spec.tasks):
        return ""
    return next((name for name in ROLE_PROMPTS.get(role, ()) if name in spec.prompts), "")


def prefix_of(template: Template) -> str | None:
    """Returns the words before the only field; None if there are other fields or words after it."""
    literals, fields = zip(*template.parts, strict=True)  # an escaped brace ends a literal
    return "".join(literals) if len(template.fields) == 1 and fields[-1] is not None else None


def prompts_use(spec: InferenceSpec) -> str:
    """Returns how an export is used by its prompts, in Markdown; "" for one without prompts."""
    tasks = spec.tasks
    prompts = {**spec.prompts, **task_prompts(tasks)}
    lines = []
    if "query" in prompts and "document" in prompts:
        compared = SIMILARITIES.get(similarity_name(spec), "similarities")
        lines += ["model.encode_query(queries)", "model.encode_document(documents)"]
        lines.append(f"model.similarity(query_vectors, document_vectors)  # {compared}")
        if widths := trained_widths(spec):
            listed = ", ".join(map(str, widths))
            lines.append(
                f"model.encode_query(queries, truncate_dim={widths[0]})  # widths: {listed}"
            )
    lines += [
        f"model.encode(texts, prompt_name={name!r})"
        for name in prompts
        if name not in ("query", "document")
    ]
    parts = []
    if lines:
        code = "\n".join(["model = SentenceTransformer(FOLDER)", *lines])
        parts.append(code_block(code, "python"))
    absent = [task for task in tasks if not task.kind.embeds and prefix_of(task.template) is None]
    if absent:
        listed = ", ".join(
            f"{code_span(task.name)} ({literal(task.template.text)})" for task in absent
        )
        parts.append(f"No prompt expresses the templates of {listed}: format the texts yourself.")
    return "".join(f"\n\n{part}" for part in parts)


def trained_widths(spec: InferenceSpec) -> list[int]:
    """Returns the widths, ascending, that a retriever's vectors were trained to be cut to."""
    options = spec.record.get("config", {}).get("loss_options", {})
    return sorted(options.get("retrieval", {}).get("widths", ()))


def similarity_name(spec: InferenceSpec) -> str:
    """Returns sentence-transformers' name of the similarity of the vectors."""
    if any(task.kind.embeds for task in spec.tasks):
        return "cosine" if spec.encoder.pooling.normalize else "dot"
    return spec.similarity or "cosine"
