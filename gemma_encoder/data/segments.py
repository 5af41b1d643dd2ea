"""From examples to segments: texts tokenized, labels checked and scaled."""

from collections.abc import Sequence

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.kind import NO_TARGETS, UNLABELED
from gemma_encoder.inputs.packing import Segment
from gemma_encoder.inputs.task import ROLES, Example, Task
from gemma_encoder.inputs.template import EncodedText, encode
from gemma_encoder.inputs.tokenizer import Tokenizer

CHUNK = 64  # texts that are tokenized at a time

Counts = dict[str, dict[str, int]]  # by task: texts, truncated texts, truncated tokens


def no_counts(sources: Sequence[Source]) -> Counts:
    """Counts of nothing."""
    return {source.task.name: {"texts": 0, "cut_texts": 0, "cut_tokens": 0} for source in sources}


def count_texts(counts: dict[str, int], encoded: Sequence[EncodedText]) -> None:
    """Adds texts to the counts of their task."""
    counts["texts"] += len(encoded)
    counts["cut_texts"] += sum(text.num_truncated > 0 for text in encoded)
    counts["cut_tokens"] += sum(text.num_truncated for text in encoded)


def encode_examples(
    task: Task, examples: Sequence[Example], where: Sequence[str], tokenizer: Tokenizer, length: int
) -> list[EncodedText]:
    """Tokens of each example by the template of its role; arguments are those of `encode`."""
    templates = [task.template_for(example.role) for example in examples]
    where = [f"task {task.name!r}, {name}" for name in where]
    return encode(tokenizer, templates, [example.fields for example in examples], length, where)


def make_segments(
    source: Source,
    task_id: int,
    examples: Sequence[Example],
    where: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    counts: Counts,
    *,
    unlabeled: bool = False,
) -> list[Segment]:
    """Tokenized examples of one task, their labels checked and scaled as training sees them.

    Args:
        source: the task.
        task_id: its index in the mixture.
        examples: to tokenize, unless that was done ahead.
        where: names each example in messages.
        tokenizer, max_length: as for `encode`.
        counts: of the task; added to.
        unlabeled: whether labels may be unknown (a test split); those that are stay as they are.
    """
    task = source.task
    encoded = [example.encoded for example in examples]
    if any(text is None for text in encoded):
        encoded = encode_examples(task, examples, where, tokenizer, max_length)
    count_texts(counts[task.name], encoded)
    segments = []
    for example, text, name in zip(examples, encoded, where, strict=True):
        if unlabeled and task.is_unlabeled(example.label):
            label, targets = UNLABELED, NO_TARGETS
        else:
            label, targets = task.target(example.label, name)
        role = ROLES.index(example.role)
        segments.append(Segment(text.tokens, task_id, label, -1, role, targets))
    return segments
