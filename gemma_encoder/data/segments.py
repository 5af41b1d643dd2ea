"""Conversion of examples to segments: tokenizes texts, checks and scales labels."""

from collections.abc import Sequence

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.kind import NO_TARGETS, UNLABELED
from gemma_encoder.inputs.packing import Segment
from gemma_encoder.inputs.task import ROLES, Example, Task
from gemma_encoder.inputs.template import EncodedText, encode
from gemma_encoder.inputs.tokenizer import Tokenizer

CHUNK = 64  # texts per call of the tokenizer

Counts = dict[str, dict[str, int]]  # by task: texts, truncated texts, truncated tokens


def no_counts(sources: Sequence[Source]) -> Counts:
    """Returns counts of zero for the tasks of `sources`."""
    return {source.task.name: {"texts": 0, "cut_texts": 0, "cut_tokens": 0} for source in sources}


def count_texts(counts: dict[str, int], encoded: Sequence[EncodedText]) -> None:
    """Adds encoded texts to the counts of their task."""
    counts["texts"] += len(encoded)
    counts["cut_texts"] += sum(text.num_truncated > 0 for text in encoded)
    counts["cut_tokens"] += sum(text.num_truncated for text in encoded)


def encode_examples(
    task: Task, examples: Sequence[Example], where: Sequence[str], tokenizer: Tokenizer, length: int
) -> list[EncodedText]:
    """Tokenizes examples with the templates of their roles; arguments as for `encode`."""
    templates = [task.template_for(example.role) for example in examples]
    fields = [example.fields for example in examples]
    where = [f"task {task.name!r}, {location}" for location in where]
    return encode(tokenizer, templates, fields, length, where)


def make_segments(
    source: Source,
    task_id: int,
    examples: Sequence[Example],
    where: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    counts: Counts,
    *,
    split: str = "train",
) -> list[Segment]:
    """Tokenizes examples of one task, and checks and scales their labels for the loss.

    Args:
        source: the task.
        task_id: index of the task in the mixture.
        examples: the examples. They are not tokenized again if they are already encoded.
        where: location of each example, for messages.
        tokenizer, max_length: arguments of `encode`.
        counts: updated with the texts.
        split: split of the examples. Test splits may have unknown labels, which are passed through.
    """
    task = source.task
    any_range = split != "train" and source.range_is_inferred
    may_be_unlabeled = split.startswith("test")
    encoded = [example.encoded for example in examples]
    if any(text is None for text in encoded):
        encoded = encode_examples(task, examples, where, tokenizer, max_length)
    count_texts(counts[task.name], encoded)
    segments = []
    for example, text, location in zip(examples, encoded, where, strict=True):
        if may_be_unlabeled and task.is_unlabeled(example.label):
            label = UNLABELED
            targets = NO_TARGETS
        elif any_range:
            label = task.scale(example.label)  # may lie outside of [0, 1]
            targets = NO_TARGETS
        else:
            label, targets = task.target(example.label, location)
        role = ROLES.index(example.role)
        segments.append(Segment(text.tokens, task_id, label, example.key, role, targets))
    return segments
