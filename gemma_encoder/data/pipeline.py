"""Streams of training batches.

Step n's global batch is a function of the config and n alone, whatever the number of hosts. The
stream is cut into `readers`, a constant of the config: reader r takes every `readers`-th record of
each task from the r-th on, packs its own rows, and fills block r of each global batch. A process
runs its share of the readers.

    records of a task, by number      a permutation seeded anew for each epoch
    records of a reader               every `readers`-th of them, tasks interleaved by their rates
    rows of a reader                  texts tokenized and packed
    batches of a process              blocks of its readers side by side, made ahead in a thread

A reader's state is the number of records drawn and the numbers of those that wait to be packed:
restoring it reads and tokenizes the latter again, nothing else.
"""

import json
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
from gemma_encoder.inputs.packing import Packer, PackingGroup
from gemma_encoder.inputs.tokenizer import Tokenizer

PREFETCH = 4  # batches made ahead
HOPELESS = 20  # epochs' worth of records in a row without one to learn from
MEASURED = 16  # batches whose average says how many examples a batch holds


class Position(NamedTuple):
    """A training record: the index of its task in the mixture, the epoch, its index in the split."""

    task: int
    epoch: int
    index: int


def training_order(
    sources: Sequence[Source], rates: np.ndarray, options: StreamOptions, reader: int
) -> "grain.MapDataset[Position]":
    """The endless records of one reader, by their number in its order.

    Every epoch of a task is complete: the readers together take each record once.
    """
    trained = [task for task, rate in enumerate(rates) if rate]
    orders = [_task_order(sources[task], task, options, reader) for task in trained]
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [float(rates[task]) for task in trained])


def _task_order(
    source: Source, task: int, options: StreamOptions, reader: int
) -> "grain.MapDataset[Position]":
    size = source.size("train")
    if not size:
        raise InputError(f"task {source.task.name!r} has no train record")
    seed = int(np.random.SeedSequence([options.seed, source.key]).generate_state(1)[0])

    def position(turn: int, _: int) -> Position:
        epoch, index = divmod(reader + turn * options.readers, size)
        return Position(task, epoch, shuffled(index, size, seed + epoch))

    return grain.MapDataset.range(size).repeat().map_with_index(position)


class Reader(grain.DatasetIterator):
    """One reader: its rows of every global batch, as one block for each micro-batch.

    Args:
        sources: the tasks of the mixture; a segment's `task_id` is its task's index here.
        rates: the share of each.
        tokenizer: text to ids.
        options: shapes and seeds.
        reader: its index.
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
        self._sources, self._tokenizer, self._options = sources, tokenizer, options
        self._order = training_order(sources, rates, options, reader)
        self._packer = Packer(options.block, options.padding)
        self._reader, self._drawn = reader, 0
        self._skipped = [0] * len(sources)  # records in a row that no list could be drawn from
        self._warned: set[str] = set()
        self.counts = no_counts(sources)

    def __next__(self) -> list[Batch]:
        return [self._block() for _ in range(self._options.micro_batches)]

    def _block(self) -> Batch:
        while not self._packer.ready:
            self._draw()
        return self._packer.emit()

    def _draw(self) -> None:
        """Gives the packer the next records, some texts at a time."""
        first, texts, positions = self._drawn, 0, []
        while texts < CHUNK:
            positions.append(self._order[self._drawn])
            self._drawn += 1
            is_list = self._sources[positions[-1].task].task.is_list
            texts += self._options.shape.list_size if is_list else 1
        for unit in self._units(range(first, self._drawn), positions, self.counts):
            self._packer.add(unit)

    def _units(
        self, numbers: Sequence[int], positions: Sequence[Position], counts: Counts
    ) -> Iterator[PackingGroup]:
        """The units of some records, in order; none for a record that has no text to train on.

        The texts of a task are tokenized by one call, which is faster than record by record; units
        then stand where their records did.

        Args:
            numbers: of the records in the reader's order.
            positions: what those records are.
            counts: added to.
        """
        examples = [
            self._sources[task].training_examples(index, self._options.seed, epoch)
            for task, epoch, index in positions
        ]
        units: list[PackingGroup | None] = [None] * len(positions)
        for task, source in enumerate(self._sources):
            mine = [i for i, position in enumerate(positions) if position.task == task]
            self._count_skipped(task, [len(examples[i]) for i in mine])
            flat = [(positions[i].index, example) for i in mine for example in examples[i]]
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
            for i in mine:
                texts = tuple(next(segments) for _ in examples[i])
                units[i] = PackingGroup(texts, source.task.is_list, numbers[i]) if texts else None
        return (unit for unit in units if unit is not None)

    def _count_skipped(self, task: int, lengths: Sequence[int]) -> None:
        """Warns of the first record that no list can be drawn from.

        Args:
            task: its index.
            lengths: examples of each of the next records.

        Raises:
            InputError: there were so many in a row that the task most likely holds no other.
        """
        source = self._sources[task]
        for length in lengths:
            if length:
                self._skipped[task] = 0
                continue
            if not (self._reader or source.task.name in self._warned):
                self._warned.add(source.task.name)
                logging.warning(
                    "%s: train records without a right or without a wrong option are skipped",
                    source.task.name,
                )
            self._skipped[task] += 1
            if self._skipped[task] > HOPELESS * source.size("train"):
                raise InputError(
                    f"task {source.task.name!r}: no train record has both a right and a wrong "
                    "option; there is nothing to learn"
                )

    def get_state(self) -> dict[str, Any]:
        """Whole numbers that decide what comes next, and the counts of texts so far."""
        counts = {task: list(values.values()) for task, values in self.counts.items()}
        waiting = np.array([unit.record_index for unit in self._packer.waiting], np.int64)
        return {"drawn": self._drawn, "waiting": waiting, "counts": counts}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Makes the reader go on where `get_state` was called."""
        self._drawn = int(state["drawn"])
        self.counts = {
            task: dict(zip(values, state["counts"][task], strict=True))
            for task, values in self.counts.items()
        }
        self._packer = Packer(self._options.block, self._options.padding)
        numbers = [int(number) for number in state["waiting"]]
        positions = [self._order[number] for number in numbers]
        for unit in self._units(numbers, positions, no_counts(self._sources)):
            self._packer.add(unit)


class _Batches(grain.DatasetIterator):
    """Batches of some readers, each with the counts of its time."""

    def __init__(self, readers: Sequence[Reader], first: int, options: StreamOptions):
        super().__init__()
        self._readers, self._first, self._options = readers, first, options

    def __next__(self) -> tuple[Batch, Counts]:
        blocks = [next(reader) for reader in self._readers]
        groups = self._options.block.groups
        micro = [concatenate(part, groups, self._first) for part in zip(*blocks, strict=True)]
        return Batch(*(np.concatenate(field) for field in zip(*micro, strict=True))), self._counts()

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
        for reader, one in zip(self._readers, state["readers"], strict=True):
            reader.set_state(one)


class TrainStream:
    """Endless training batches: this process's rows of every global batch, made ahead in a thread.

    Rows of one micro-batch stand together, and lists are numbered within it.

    Args:
        sources: the tasks of the mixture; a segment's `task_id` is its task's index here.
        rates: the share of each.
        tokenizer: text to ids.
        options: shapes and seeds.
        process, processes: which part of the readers runs here.
        prefetch: batches made ahead.

    Attributes:
        counts: by task of this process, texts tokenized for the batches drawn so far, how many of
            them were truncated, and by how many tokens in all.
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
        share = options.readers // processes
        numbers = range(process * share, (process + 1) * share)
        readers = [Reader(sources, rates, tokenizer, options, number) for number in numbers]
        self._batches = grain.experimental.ThreadPrefetchDatasetIterator(
            _Batches(readers, numbers.start, options), prefetch
        )
        self.names = [f"reader_{number:05d}" for number in numbers]
        self.counts = no_counts(sources)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self.counts = next(self._batches)
        return batch

    def state(self) -> dict[str, bytes]:
        """The state of each reader of this process, as JSON; `restore` is its inverse."""
        states = self._batches.get_state()["readers"]
        return {
            name: json.dumps(state | {"waiting": state["waiting"].tolist()}).encode()
            for name, state in zip(self.names, states, strict=True)
        }

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Makes the stream go on where `state` was called, on any number of processes.

        Raises:
            InputError: a state is damaged, or of a former format.
        """
        try:
            readers = [json.loads(states[name]) for name in self.names]
            self._batches.set_state({"readers": readers})
        except InputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the state of the data readers is damaged ({described(error)}); move the newest "
                "checkpoint away to resume from the one before"
            ) from error

    def close(self) -> None:
        """Ends the background thread; no batch can be drawn any more."""
        self._batches.close()
        self._batches = iter(())  # freed now: at the interpreter's end Grain's own clean-up fails


def average_examples(
    sources: Sequence[Source],
    rates: np.ndarray,
    tokenizer: Tokenizer,
    options: StreamOptions,
    blocks: int = MEASURED,
) -> float:
    """Texts (a list counts once) in a global batch, averaged over the first blocks of reader 0.

    The result depends only on the arguments.
    """
    reader = Reader(sources, rates, tokenizer, options, 0)
    counts = [
        np.sum((block.weight > 0) & (block.group_id < 0)) + block.group_id.max() + 1
        for _ in range(blocks)
        for block in next(reader)
    ]
    return float(np.sum(counts)) / blocks * options.readers
