"""What an encoder is, where it comes from and how good it was seen to be: the card of a notebook, and the README of an export."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.weights.backbone import size_name
from gemma_encoder.weights.native import InferenceSpec

COUNTS = (
    "step",
    "split",
    "task",
    "examples",
    "cut_share",
)  # what a line of metrics.jsonl holds besides metrics
TERMS = "https://ai.google.dev/gemma/terms"


def facts(spec: InferenceSpec) -> dict[str, str]:
    """What the encoder is, one short line each."""
    encoder, record = spec.encoder, spec.record
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_encoder(encoder).shapes))
    size = (
        size_name(encoder.transformer)
        or f"{encoder.transformer.num_layers} layers of width {encoder.transformer.embed_dim}"
    )
    pooling = (
        encoder.pooling.name.replace("_k", f"_{encoder.pooling.k}")
        if encoder.pooling.name.endswith("_k")
        else encoder.pooling.name
    )
    found = {
        "size": f"{size}, {count / 1e6:,.1f} M parameters",
        "attention": encoder.attention,
        "pooling": f"{pooling}, {encoder.pooled_dim} numbers a text",
        "computes in": encoder.compute_dtype,
        "texts": f"at most {spec.max_length} tokens each, tokenizer {spec.tokenizer.name}",
        "started from": _origin(record) or "not recorded",
        "trained for": f"{spec.step:,} steps" if spec.step else "not by this library",
    }
    if encoder.lora.rank:
        found["LoRA"] = f"rank {encoder.lora.rank}"
    return found


def metric_rows(spec: InferenceSpec) -> list[tuple[str, str, str, str, str]]:
    """(task, split, metric, value, examples) of every metric on record, the tasks' main ones first."""
    rows = []
    for line in spec.record.get("metrics", ()):
        for name, value in line.items():
            if name not in COUNTS:
                rows.append(
                    (
                        line["task"],
                        line["split"],
                        name,
                        f"{value:.3f}",
                        str(line.get("examples", "")),
                    )
                )
    return rows


def task_rows(spec: InferenceSpec) -> list[tuple[str, str, str, str]]:
    """(task, kind, classes or range, training records) of every task."""
    examples = spec.record.get("examples", {})
    rows = []
    for task in spec.tasks:
        rows.append(
            (
                task.name,
                task.kind.name,
                task.kind.describe(task),
                f"{examples[task.name]:,}" if task.name in examples else "",
            )
        )
    return rows


def to_html(spec: InferenceSpec) -> str:
    """A card for a notebook: no script, no style sheet, all text escaped."""
    cell = 'style="text-align:left;padding:2px 12px 2px 0;vertical-align:top"'

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        if not rows:
            return ""
        lines = "".join(
            f"<tr>{''.join(f'<td {cell}>{html.escape(value)}</td>' for value in row)}</tr>"
            for row in rows
        )
        names = (
            f"<tr>{''.join(f'<th {cell}>{html.escape(name)}</th>' for name in head)}</tr>"
            if head
            else ""
        )
        return f'<table style="margin:4px 0;border-collapse:collapse">{names}{lines}</table>'

    command = spec.record.get("command", "")
    return (
        '<div style="border:1px solid #8888;border-radius:6px;padding:8px 14px;display:inline-block;max-width:100%;overflow-x:auto">'
        "<strong>gemma_encoder.Predictor</strong>"
        + table((), list(facts(spec).items()))
        + table(("task", "kind", "classes", "trained on"), task_rows(spec))
        + table(("task", "split", "metric", "value", "examples"), metric_rows(spec))
        + (
            f"<details><summary>command</summary><code>{html.escape(command)}</code></details>"
            if command
            else ""
        )
        + "</div>"
    )


def markdown(spec: InferenceSpec) -> str:
    """The model card of an export, as the Hugging Face hub reads it."""
    record, derived = spec.record, _derived(spec)
    tags = [
        "gemma_encoder",
        "sentence-similarity",
        *sorted({task.kind.hub_tag for task in spec.tasks if task.kind.hub_tag}),
    ]
    header = {"library_name": "sentence-transformers", "tags": tags} | (
        {"license": "gemma"} if derived else {}
    )
    parts = [
        "---\n"
        + "".join(f"{name}: {json.dumps(value)}\n" for name, value in header.items())
        + "---",
        "# A Gemma encoder"
        + (f" for {', '.join(task.name for task in spec.tasks)}" if spec.tasks else ""),
        "A Gemma decoder turned into a text encoder and fine-tuned by gemma_encoder, after arXiv 2503.02656.",
        _table(("", ""), list(facts(spec).items())),
        "## Use\n\n```python\nimport gemma_encoder as ge\n\npredictor = ge.Predictor.load(FOLDER)\n```\n\n"
        "```python\nfrom sentence_transformers import SentenceTransformer\n\nSentenceTransformer(FOLDER).encode(texts)\n```",
        "## Data\n\n"
        + (
            _table(("task", "kind", "classes", "training records"), task_rows(spec))
            if spec.tasks
            else _unknown("Which data it was trained on")
        ),
        "## Metrics\n\n" + (_metrics(spec) or _unknown("How good it is")),
    ]
    if record.get("config"):
        parts.append("## Config\n\n```json\n" + json.dumps(record["config"], indent=1) + "\n```")
    limits = [f"Texts are cut at {spec.max_length} tokens."]
    limits += [
        "Scores are those of the tasks above, on data like theirs; nothing else was measured."
    ]
    if record and not derived:
        limits.append(
            "It was trained from random weights: it knows its training data, not language at large."
        )
    parts.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits))
    if derived:
        parts.append(
            f"## Licence\n\nThe weights derive from Gemma's: Gemma's terms of use ({TERMS}) hold for them, and must be passed on with them."
        )
    elif record:
        parts.append(
            "## Licence\n\nThe weights do not derive from Gemma's; whoever trained them says on what terms they may be used."
        )
    else:
        parts.append(
            f"## Licence\n\nWhere the weights came from is not recorded; if they derive from Gemma's, Gemma's terms of use ({TERMS}) hold for them."
        )
    return "\n\n".join(parts) + "\n"


def _origin(record: Mapping[str, Any]) -> str:
    model = record.get("config", {}).get("model", {})
    return model.get("warm_start") or model.get("pretrained") or ("random weights" if model else "")


def _derived(spec: InferenceSpec) -> bool:
    """Whether the weights began as others'. A start from another run counts: what that began with is not looked up."""
    return _origin(spec.record) not in ("", "random weights")


def _metrics(spec: InferenceSpec) -> str:
    rows, command = metric_rows(spec), spec.record.get("command")
    if not rows:
        return ""
    return _table(("task", "split", "metric", "value", "examples"), rows) + (
        f"\n\nSeen at the end of:\n\n```\n{command}\n```" if command else ""
    )


def _unknown(what: str) -> str:
    return f"{what} is not recorded in the checkpoint."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| "
        + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in line)
        + " |"
        for line in lines
    )
