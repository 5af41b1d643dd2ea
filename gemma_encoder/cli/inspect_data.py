"""Shows what a model sees of a task: records beside their text, tokens, a packed row, lengths."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma_encoder import runtime
from gemma_encoder.cli import commandline, inspect
from gemma_encoder.inputs.batch import Batch, BatchShape
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma_encoder.data.source import Source

WIDTH = 100  # of the terminal
UNCUT = 1 << 30
SHOWN_TEXTS = 2  # of the documents of a list


class Settings(NamedTuple):
    """What is looked at, and through which tokenizer and lengths."""

    source: "Source"
    tokenizer: Tokenizer
    max_length: int
    row_length: int
    segments: int


class Text(NamedTuple):
    """One text of a record."""

    record: int  # the record's place in the sample
    example: Example
    raw: dict[str, str]
    tokens: np.ndarray  # uncut, bos and eos included


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return commandline.run_program(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    flags = commandline.Flags(inspect.__doc__)
    flags.config()
    flags.text("task", "The task; by default the config's first one.")
    flags.text("split", "By default train, or the first one where there is none.")
    flags.whole("n", "Records to show.", default=3, least=0)
    flags.whole(
        "sample",
        "Records that the statistics are of, drawn at random; 0 for all.",
        default=2000,
        least=0,
    )
    flags.whole("seed", "Of the order of records and of what is sampled.", default=0)
    flags.text("tokenizer", "Without --config: as config.tokenizer.", "small")
    flags.whole("max_length", "Without --config: as config.max_length.", default=128)
    settings = _settings(flags, argv)
    split = flags["split"] or _first_split(settings.source)
    for line in data_report(settings, split, flags["n"], flags["sample"], flags["seed"]):
        print(line)
    return 0


def _settings(flags: commandline.Flags, argv: Sequence[str]) -> Settings:
    config = flags.parse(argv)
    runtime.require_training()
    from gemma_encoder.data import mixtures, registry
    from gemma_encoder.data.source import DataOptions

    if config is None and flags["task"] is None:
        raise InputError(
            "name a task, e.g. --task=glue_mrpc, an experiment, e.g. --config=own, or the path of a "
            f"checkpoint; tasks: {', '.join(registry.names())}"
        )
    if config is None:
        length, tokenizer = flags["max_length"], Tokenizer.load(flags["tokenizer"])
        return Settings(
            _source(flags["task"], DataOptions(), tokenizer, length),
            tokenizer,
            length,
            -(-length // 128) * 128,
            length,
        )
    # The program stands above training; the library beside it does not.
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

    source = registry.get(name, options)
    source.check()
    source.fit(tokenizer, max_length)
    return source


def _first_split(source: "Source") -> str:
    return "train" if "train" in source.splits else source.splits[0]


def data_report(settings: Settings, split: str, n: int, sample: int, seed: int) -> Iterator[str]:
    """The lines to print: `n` records of a split one by one, then figures of `sample` records."""
    source, task = settings.source, settings.source.task
    if split not in source.splits:
        raise unknown(f"split of {task.name}", split, source.splits)
    count = source.size(split)
    yield f"{task.name}: {task.kind}, {split} split, {count:,} records"
    yield from _entry("template", task.template.text)
    if task.classes:
        yield from _entry(
            "classes", ", ".join(f"{number} {name}" for number, name in enumerate(task.classes))
        )
    if task.kind.has_range:
        yield from _entry("range", task.kind.describe(task))
    yield from _entry("metrics", ", ".join(task.metrics))
    yield from _entry(
        "tokenizer",
        f"{settings.tokenizer.name}, {settings.tokenizer.vocab_size:,} pieces; at most {settings.max_length} tokens a text",
    )
    texts = _texts(settings, split, min(sample or count, count), seed)
    for record in range(min(n, count)):
        yield from _show([text for text in texts if text.record == record], record, settings)
    if n and texts:
        yield from _show_row(texts, settings)
    yield from _statistics(texts, settings)


def _texts(settings: Settings, split: str, records: int, seed: int) -> list[Text]:
    source, texts = settings.source, []
    order = np.random.default_rng(seed).permutation(source.size(split))[:records]
    for number, index in enumerate(order.tolist()):
        raw = {name: _shown(value) for name, value in source.raw(split, index).items()}
        rng = np.random.default_rng([seed, number]) if split == "train" else None
        examples = source.examples(split, index, rng)
        encoded = encode(
            settings.tokenizer,
            source.task.template,
            [example.fields for example in examples],
            UNCUT,
            f"{split} record {number + 1}",
        )
        texts += [
            Text(number, example, raw, text.tokens)
            for example, text in zip(examples, encoded, strict=True)
        ]
    return texts


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _entry(name: str, text: str, indent: int = 11) -> Iterator[str]:
    """A name in the margin, and a text beside it, wrapped."""
    lines = textwrap.wrap(text, WIDTH - indent, break_long_words=True, replace_whitespace=True) or [
        ""
    ]
    for place, line in enumerate(lines):
        yield f"{name if not place else '':<{indent}}{line}"


def _show(texts: list[Text], record: int, settings: Settings) -> Iterator[str]:
    task = settings.source.task
    of_list = (
        f": a list of {len(texts)} texts for {texts[0].example.query_id}" if len(texts) > 1 else ""
    )
    yield ""
    yield f"── record {record + 1}{of_list} ".ljust(WIDTH, "─")
    for text in texts[:SHOWN_TEXTS]:
        yield from _beside(_raw(text, task), task.template.render(text.example.fields)[0])
        kept = encode(
            settings.tokenizer,
            task.template,
            [text.example.fields],
            settings.max_length,
            f"record {record + 1}",
        )[0]
        cut = f", {kept.num_truncated} more were cut" if kept.num_truncated else ""
        yield f"tokens: {len(kept.tokens)}{cut}; each piece over its id"
        yield from _over(settings.tokenizer.pieces(kept.tokens), [str(i) for i in kept.tokens])
        if text is not texts[:SHOWN_TEXTS][-1]:
            yield ""
    if len(texts) > SHOWN_TEXTS:
        yield f"… {len(texts) - SHOWN_TEXTS} more texts of this list"


def _raw(text: Text, task: Task) -> list[tuple[str, str]]:
    """Names and values of a record as it was read, its label in words."""
    example = text.example
    shown = [
        (name, value) for name, value in text.raw.items() if name not in ("label", *example.fields)
    ] + list(example.fields.items())
    if example.document_id:
        shown.append(("document id", example.document_id))
    label = task.kind.show_label(task, example.label)
    if not label:
        return shown
    if task.kind.one_class and not task.is_unlabeled(example.label):
        label = f"{example.label:g} ({label})"
    return [*shown, ("label", label)]


def _beside(raw: list[tuple[str, str]], text: str) -> Iterator[str]:
    """Two columns: the raw record, and its text."""
    width = WIDTH // 2 - 2
    left = [
        line
        for name, value in raw
        for line in textwrap.wrap(f"{name}: {value}", width, subsequent_indent="  ") or [f"{name}:"]
    ]
    right = textwrap.wrap(text, width)
    yield f"{'raw record':<{width}} │ text"
    for place in range(max(len(left), len(right))):
        yield f"{left[place] if place < len(left) else '':<{width}} │ {right[place] if place < len(right) else ''}".rstrip()


def _over(above: Sequence[str], below: Sequence[str]) -> Iterator[str]:
    """Pairs of short texts, one over the other, as many as a line holds."""
    upper = lower = ""
    for first, second in zip(above, below, strict=True):
        width = max(len(first), len(second)) + 1
        if upper and len(upper) + width > WIDTH:
            yield from (upper.rstrip(), lower.rstrip())
            upper = lower = ""
        upper, lower = upper + first.ljust(width), lower + second.ljust(width)
    yield from (upper.rstrip(), lower.rstrip())


def _pack(texts: Sequence[Text], settings: Settings, rows: int) -> Iterator[Batch]:
    """Batches of those texts, cut to `max_length`, as training would pack them, lists apart; `example_id` is the text's place."""
    packer = Packer(BatchShape(rows, settings.row_length, settings.segments))
    for place, text in enumerate(texts):
        packer.add(PackingGroup((Segment(text.tokens[: settings.max_length], 0, 0.0, place),)))
        if packer.ready:
            yield packer.emit()
    while len(packer):
        yield packer.emit()


def _show_row(texts: Sequence[Text], settings: Settings) -> Iterator[str]:
    """The row that the first text is packed into, as a bar and as a list."""
    row = next(_pack(texts[:200], settings, rows=1))
    marks = "123456789abcdefghijklmnopqrstuvwxyz"
    scale = max(-(-settings.row_length // WIDTH), 1)
    segments = row.segment_ids[0]
    yield ""
    yield "── packed row ".ljust(WIDTH, "─")
    yield f"{settings.row_length} tokens, {int((segments > 0).sum())} of them real; each mark is {scale} token{'s' * (scale > 1)}, · is padding"
    yield "".join("·" if not s else marks[(s - 1) % len(marks)] for s in segments[::scale])
    yield f"{'segment':<9}{'record':<8}{'columns':<12}{'positions':<11}text"
    for slot in np.flatnonzero(row.weight[0]):
        places = np.flatnonzero(segments == slot + 1)
        text = texts[row.example_id[0, slot]]
        columns, positions = f"{places[0]}–{places[-1]}", f"0–{row.positions[0, places[-1]]}"
        words = " ".join(settings.source.task.template.render(text.example.fields)[0].split())
        yield f"{marks[slot % len(marks)]:<9}{text.record + 1:<8}{columns:<12}{positions:<11}{textwrap.shorten(words, WIDTH - 40, placeholder='…')}"


def _statistics(texts: Sequence[Text], settings: Settings) -> Iterator[str]:
    task = settings.source.task
    lengths = np.array([len(text.tokens) for text in texts])
    longer = int((lengths > settings.max_length).sum())
    kept = np.minimum(lengths, settings.max_length)
    batches = list(_pack(texts, settings, rows=8))[:-1] or list(_pack(texts, settings, rows=8))
    real = np.mean([np.mean(batch.segment_ids > 0) for batch in batches])
    yield ""
    yield f"── {len(texts):,} texts of {texts[-1].record + 1:,} records ".ljust(WIDTH, "─")
    middle, most, nearly_all = np.percentile(lengths, [50, 90, 99])
    yield from _entry(
        "tokens",
        f"mean {lengths.mean():.1f}, median {middle:.0f}, 90 % up to {most:.0f}, 99 % up to {nearly_all:.0f}, longest {lengths.max()}",
    )
    yield from _entry(
        "cut",
        f"{longer:,} texts ({longer / len(texts):.1%}) exceed max_length={settings.max_length}",
    )
    yield from _entry(
        "real",
        f"{real:.1%} of a batch's tokens when texts share rows of {settings.row_length}, {kept.mean() / settings.row_length:.1%} when none do",
    )
    yield from _labels(texts, task)
    yield ""
    yield from _histogram(lengths)


def _labels(texts: Sequence[Text], task: Task) -> Iterator[str]:
    summary = task.kind.summarize_labels(task, [text.example.label for text in texts])
    if summary is not None:
        yield from _entry(*summary)


def _histogram(lengths: np.ndarray, bins: int = 16) -> Iterator[str]:
    """How many texts have which length, in bins of a round width."""
    width = next(
        step * 10**power
        for power in range(9)
        for step in (1, 2, 5)
        if step * 10**power * bins > lengths.max()
    )
    counts = np.bincount(lengths // width)
    label, number = len(str(len(counts) * width)) * 2 + 1, len(f"{counts.max():,}")
    room = WIDTH - label - number - 10
    for place in range(int(lengths.min()) // width, len(counts)):
        bar = "█" * round(room * counts[place] / counts.max()) or ("▏" if counts[place] else "")
        yield f"{f'{place * width}–{(place + 1) * width - 1}':>{label}} tokens {counts[place]:>{number},} {bar}"
