"""From examples to segments: texts tokenized, labels checked and scaled."""

from collections.abc import Sequence

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.kind import NO_TARGETS, UNLABELLED
from gemma_encoder.inputs.packing import Segment
from gemma_encoder.inputs.task import ROLES, Example
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

CHUNK = 64  # texts that are tokenized at a time

Counts = dict[str, dict[str, int]]  # by task: texts, truncated texts, truncated tokens


def no_counts(sources: Sequence[Source]) -> Counts:
    """Counts of nothing."""
    return {source.task.name: {"texts": 0, "cut_texts": 0, "cut_tokens": 0} for source in sources}


def make_segments(
    source: Source,
    task_id: int,
    examples: Sequence[Example],
    where: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    counts: Counts,
    *,
    first_id: int | None = None,
    unlabelled: bool = False,
) -> list[Segment]:
    """Tokenized examples of one task, their labels checked and scaled as training sees them.

    Args:
        source: the task.
        task_id: its index in the mixture.
        examples: what to tokenize, unless that was done ahead.
        where: names each example in messages.
        tokenizer, max_length: as for `encode`.
        counts: of the task; added to.
        first_id: `example_id` of the first; the others follow. None for training, where no table is kept.
        unlabelled: whether labels may be unknown (a test split); those that are stay as they are.
    """
    task = source.task
    if any(example.encoded is None for example in examples):
        templates = [task.template_for(example.role) for example in examples]
        fields = [example.fields for example in examples]
        encoded = encode(tokenizer, templates, fields, max_length, where)
    else:
        encoded = [example.encoded for example in examples]
    count = counts[task.name]
    count["texts"] += len(encoded)
    count["cut_texts"] += sum(text.cut > 0 for text in encoded)
    count["cut_tokens"] += sum(text.cut for text in encoded)
    segments = []
    for index, (example, text, name) in enumerate(zip(examples, encoded, where, strict=True)):
        if unlabelled and task.is_unlabelled(example.label):
            label, targets = UNLABELLED, NO_TARGETS
        else:
            label, targets = task.target(example.label, name)
        example_id = -1 if first_id is None else first_id + index
        role = ROLES.index(example.role)
        segments.append(Segment(text.tokens, task_id, label, example_id, role, targets))
    return segments
