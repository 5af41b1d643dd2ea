"""Streams of batches for evaluation: every example of a split exactly once."""

from collections.abc import Iterator

from gemma_encoder.data.segments import CHUNK, make_segments, no_counts
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, concatenate, empty_batch
from gemma_encoder.inputs.packing import Packer, Segment, Unit
from gemma_encoder.inputs.task import Example, ExampleTable
from gemma_encoder.inputs.tokenizer import Tokenizer


class _Packers:
    """The packers of this process's readers; example i belongs to reader i mod `readers`."""

    def __init__(self, options: StreamOptions, process: int, processes: int):
        share = options.readers // processes
        self._readers, self._first = options.readers, process * share
        self._shape = options.shape.split(options.readers)
        self._packers = [Packer(self._shape, options.padding) for _ in range(share)]

    def owns(self, example_id: int) -> bool:
        return self._first <= example_id % self._readers < self._first + len(self._packers)

    def add(self, example_id: int, segment: Segment) -> None:
        packer = self._packers[example_id % self._readers - self._first]
        packer.add(Unit((segment._replace(example_id=example_id),)))

    def batches(self, *, is_end: bool = False) -> Iterator[Batch]:
        """Batches while every reader has a full block; at the end, until none has a text left."""
        while any(map(len, self._packers)) if is_end else all(p.ready for p in self._packers):
            blocks = [p.emit() if len(p) else empty_batch(self._shape) for p in self._packers]
            yield concatenate(blocks, self._shape.groups, self._first)


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
    packers = _Packers(options, process, processes)
    source.check_split(split)
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
            unlabelled=split.startswith("test"),
        )
        for example_id, segment in zip(pending, segments, strict=True):
            packers.add(example_id, segment)
        pending.clear()

    for index in range(source.size(split)):
        for example in source.examples(split, index):
            example_id = len(table.labels)
            table.add(example)
            if packers.owns(example_id):
                pending[example_id] = example, source.where(split, index)
        if len(pending) >= CHUNK:
            flush()
            yield from packers.batches()
    flush()
    yield from packers.batches(is_end=True)
