"""Streams of batches for evaluation: every example of a split exactly once."""

from collections.abc import Iterator, Mapping

from gemma_encoder.data.segments import CHUNK, make_segments, no_counts
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, concatenate, empty_batch
from gemma_encoder.inputs.packing import Packer, PackingGroup
from gemma_encoder.inputs.task import Example, ExampleTable
from gemma_encoder.inputs.tokenizer import Tokenizer


def _batches(packers: Mapping[int, Packer], *, is_end: bool = False) -> Iterator[Batch]:
    """Batches while every reader has a full block; at the end, until none has a text left.

    The packers are those of consecutive readers, by number.
    """
    mine, first = packers.values(), min(packers)
    shape = packers[first].shape
    while any(map(len, mine)) if is_end else all(packer.ready for packer in mine):
        blocks = [packer.emit() if len(packer) else empty_batch(shape) for packer in mine]
        yield concatenate(blocks, shape.groups, first)


def evaluation_stream(
    source: Source,
    task_id: int,
    split: str,
    tokenizer: Tokenizer,
    options: StreamOptions,
    table: ExampleTable,
    *,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """This process's rows of the batches that hold every example of a split once, in order.

    Every process reads all records into its table; example i is tokenized and packed by reader
    i mod `readers` alone. Processes may end after different numbers of batches; `empty_batch`
    fills the difference.

    Args:
        source, task_id: the task and its index in the mixture.
        split: one of the source's; labels may be unknown where its name begins with "test".
        tokenizer, options: as for training; the seed is not used.
        table: filled with the examples, complete when the stream has ended.
        process, processes: which part of the readers runs here.
    """
    share, shape = options.readers // processes, options.shape.split(options.readers)
    readers = range(process * share, (process + 1) * share)
    packers = {reader: Packer(shape, options.padding) for reader in readers}
    table.counts = no_counts([source])
    pending: dict[int, tuple[Example, str]] = {}  # by example id, with its name in messages

    def flush() -> None:
        examples, where = zip(*pending.values(), strict=True) if pending else ((), ())
        segments = make_segments(
            source,
            task_id,
            examples,
            where,
            tokenizer,
            options.max_length,
            table.counts,
            unlabeled=split.startswith("test"),
        )
        for example_id, segment in zip(pending, segments, strict=True):
            unit = PackingGroup((segment._replace(example_id=example_id),))
            packers[example_id % options.readers].add(unit)
        pending.clear()

    for index in range(source.size(split)):
        for example in source.examples(split, index):
            example_id = len(table.labels)
            table.add(example)
            if example_id % options.readers in packers:
                pending[example_id] = example, source.where(split, index)
        if len(pending) >= CHUNK:
            flush()
            yield from _batches(packers)
    flush()
    yield from _batches(packers, is_end=True)
