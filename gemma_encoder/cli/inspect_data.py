"""Shows the data of a task as the model reads it: records, tokens, a packed row, statistics."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma_encoder import activity, runtime, terminal
from gemma_encoder.cli import commandline, inspect
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma_encoder.data.source import Source

WIDTH = 100  # columns of the terminal
NO_LIMIT = 1 << 30  # a max_length that truncates nothing
SHOWN_TEXTS = 2  # texts shown per list
MARKS = "123456789abcdefghijklmnopqrstuvwxyz"  # of the segments of a row


class Settings(NamedTuple):
    """The data source to inspect, with the tokenizer and the lengths that apply to it."""

    source: "Source"
    tokenizer: Tokenizer
    max_length: int
    row_length: int
    segments: int


class Text(NamedTuple):
    """A text of a record.

    Attributes:
        record: index of the record in the sample.
        example: fields and label of the text.
        raw: the fields of the record as read.
        tokens: ids, not truncated, bos and eos included.
    """

    record: int
    example: Example
    raw: dict[str, str]
    tokens: np.ndarray


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(inspect.__doc__)
    flags.config()
    flags.text("task", "Task to show; by default the first of the config.")
    flags.text("split", "Split to show; by default train, or the first if there is no train split.")
    flags.whole("n", "Number of records to show.", default=3, least=0)
    flags.whole(
        "sample", "Number of random records for the statistics; 0 for all.", default=2000, least=0
    )
    flags.whole("seed", "Seed of the order of records and of the sample.", default=0)
    flags.text("tokenizer", "Tokenizer, as config.tokenizer; only without --config.", "small")
    flags.whole("max_length", "Tokens per text; only without --config.", default=128)
    with activity.during("reading the data"):
        settings = _settings(flags, argv)
    split = flags["split"] or _first_split(settings.source)
    for line in data_report(settings, split, flags["n"], flags["sample"], flags["seed"]):
        terminal.print_result(line)
    return 0


def _settings(flags: commandline.Flags, argv: Sequence[str]) -> Settings:
    config = flags.parse(argv)
    runtime.require_training()
    from gemma_encoder.data import mixtures, registry
    from gemma_encoder.data.source import DataOptions

    if config is None and flags["task"] is None:
        raise InputError(
            "name a task, e.g. --task=glue_mrpc, an experiment, e.g. --config=own, or the path of "
            f"a checkpoint; tasks: {', '.join(registry.names())}"
        )
    if config is None:
        length = flags["max_length"]
        tokenizer = Tokenizer.load(flags["tokenizer"])
        return Settings(
            source=_source(flags["task"], DataOptions(), tokenizer, length),
            tokenizer=tokenizer,
            max_length=length,
            row_length=-(-length // 128) * 128,
            segments=length,
        )
    from gemma_encoder.training.config import TrainConfig

    config = TrainConfig.from_config_dict(config)
    tasks = mixtures.expand_mixtures(config.tasks)
    name = flags["task"] or tasks[0]
    if name not in tasks:
        raise unknown("task of the config", name, tasks)
    if config.tokenizer == "auto":
        raise InputError(
            "tokenizer='auto' is resolved only in training; pass e.g. --config.tokenizer=gemma2"
        )
    tokenizer = Tokenizer.load(config.tokenizer)
    source = _source(name, DataOptions.from_config(config), tokenizer, config.max_length)
    return Settings(
        source, tokenizer, config.max_length, config.batch.row_length, config.batch.segments
    )


def _source(name: str, options, tokenizer: Tokenizer, max_length: int) -> "Source":
    from gemma_encoder.data import registry
    from gemma_encoder.evaluation.requirements import check_task_metrics

    source = registry.get(name, options)
    check_task_metrics(source.task)
    source.check()
    source.fit(tokenizer, max_length)
    return source


def _first_split(source: "Source") -> str:
    return "train" if "train" in source.splits else source.splits[0]


def data_report(settings: Settings, split: str, n: int, sample: int, seed: int) -> Iterator[str]:
    """Yields the lines to print: `n` records of a split, a packed row, and statistics.

    Args:
        settings: the source and its lengths.
        split: split to show.
        n: number of records to show.
        sample: number of records for the statistics; 0 for all.
        seed: seed of the order of records.
    """
    source = settings.source
    task = source.task
    if split not in source.splits:
        raise unknown(f"split of {task.name}", split, source.splits)
    count = source.size(split)
    yield f"{task.name}: {task.kind}, {split} split, {count:,} records"
    for template in dict(task.role_templates).values() or [task.template]:
        yield from _entry("template", template.text)
    if task.classes:
        classes = ", ".join(f"{index} {name}" for index, name in enumerate(task.classes))
        yield from _entry("classes", classes)
    if task.kind.has_range:
        yield from _entry("range", task.kind.describe(task))
    yield from _entry("metrics", ", ".join(task.metrics))
    with activity.during("reading the labels"):
        unmet = list(_unmet_requirements(source, split))
    yield from unmet
    yield from _entry(
        "tokenizer",
        f"{settings.tokenizer.name}, {settings.tokenizer.vocab_size:,} pieces; "
        f"at most {settings.max_length} tokens per text",
    )
    with activity.during("tokenizing the texts"):
        texts = _texts(settings, split, min(sample or count, count), seed)
    for record in range(min(n, count)):
        yield from _show([text for text in texts if text.record == record], record, settings)
    if n and texts:
        yield from _show_row(texts, settings)
    yield from _statistics(texts, settings)


def _unmet_requirements(source: "Source", split: str) -> Iterator[str]:
    """Yields the reason why training would refuse to evaluate on this split, if any."""
    from gemma_encoder.evaluation.requirements import check_split_metrics

    if split == "train":
        return
    try:
        check_split_metrics(source, split)
    except InputError as error:
        yield from _entry("refused", str(error))


def _texts(settings: Settings, split: str, records: int, seed: int) -> list[Text]:
    source = settings.source
    texts = []
    order = np.random.default_rng(seed).permutation(source.size(split))[:records]
    for record, index in enumerate(order.tolist()):
        raw = {name: _value_text(value) for name, value in source.raw(split, index).items()}
        rng = np.random.default_rng([seed, record]) if split == "train" else None
        examples = source.examples(split, index, rng)
        encoded = encode(
            settings.tokenizer,
            [source.task.template_for(example.role) for example in examples],
            [example.fields for example in examples],
            NO_LIMIT,
            f"{split} record {record + 1}",
        )
        texts += [
            Text(record, example, raw, text.tokens)
            for example, text in zip(examples, encoded, strict=True)
        ]
    return texts


def _value_text(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _entry(name: str, text: str, indent: int = 11) -> Iterator[str]:
    """Yields a name in the margin with wrapped text beside it."""
    lines = textwrap.wrap(text, WIDTH - indent, break_long_words=True, replace_whitespace=True)
    margins = itertools.chain([name], itertools.repeat(""))
    for margin, line in zip(margins, lines or [""], strict=False):
        yield f"{margin:<{indent}}{line}"


def _heading(text: str) -> str:
    return f"── {text} ".ljust(WIDTH, "─")


def _show(texts: list[Text], record: int, settings: Settings) -> Iterator[str]:
    """Yields the lines of a record: its first texts with their raw fields and tokens."""
    task = settings.source.task
    yield ""
    if len(texts) > 1:
        query_id = texts[0].example.query_id
        yield _heading(f"record {record + 1}: a list of {len(texts)} texts for {query_id}")
    else:
        yield _heading(f"record {record + 1}")
    for index, text in enumerate(texts[:SHOWN_TEXTS]):
        if index:
            yield ""
        rendered, *_ = task.template_for(text.example.role).render(text.example.fields)
        yield from _two_columns(_raw_fields(text, task), rendered)
        yield from _token_lines(text, record, settings)
    if len(texts) > SHOWN_TEXTS:
        yield f"… {len(texts) - SHOWN_TEXTS} more texts of this list"


def _token_lines(text: Text, record: int, settings: Settings) -> Iterator[str]:
    """Yields the tokens of a text as training reads them, truncated to `max_length`."""
    (encoded,) = encode(
        settings.tokenizer,
        settings.source.task.template_for(text.example.role),
        [text.example.fields],
        settings.max_length,
        f"record {record + 1}",
    )
    truncated = f", {encoded.num_truncated} more were truncated" if encoded.num_truncated else ""
    yield f"tokens: {len(encoded.tokens)}{truncated}; each piece over its id"
    pieces = settings.tokenizer.pieces(encoded.tokens)
    yield from _stacked(pieces, [str(token) for token in encoded.tokens])


def _raw_fields(text: Text, task: Task) -> list[tuple[str, str]]:
    """Returns names and values of a record as read, with its label in words."""
    example = text.example
    hidden = {"label", *example.fields}
    fields = [(name, value) for name, value in text.raw.items() if name not in hidden]
    fields += example.fields.items()
    if example.document_id:
        fields.append(("document id", example.document_id))
    label = task.kind.show_label(task, example.label)
    if not label or example.role == "query":
        return fields
    if task.kind.one_class and not task.is_unlabeled(example.label):
        label = f"{example.label:g} ({label})"
    return [*fields, ("label", label)]


def _two_columns(raw: list[tuple[str, str]], text: str) -> Iterator[str]:
    """Yields the raw record on the left and its text on the right."""
    width = WIDTH // 2 - 2
    left = []
    for name, value in raw:
        left += textwrap.wrap(f"{name}: {value}", width, subsequent_indent="  ") or [f"{name}:"]
    right = textwrap.wrap(text, width)
    yield f"{'raw record':<{width}} │ text"
    for left_line, right_line in itertools.zip_longest(left, right, fillvalue=""):
        yield f"{left_line:<{width}} │ {right_line}".rstrip()


def _stacked(above: Sequence[str], below: Sequence[str]) -> Iterator[str]:
    """Yields pairs of short texts, one above the other, as many per line as fit."""
    upper = lower = ""
    for first, second in zip(above, below, strict=True):
        width = max(len(first), len(second)) + 1
        if upper and len(upper) + width > WIDTH:
            yield from (upper.rstrip(), lower.rstrip())
            upper = lower = ""
        upper += first.ljust(width)
        lower += second.ljust(width)
    yield from (upper.rstrip(), lower.rstrip())


def _pack(texts: Sequence[Text], settings: Settings, rows: int) -> Iterator[Batch]:
    """Yields batches of the texts, truncated to `max_length`, packed as in training.

    Texts of a list are packed as separate texts. `example_id` is the index of a text in `texts`.
    """
    packer = Packer(BatchShape(rows, settings.row_length, settings.segments))
    for index, text in enumerate(texts):
        packer.add(PackingGroup((Segment(text.tokens[: settings.max_length], 0, 0.0, index),)))
        if packer.ready:
            yield packer.emit()
    while len(packer):
        yield packer.emit()


def _show_row(texts: Sequence[Text], settings: Settings) -> Iterator[str]:
    """Yields the row that the first text is packed into, as a bar and as a list."""
    row = next(_pack(texts[:200], settings, rows=1))
    segments = row.segment_ids[0]
    real = int((segments > 0).sum())
    scale = max(-(-settings.row_length // WIDTH), 1)
    unit = "1 token" if scale == 1 else f"{scale} tokens"
    yield ""
    yield _heading("packed row")
    yield (f"{settings.row_length} tokens, {real} of them real; each mark is {unit}, · is padding")
    yield "".join(_mark(segment) for segment in segments[::scale])
    yield f"{'segment':<9}{'record':<8}{'columns':<12}{'positions':<11}text"
    for slot in np.flatnonzero(row.weight[0]):
        in_segment = np.flatnonzero(segments == slot + 1)
        first = in_segment[0]
        last = in_segment[-1]
        columns = f"{first}–{last}"
        positions = f"0–{row.positions[0, last]}"
        text = texts[row.example_id[0, slot]]
        template = settings.source.task.template_for(text.example.role)
        rendered = template.render(text.example.fields)[0]
        words = textwrap.shorten(" ".join(rendered.split()), WIDTH - 40, placeholder="…")
        record = text.record + 1
        yield f"{_mark(slot + 1):<9}{record:<8}{columns:<12}{positions:<11}{words}"


def _mark(segment: int) -> str:
    """Returns the mark of a segment, counted from 1; 0 is padding."""
    return MARKS[(segment - 1) % len(MARKS)] if segment else "·"


def _statistics(texts: Sequence[Text], settings: Settings) -> Iterator[str]:
    """Yields statistics of lengths, padding and labels."""
    lengths = np.array([len(text.tokens) for text in texts])
    median, percentile_90, percentile_99 = np.percentile(lengths, [50, 90, 99])
    num_truncated = int((lengths > settings.max_length).sum())
    yield ""
    yield _heading(f"{len(texts):,} texts of {texts[-1].record + 1:,} records")
    yield from _entry(
        "tokens",
        f"mean {lengths.mean():.1f}, median {median:.0f}, 90 % up to {percentile_90:.0f}, "
        f"99 % up to {percentile_99:.0f}, longest {lengths.max()}",
    )
    yield from _entry(
        "truncated",
        f"{num_truncated:,} texts ({num_truncated / len(texts):.1%}) exceed "
        f"max_length={settings.max_length}",
    )
    batches = list(_pack(texts, settings, rows=8))
    full_batches = batches[:-1] or batches
    packed = np.mean([np.mean(batch.segment_ids > 0) for batch in full_batches])
    unpacked = np.minimum(lengths, settings.max_length).mean() / settings.row_length
    yield from _entry(
        "real",
        f"{packed:.1%} of a batch's tokens when texts share rows of {settings.row_length}, "
        f"{unpacked:.1%} when none do",
    )
    yield from _labels(texts, settings.source.task)
    yield ""
    yield from _histogram(lengths)


def _labels(texts: Sequence[Text], task: Task) -> Iterator[str]:
    summary = task.kind.summarize_labels(task, [text.example.label for text in texts])
    if summary is not None:
        yield from _entry(*summary)


def _histogram(lengths: np.ndarray, bins: int = 16) -> Iterator[str]:
    """Yields a histogram of lengths, with bins of a round width."""
    width = next(
        step * 10**power
        for power in range(9)
        for step in (1, 2, 5)
        if step * 10**power * bins > lengths.max()
    )
    counts = np.bincount(lengths // width)
    label_width = len(str(len(counts) * width)) * 2 + 1
    count_width = len(f"{counts.max():,}")
    bar_width = WIDTH - label_width - count_width - 10
    for index in range(int(lengths.min()) // width, len(counts)):
        count = counts[index]
        bar = "█" * round(bar_width * count / counts.max())
        if count and not bar:
            bar = "▏"
        label = f"{index * width}–{(index + 1) * width - 1}"
        yield f"{label:>{label_width}} tokens {count:>{count_width},} {bar}"
