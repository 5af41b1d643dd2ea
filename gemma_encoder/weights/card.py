"""Model cards: an encoder's config, origin and metrics, as HTML for notebooks and as a README."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gemma_encoder.evaluation import class_scores
from gemma_encoder.evaluation.details import format_bounds, format_metric
from gemma_encoder.evaluation.metrics import lowest_is_best
from gemma_encoder.inputs.errors import in_one_line
from gemma_encoder.inputs.json_text import to_json
from gemma_encoder.inputs.untrusted import html_text
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.weights import markdown_text, sentence_prompts
from gemma_encoder.weights.backbone import size_name
from gemma_encoder.weights.markdown_text import code_block, code_span, literal, yaml_field
from gemma_encoder.weights.native import InferenceSpec

# Fields of a line of metrics.jsonl that are not metrics.
COUNTS = ("step", "split", "task", "examples", "cut_share")
CHANCE_NOTE = (
    "Chance ignores the texts: the majority class, the class frequencies or the mean of the "
    "training labels, a random option, or, on average, a random order of the candidates."
)
UNREADABLE = ("the model card cannot be made", "the checkpoint's record is damaged")
TERMS = "https://ai.google.dev/gemma/terms"
RANDOM_WEIGHTS = "random weights"
SCALED = (
    "Logits of classes in this export are divided by the temperature already; `Predictor` applies "
    "it itself."
)


def facts(spec: InferenceSpec) -> dict[str, str]:
    """Returns a short description of each property of the encoder, by the property's name."""
    encoder = spec.encoder
    transformer = encoder.transformer
    shapes = jax.tree.leaves(abstract_encoder(encoder).shapes)
    num_parameters = sum(math.prod(leaf.shape) for leaf in shapes)
    own_size = f"{transformer.num_layers} layers of width {transformer.embed_dim}"
    pooling = encoder.pooling.name
    if pooling.endswith("_k"):
        pooling = pooling.replace("_k", f"_{encoder.pooling.k}")
    result = {
        "size": f"{size_name(transformer) or own_size}, {num_parameters / 1e6:,.1f} M parameters",
        "attention": encoder.attention,
        "pooling": f"{pooling}, {encoder.pooled_dim} dimensions",
        "compute dtype": encoder.compute_dtype,
        "texts": f"at most {spec.max_length} tokens each, tokenizer {spec.tokenizer.name}",
        "started from": _origin(spec.record) or "not recorded",
        "trained for": f"{spec.step:,} steps" if spec.step else "not by this library",
    }
    if encoder.lora.rank:
        result["LoRA"] = f"rank {encoder.lora.rank}"
    return result


FIRST_STAGE = "first stage"
METRIC_COLUMNS = (
    *("task", "split", "metric", "value", "95 % interval", "chance"),
    *(FIRST_STAGE, "examples"),
)


def metric_table(spec: InferenceSpec) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns columns, and a row for every recorded metric.

    Columns are `METRIC_COLUMNS`, without the first stage's if no task has one.
    """
    details = spec.record.get("details", {})
    rows = []
    for line in spec.record.get("metrics", ()):
        of_task = details.get(line["task"], {})
        split = line["split"]
        bounds = chance_values(of_task, split, "intervals")
        others = [chance_values(of_task, split, field) for field in ("chance", "first_stage")]
        for name, value in line.items():
            if name not in COUNTS:
                label = f"{name} ↓" if lowest_is_best(name) else name
                interval = format_bounds(name, bounds[name]) if name in bounds else ""
                shown = (
                    format_metric(name, values[name]) if name in values else "" for values in others
                )
                examples = str(line.get("examples", ""))
                row = (
                    line["task"],
                    split,
                    label,
                    format_metric(name, value),
                    interval,
                    *shown,
                    examples,
                )
                rows.append(row)
    column = METRIC_COLUMNS.index(FIRST_STAGE)
    if any(row[column] for row in rows):
        return METRIC_COLUMNS, rows
    table = [(*row[:column], *row[column + 1 :]) for row in (METRIC_COLUMNS, *rows)]
    return table[0], table[1:]


def chance_values(
    details: Mapping[str, Mapping[str, Any]], split: str, field: str = "chance"
) -> dict[str, float]:
    """Returns the values of chance, of the first stage or of intervals, by logged metric name.

    Args:
        details: `evaluation.details.describe` of a task's splits, by their full names.
        split: the evaluated split. The metrics of its part "validation_matched" end in "_matched".
        field: "chance", "first_stage" or "intervals".
    """
    return {
        f"{name}{full_split.removeprefix(split)}": value
        for full_split, values in details.items()
        if full_split == split or full_split.startswith(f"{split}_")
        for name, value in values.get(field, {}).items()
    }


def class_tables(spec: InferenceSpec) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Returns (title, rows of `class_scores.COLUMNS`) for every recorded split with classes."""
    tables = []
    for task, splits in spec.record.get("details", {}).items():
        for split, values in splits.items():
            if scores := values.get("classes"):
                note = class_scores.others_note(len(scores))
                title = f"{task}, {split}" + (f": {note}" if note else "")
                shown = class_scores.selected_classes(scores)
                tables.append((title, class_scores.format_scores(shown)))
    return tables


def task_rows(spec: InferenceSpec) -> list[tuple[str, str, str, str]]:
    """Returns (task, kind, classes or range, number of training records) of every task."""
    examples = spec.record.get("examples", {})
    return [
        (
            task.name,
            task.kind.name,
            task.kind.describe(task),
            f"{examples[task.name]:,}" if task.name in examples else "",
        )
        for task in spec.tasks
    ]


def calibration_rows(spec: InferenceSpec) -> list[tuple[str, str]]:
    """Returns (task, its calibration with its origin) of every calibrated task."""
    return [
        (task.name, task.calibration.describe(task.kind))
        for task in spec.tasks
        if task.calibration.is_fitted
    ]


def to_html(spec: InferenceSpec) -> str:
    """Returns the card that a notebook shows: no script, no style sheet, all text escaped."""
    with in_one_line(*UNREADABLE):
        return _to_html(spec)


def _to_html(spec: InferenceSpec) -> str:
    parts = [
        '<div style="border:1px solid #8888;border-radius:6px;padding:8px 14px;'
        'display:inline-block;max-width:100%;overflow-x:auto">',
        "<strong>gemma_encoder.Predictor</strong>",
        _html_table((), list(facts(spec).items())),
        _html_table(("task", "kind", "classes", "trained on"), task_rows(spec)),
        _html_table(*metric_table(spec)),
        _html_table(("task", "calibration"), calibration_rows(spec)),
    ]
    for title, rows in class_tables(spec):
        table = _html_table(class_scores.COLUMNS, rows)
        parts.append(f"<details><summary>{html_text(title)}</summary>{table}</details>")
    command = html_text(spec.record.get("command", ""))
    if command:
        parts.append(f"<details><summary>command</summary><code>{command}</code></details>")
    return "".join([*parts, "</div>"])


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [_html_row("th", header)] if header else []
    lines += [_html_row("td", row) for row in rows]
    return f'<table style="margin:4px 0;border-collapse:collapse">{"".join(lines)}</table>'


def _html_row(tag: str, values: Sequence[str]) -> str:
    style = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"
    cells = [f'<{tag} style="{style}">{html_text(value)}</{tag}>' for value in values]
    return f"<tr>{''.join(cells)}</tr>"


USE = """\
## Use

```python
import gemma_encoder as ge

predictor = ge.Predictor.load(FOLDER)
```

```python
from sentence_transformers import SentenceTransformer

SentenceTransformer(FOLDER).encode(texts)
```"""


SPARSE_NOTE = (
    "Vectors are weights of words of the vocabulary, compared by dot products; "
    "`model.decode(vectors)` names the words. All logits of a batch are in memory at once: texts x "
    "tokens x words x 4 bytes, so `batch_size` should be small."
)


def markdown(spec: InferenceSpec) -> str:
    """Returns the model card of an export, as the Hugging Face hub reads it.

    Texts of the training data, such as class names, are shown as they are.
    """
    with in_one_line(*UNREADABLE):
        return _markdown(spec)


def _markdown(spec: InferenceSpec) -> str:
    names = ", ".join(task.name for task in spec.tasks)
    parts = [
        _front_matter(spec),
        f"# A Gemma encoder for {literal(names)}" if names else "# A Gemma encoder",
        "A Gemma decoder turned into a text encoder and fine-tuned by gemma_encoder, after arXiv "
        "2503.02656.",
        markdown_text.table(("", ""), list(facts(spec).items())),
        _use(spec),
        "## Data\n\n" + _data(spec),
        "## Metrics\n\n" + _metrics(spec),
    ]
    if rows := calibration_rows(spec):
        table = markdown_text.table(("task", "calibration"), rows)
        parts.append(f"## Calibration\n\n{table}\n\n{SCALED}")
    if spec.record.get("config"):
        config = to_json(spec.record["config"], indent=1)
        parts.append(f"## Config\n\n{code_block(config, 'json')}")
    parts.append("## Limits\n\n" + _limits(spec))
    parts.append("## License\n\n" + _license(spec))
    return "\n\n".join(parts) + "\n"


def _use(spec: InferenceSpec) -> str:
    """Returns how an export is called."""
    text = USE + sentence_prompts.prompts_use(spec)
    if any(head.kind == "sparse" for head in spec.encoder.heads.values()):
        return f"{text}\n\n{SPARSE_NOTE}".replace("SentenceTransformer(", "SparseEncoder(").replace(
            "import SentenceTransformer", "import SparseEncoder"
        )
    return text + _scores(spec)


def _scores(spec: InferenceSpec) -> str:
    """Returns the meaning of the export's scores, by task."""
    lines = [
        f'- {code_span(task.name)} ({task.kind}): "scores" are {task.kind.score_meaning}.'
        for task in spec.tasks
        if not task.kind.embeds
    ]
    if not lines:
        return ""
    note = "`SentenceTransformer(FOLDER)(features)` also returns the head's output:"
    return "\n\n".join(["", note, "\n".join(lines)])


def _front_matter(spec: InferenceSpec) -> str:
    """Returns the YAML block at the top of a card."""
    task_tags = {task.kind.hub_tag for task in spec.tasks if task.kind.hub_tag}
    fields: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "tags": ["gemma_encoder", "sentence-similarity", *sorted(task_tags)],
    }
    if _is_derived(spec):
        fields["license"] = "gemma"
    lines = [yaml_field(name, value) for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _data(spec: InferenceSpec) -> str:
    if not spec.tasks:
        return "The training data is not recorded in the checkpoint."
    return markdown_text.table(("task", "kind", "classes", "training records"), task_rows(spec))


def _metrics(spec: InferenceSpec) -> str:
    columns, rows = metric_table(spec)
    if not rows:
        return "No metric is recorded in the checkpoint."
    parts = [markdown_text.table(columns, rows)]
    if any(row[columns.index("chance")] for row in rows):
        parts.append(CHANCE_NOTE)
    for title, class_rows in class_tables(spec):
        parts += [f"### {literal(title)}", markdown_text.table(class_scores.COLUMNS, class_rows)]
    if command := spec.record.get("command"):
        parts.append(f"Measured at the end of:\n\n{code_block(command)}")
    return "\n\n".join(parts)


def _limits(spec: InferenceSpec) -> str:
    limits = [
        f"Texts are truncated to {spec.max_length} tokens.",
        "Scores are those of the tasks above, on data like theirs; nothing else was measured.",
    ]
    if spec.record and not _is_derived(spec):
        limits.append(
            "It was trained from random weights: it knows its training data, not language at large."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _license(spec: InferenceSpec) -> str:
    if _is_derived(spec):
        return (
            f"The weights derive from Gemma's: Gemma's terms of use ({TERMS}) apply to them and "
            "must be passed on with them."
        )
    if spec.record:
        return (
            "The weights do not derive from Gemma's; their license is up to whoever trained them."
        )
    return (
        "The origin of the weights is not recorded; if they derive from Gemma's, Gemma's terms of "
        f"use ({TERMS}) apply to them."
    )


def _origin(record: Mapping[str, Any]) -> str:
    """Returns the checkpoint that training started from; "" if it is not recorded."""
    model = record.get("config", {}).get("model", {})
    return model.get("warm_start") or model.get("pretrained") or (RANDOM_WEIGHTS if model else "")


def _is_derived(spec: InferenceSpec) -> bool:
    """Returns True if training started from other weights.

    The weights of another run count as such: the origin of that run is not looked up.
    """
    return _origin(spec.record) not in ("", RANDOM_WEIGHTS)
