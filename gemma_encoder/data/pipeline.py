"""Streams of training batches.

The global batch of step n depends only on the config and n, not on the number of hosts. The stream
is sharded into `readers`, a constant of the config: reader r takes records r, r + `readers`, … of
each task, packs its own rows, and fills block r of every global batch. Each process runs an equal
share of the readers.

    records of a task, by index       permuted with a new seed in each epoch
    records of a reader               every `readers`-th of them, tasks interleaved by their rates
    rows of a reader                  texts, tokenized and packed
    batches of a process              blocks of its readers concatenated, prefetched in a thread

The state of a reader is the number of records drawn and the indices of those that are not packed
yet. Restoring it reads and tokenizes only the latter.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from gemma_encoder.data.order import shuffled
from gemma_encoder.data.segments import CHUNK, Counts, make_segments, no_counts
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, concatenate
from gemma_encoder.inputs.errors import InputError, described
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.packing import Packer, PackingGroup
from gemma_encoder.inputs.tokenizer import Tokenizer

PREFETCH = 4  # batches
MAX_SKIPPED_EPOCHS = 20  # of one reader's records without a training list before training fails
MEASURED_BATCHES = 16  # over which the number of examples per batch is averaged


class RecordRef(NamedTuple):
    """A training record: index of the task in the mixture, epoch, and index in the split."""

    task: int
    epoch: int
    index: int


def training_order(
    sources: Sequence[Source], rates: np.ndarray, options: StreamOptions, reader: int
) -> "grain.MapDataset[RecordRef]":
    """Returns the infinite sequence of one reader's records.

    In every epoch of a task, the readers together draw each record exactly once.
    """
    trained = [task for task, rate in enumerate(rates) if rate]
    orders = [_task_order(sources[task], task, options, reader) for task in trained]
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [float(rates[task]) for task in trained])


def _task_order(
    source: Source, task: int, options: StreamOptions, reader: int
) -> "grain.MapDataset[RecordRef]":
    size = source.size("train")
    if not size:
        raise InputError(f"task {source.task.name!r} has no train record")
    seed = int(np.random.SeedSequence([options.seed, source.key]).generate_state(1)[0])

    def position(draw: int, _: int) -> RecordRef:
        epoch, index = divmod(reader + draw * options.readers, size)
        return RecordRef(task, epoch, shuffled(index, size, seed + epoch))

    return grain.MapDataset.range(size).repeat().map_with_index(position)


class Reader(grain.DatasetIterator):
    """Yields one reader's rows of every global batch, as one block per micro-batch.

    Args:
        sources: the tasks of the mixture. The `task_id` of a segment is an index into them.
        rates: the share of each task.
        tokenizer: encodes the texts.
        options: shapes and seeds.
        reader: index of the reader.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rates: np.ndarray,
        tokenizer: Tokenizer,
        options: StreamOptions,
        reader: int,
    ):
        super().__init__()
        self._sources = sources
        self._tokenizer = tokenizer
        self._options = options
        self._reader = reader
        self._order = training_order(sources, rates, options, reader)
        self._packer = Packer(options.block, options.padding)
        self._drawn = 0
        self._skipped = [0] * len(sources)  # consecutive records without a training list, by task
        self._warned: set[str] = set()
        self.counts = no_counts(sources)

    def __next__(self) -> list[Batch]:
        return [self._block() for _ in range(self._options.micro_batches)]

    def _block(self) -> Batch:
        while not self._packer.ready:
            self._draw()
        return self._packer.emit()

    def _draw(self) -> None:
        """Draws records with about `CHUNK` texts and adds them to the packer."""
        first = self._drawn
        positions = []
        num_texts = 0
        while num_texts < CHUNK:
            positions.append(self._order[self._drawn])
            self._drawn += 1
            is_list = self._sources[positions[-1].task].task.is_list
            num_texts += self._options.shape.list_size if is_list else 1
        for group in self._packing_groups(range(first, self._drawn), positions, self.counts):
            self._packer.add(group)

    def _packing_groups(
        self, indices: Sequence[int], positions: Sequence[RecordRef], counts: Counts
    ) -> Iterator[PackingGroup]:
        """Returns the packing groups of records, in order; records without any text have none.

        All texts of a task are tokenized in one call, which is faster than record by record.

        Args:
            indices: indices of the records in the reader's order.
            positions: positions of the same records in their splits.
            counts: updated with the texts of the records.
        """
        examples = [
            self._sources[task].training_examples(index, self._options.seed, epoch)
            for task, epoch, index in positions
        ]
        groups: list[PackingGroup | None] = [None] * len(positions)
        for task, source in enumerate(self._sources):
            of_task = [i for i, position in enumerate(positions) if position.task == task]
            self._count_skipped(task, [len(examples[i]) for i in of_task])
            flat = [(positions[i].index, example) for i in of_task for example in examples[i]]
            segments = iter(
                make_segments(
                    source,
                    task,
                    [example for _, example in flat],
                    [source.where("train", index) for index, _ in flat],
                    self._tokenizer,
                    self._options.max_length,
                    counts,
                )
            )
            for i in of_task:
                texts = tuple(next(segments) for _ in examples[i])
                if texts:
                    groups[i] = PackingGroup(texts, source.task.is_list, indices[i])
        return (group for group in groups if group is not None)

    def _count_skipped(self, task: int, lengths: Sequence[int]) -> None:
        """Counts records in a row that no training list can be drawn from; warns about the first.

        Args:
            task: index of the task.
            lengths: number of examples of each of its next records.

        Raises:
            InputError: this reader skipped as many records in a row as `MAX_SKIPPED_EPOCHS` epochs
                hold.
        """
        source = self._sources[task]
        for length in lengths:
            if length:
                self._skipped[task] = 0
                continue
            if not (self._reader or source.task.name in self._warned):
                self._warned.add(source.task.name)
                logging.warning(
                    "%s: train records without a positive or without a negative are skipped",
                    source.task.name,
                )
            self._skipped[task] += 1
            if self._skipped[task] > MAX_SKIPPED_EPOCHS * source.size("train"):
                raise InputError(
                    f"task {source.task.name!r}: no train record has both a positive and a "
                    "negative; there is nothing to learn"
                )

    def get_state(self) -> dict[str, Any]:
        """Returns the records drawn, the indices of those not packed yet, and counts of texts."""
        counts = {task: list(values.values()) for task, values in self.counts.items()}
        waiting = np.array([group.record_index for group in self._packer.waiting], np.int64)
        return {"drawn": self._drawn, "waiting": waiting, "counts": counts}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state returned by `get_state`."""
        self._drawn = int(state["drawn"])
        self.counts = {
            task: dict(zip(values, state["counts"][task], strict=True))
            for task, values in self.counts.items()
        }
        self._packer = Packer(self._options.block, self._options.padding)
        waiting = [int(index) for index in state["waiting"]]
        positions = [self._order[index] for index in waiting]
        # These texts were counted before the state was taken.
        for group in self._packing_groups(waiting, positions, no_counts(self._sources)):
            self._packer.add(group)


class _Batches(grain.DatasetIterator):
    """Yields the batches of consecutive readers, each with the counts up to that batch."""

    def __init__(self, readers: Sequence[Reader], first: int, options: StreamOptions):
        super().__init__()
        self._readers = readers
        self._first = first
        self._options = options

    def __next__(self) -> tuple[Batch, Counts]:
        blocks = [next(reader) for reader in self._readers]
        groups = self._options.block.groups
        micro_batches = [
            concatenate(of_readers, groups, self._first) for of_readers in zip(*blocks, strict=True)
        ]
        fields = zip(*micro_batches, strict=True)
        batch = Batch(*(np.concatenate(field) for field in fields))
        return batch, self._counts()

    def _counts(self) -> Counts:
        total: Counts = {}
        for reader in self._readers:
            for task, values in reader.counts.items():
                sums = total.setdefault(task, dict.fromkeys(values, 0))
                for name, value in values.items():
                    sums[name] += value
        return total

    def get_state(self) -> dict[str, Any]:
        return {"readers": [reader.get_state() for reader in self._readers]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for reader, reader_state in zip(self._readers, state["readers"], strict=True):
            reader.set_state(reader_state)


class TrainStream:
    """Infinite iterator over this process's rows of the global batches, prefetched in a thread.

    The rows of a micro-batch are contiguous, and `group_id` counts lists within a micro-batch.

    Args:
        sources: the tasks of the mixture. The `task_id` of a segment is an index into them.
        rates: the share of each task.
        tokenizer: encodes the texts.
        options: shapes and seeds.
        process, processes: index and count of processes, which share the readers equally.
        prefetch: batches to prefetch.

    Attributes:
        counts: counts by task for the batches drawn so far in this process: texts, truncated texts,
            and truncated tokens.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rates: np.ndarray,
        tokenizer: Tokenizer,
        options: StreamOptions,
        *,
        process: int = 0,
        processes: int = 1,
        prefetch: int = PREFETCH,
    ):
        if options.readers % processes:
            raise InputError(
                f"batch.readers={options.readers} must be a multiple of the number of processes, "
                f"{processes}"
            )
        readers_per_process = options.readers // processes
        indices = range(process * readers_per_process, (process + 1) * readers_per_process)
        readers = [Reader(sources, rates, tokenizer, options, index) for index in indices]
        self._batches = grain.experimental.ThreadPrefetchDatasetIterator(
            _Batches(readers, indices.start, options), prefetch
        )
        self.names = [f"reader_{index:05d}" for index in indices]
        self.counts = no_counts(sources)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self.counts = next(self._batches)
        return batch

    def state(self) -> dict[str, bytes]:
        """Returns the state of each reader of this process as JSON, for `restore`."""
        states = self._batches.get_state()["readers"]
        return {
            name: to_json(state | {"waiting": state["waiting"].tolist()}).encode()
            for name, state in zip(self.names, states, strict=True)
        }

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Resumes where `state` was called; the number of processes may differ.

        Raises:
            InputError: a state is damaged or has an old format.
        """
        try:
            readers = [from_json(states[name]) for name in self.names]
            self._batches.set_state({"readers": readers})
        except InputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the state of the data readers is damaged ({described(error)}); move the newest "
                "checkpoint away to resume from the one before"
            ) from error

    def close(self) -> None:
        """Stops the background thread and ends the iteration."""
        self._batches.close()
        self._batches = iter(())  # freed now: Grain's cleanup fails during interpreter shutdown


def average_examples(
    sources: Sequence[Source],
    rates: np.ndarray,
    tokenizer: Tokenizer,
    options: StreamOptions,
    batches: int = MEASURED_BATCHES,
) -> float:
    """Returns the mean examples per global batch, estimated from the first batches of reader 0.

    A list counts as one example. The result depends only on the arguments.
    """
    reader = Reader(sources, rates, tokenizer, options, 0)
    counts = [
        np.sum((block.weight > 0) & (block.group_id < 0)) + block.group_id.max() + 1
        for _ in range(batches)
        for block in next(reader)
    ]
    return float(np.sum(counts)) / batches * options.readers
