"""Streams of batches for evaluation: every example of a split exactly once."""

from collections.abc import Iterator, Sequence

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

    def full_batches(self) -> Iterator[Batch]:
        """Batches for as long as every reader has a full block."""
        while all(packer.ready for packer in self._packers):
            yield self._join([packer.emit() for packer in self._packers])

    def last_batches(self) -> Iterator[Batch]:
        """Batches until no reader has a text left."""
        while any(len(packer) for packer in self._packers):
            yield self._join(
                [
                    packer.emit() if len(packer) else empty_batch(self._shape)
                    for packer in self._packers
                ]
            )

    def _join(self, blocks: Sequence[Batch]) -> Batch:
        return concatenate(blocks, self._shape.groups, self._first)


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

    def flush(pending: list[tuple[int, Example, str]]) -> None:
        segments = make_segments(
            source,
            task_id,
            [example for _, example, _ in pending],
            [where for _, _, where in pending],
            tokenizer,
            options.max_length,
            table.counts,
            first_id=0,
            unlabelled=split.startswith("test"),
        )
        for (i, _, _), segment in zip(pending, segments, strict=True):
            packers.add(i, segment)

    pending: list[tuple[int, Example, str]] = []
    for index in range(source.size(split)):
        for example in source.examples(split, index):
            example_id = len(table.labels)
            table.add(example)
            if packers.owns(example_id):
                pending.append((example_id, example, source.where(split, index)))
        if len(pending) >= CHUNK:
            flush(pending)
            pending = []
            yield from packers.full_batches()
    flush(pending)
    yield from packers.last_batches()
