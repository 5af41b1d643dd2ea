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
    """Yields batches while every reader can fill a block; at the end, until all texts are out.

    Args:
        packers: packers of consecutive readers, by the reader's index.
        is_end: no more texts will be added.
    """
    first_reader = min(packers)
    shape = packers[first_reader].shape

    def has_next() -> bool:
        if is_end:
            return any(len(packer) for packer in packers.values())
        return all(packer.ready for packer in packers.values())

    while has_next():
        blocks = [
            packer.emit() if len(packer) else empty_batch(shape) for packer in packers.values()
        ]
        yield concatenate(blocks, shape.groups, first_reader)


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
    """Yields this process's rows of batches with every example of a split exactly once, in order.

    Every process reads all records into its table, but example i is tokenized and packed only by
    reader i mod `readers`. Processes may yield different numbers of batches; the caller pads with
    `empty_batch`.

    Args:
        source, task_id: the task and its index in the mixture.
        split: split of the source. If its name starts with "test", labels may be unknown.
        tokenizer, options: the same as for training; the seed is not used.
        table: receives the examples; complete when the stream is exhausted.
        process, processes: index and count of processes, which share the readers equally.
    """
    readers_per_process = options.readers // processes
    readers = range(process * readers_per_process, (process + 1) * readers_per_process)
    shape = options.shape.split(options.readers)
    packers = {reader: Packer(shape, options.padding) for reader in readers}
    table.counts = no_counts([source])
    pending: dict[int, tuple[Example, str]] = {}  # example id -> example, location for messages

    def flush() -> None:
        segments = make_segments(
            source,
            task_id,
            [example for example, _ in pending.values()],
            [where for _, where in pending.values()],
            tokenizer,
            options.max_length,
            table.counts,
            split=split,
        )
        for example_id, segment in zip(pending, segments, strict=True):
            group = PackingGroup((segment._replace(example_id=example_id),))
            packers[example_id % options.readers].add(group)
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
