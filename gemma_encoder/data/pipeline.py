"""Streams of batches.

Step n's global batch is a function of the config and n alone, whatever the number of hosts. The stream is cut into `readers`, a
constant of the config: reader r takes shard r of every task, draws from the tasks by the mixture's rates, packs its own rows,
and fills block r of each global batch. A process runs its share of the readers. A reader's state (where each task's dataset
stands, records drawn but not yet packed, texts waiting in the packer) is saved to the byte, so a restored stream goes on exactly.
"""

import collections
import dataclasses
import io
import json
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data.source import Source
from gemma_encoder.inputs.batch import Batch, BatchShape, concatenate, empty_batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, Segment, Unit
from gemma_encoder.inputs.task import Example, ExampleTable
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

PREFETCH = 4  # batches made ahead
MEASURED = 16  # batches whose average says how many examples a batch holds
CHUNK = 64  # records that are read, and texts that are tokenised, at a time


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What shapes a stream of batches.

    Attributes:
        shape: of a global batch.
        max_length: tokens of a text, bos and eos included.
        readers: how many independent readers fill a batch; a multiple of the number of processes.
        seed: of shuffling, mixing and sampling.
        padding: the side of a row that padding takes.
        micro_batches: into how many equal parts a global batch is cut, whose gradients are summed; no list lies in two of them.
    """

    shape: BatchShape
    max_length: int
    readers: int = 1
    seed: int = 0
    padding: str = "right"
    micro_batches: int = 1

    @property
    def block(self) -> BatchShape:
        """What one reader adds to one micro-batch."""
        return self.shape.split(self.readers * self.micro_batches)

    def __post_init__(self):
        if self.padding not in ("left", "right"):
            raise InputError(f"padding must be 'left' or 'right', got {self.padding!r}")
        if self.max_length < 3:
            raise InputError(
                f"max_length={self.max_length} leaves no room for a token between bos and eos"
            )
        if self.max_length > self.shape.row_length:
            raise InputError(
                f"max_length={self.max_length} exceeds batch.row_length={self.shape.row_length}"
            )
        if self.micro_batches < 1:
            raise InputError(f"batch.micro_batches must be at least 1, got {self.micro_batches}")
        _ = self.block


class TaskReader:
    """Endless examples of one task's training split, epoch after epoch, each epoch complete and shuffled anew."""

    def __init__(self, source: Source, options: StreamOptions, reader: int):
        self.source, self.options, self.reader = source, options, reader
        self._pending: collections.deque[dict[str, Any]] = collections.deque()
        self._open(0)

    def _open(self, epoch: int) -> None:
        self.epoch, self.place, self.skipped = epoch, 0, 0
        dataset = self.source.training_epoch(
            self.options.seed, epoch, self.reader, self.options.readers
        )
        self._iterator = iter(dataset.batch(CHUNK))

    def next(self) -> tuple[list[Example], str]:
        """The examples of the next record that has any, and what to call it in messages."""
        while True:
            while not self._pending:
                self._read()
            record = self._pending.popleft()
            examples = self.source.training_examples(
                record, self.options.seed, self.epoch, self.reader, self.place
            )
            self.place += 1
            if examples:
                return examples, f"train record {self.place} of reader {self.reader}"
            self.skipped += 1

    def _read(self) -> None:
        """Puts the next records into the queue, or begins the next epoch."""
        batch = next(self._iterator, None)
        if batch is not None:
            self._pending.extend(to_records(batch))
            return
        name, shard = self.source.task.name, f"shard {self.reader} of {self.options.readers}"
        if not self.place:
            raise InputError(f"task {name!r}: {shard} holds no record; use fewer readers")
        if self.skipped == self.place:
            raise InputError(
                f"task {name!r}: no record of {shard} has both a right and a wrong option; there is nothing to learn"
            )
        if self.skipped and not self.epoch:
            logging.warning(
                "%s: %d of %d train records of %s have no right or no wrong option and are skipped",
                name,
                self.skipped,
                self.place,
                shard,
            )
        self._open(self.epoch + 1)

    def state(self) -> dict[str, Any]:
        """Where it stands, for JSON; `restore` is its inverse."""
        import tensorflow as tf

        with tempfile.TemporaryDirectory() as folder:
            tf.train.Checkpoint(iterator=self._iterator).write(
                str(pathlib.Path(folder) / "iterator")
            )
            files = {path.name: path.read_bytes().hex() for path in pathlib.Path(folder).iterdir()}
        # Latin-1 has a character for every byte: JSON can hold any of them.
        pending = [
            {
                name: value.decode("latin-1") if isinstance(value, bytes) else value.item()
                for name, value in record.items()
            }
            for record in self._pending
        ]
        return {
            "epoch": self.epoch,
            "place": self.place,
            "skipped": self.skipped,
            "pending": pending,
            "iterator": files,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Makes it stand where `state()` said."""
        import tensorflow as tf

        self._open(state["epoch"])
        self.place, self.skipped = state["place"], state["skipped"]
        with tempfile.TemporaryDirectory() as folder:
            for name, content in state["iterator"].items():
                (pathlib.Path(folder) / name).write_bytes(bytes.fromhex(content))
            tf.train.Checkpoint(iterator=self._iterator).read(
                str(pathlib.Path(folder) / "iterator")
            ).assert_consumed()
        self._pending = collections.deque(
            {
                name: value.encode("latin-1")
                if isinstance(value, str)
                else np.float32(value)
                if isinstance(value, float)
                else np.int32(value)
                for name, value in record.items()
            }
            for record in state["pending"]
        )


def to_records(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a batch that a `tf.data.Dataset` made of them."""
    columns = {name: column.numpy() for name, column in batch.items()}
    for row in range(len(next(iter(columns.values())))):
        yield {name: column[row] for name, column in columns.items()}


class Reader:
    """One reader: draws records by the mixture's rates, tokenises them, and packs its block of every global batch."""

    def __init__(
        self,
        sources: Sequence[Source],
        rates: np.ndarray,
        tokenizer: Tokenizer,
        options: StreamOptions,
        number: int,
    ):
        self.sources, self.rates, self.tokenizer, self.options, self.number = (
            sources,
            rates,
            tokenizer,
            options,
            number,
        )
        # A task that is never drawn may have nothing to draw from: a diagnostic set has no train split.
        self._tasks = {
            i: TaskReader(source, options, number) for i, source in enumerate(sources) if rates[i]
        }
        self._packer = Packer(options.block, options.padding)
        self._draws = 0
        self._ahead: collections.deque[list[Batch]] = (
            collections.deque()
        )  # made before a restart, not given out yet
        self.counts = {
            source.task.name: {"texts": 0, "cut_texts": 0, "cut_tokens": 0} for source in sources
        }

    def next_blocks(self) -> list[Batch]:
        """This reader's rows of the next global batch, one block for each micro-batch."""
        return (
            self._ahead.popleft()
            if self._ahead
            else [self._next_block() for _ in range(self.options.micro_batches)]
        )

    def _next_block(self) -> Batch:
        while not self._packer.ready:
            self._draw()
        return self._packer.emit()

    def _draw(self) -> None:
        """Draws records until there are some texts to tokenise together, and gives them to the packer in order."""
        rng = np.random.default_rng([self.options.seed, self.number, self._draws])
        self._draws += 1
        drawn: list[tuple[int, list[Example], str]] = []
        texts = 0
        while texts < CHUNK:
            number = int(rng.choice(len(self.sources), p=self.rates))
            examples, where = self._tasks[number].next()
            drawn.append((number, examples, where))
            texts += len(examples)
        segments: list[tuple[Segment, ...]] = [()] * len(drawn)
        for number, source in enumerate(self.sources):
            mine = [i for i, (task, _, _) in enumerate(drawn) if task == number]
            flat = [(i, example) for i in mine for example in drawn[i][1]]
            encoded = iter(
                make_segments(
                    source,
                    number,
                    [e for _, e in flat],
                    [drawn[i][2] for i, _ in flat],
                    self.tokenizer,
                    self.options.max_length,
                    self.counts,
                )
            )
            for i in mine:
                segments[i] = tuple(next(encoded) for _ in drawn[i][1])
        for (number, _, _), unit in zip(drawn, segments, strict=True):
            self._packer.add(Unit(unit, self.sources[number].task.is_list))

    def state(self, ahead: Sequence[list[Batch]] = ()) -> bytes:
        """Everything that decides what comes next, as bytes; `restore` is its inverse.

        Args:
            ahead: blocks that `next_blocks` gave and nobody used; a restored reader gives them again.
        """
        ahead = [block for blocks in (*ahead, *self._ahead) for block in blocks]
        header = {
            "draws": self._draws,
            "counts": self.counts,
            "ahead": len(ahead) // self.options.micro_batches,
            "tasks": {reader.source.task.name: reader.state() for reader in self._tasks.values()},
        }
        blocks = {
            f"ahead/{i}/{name}": value
            for i, block in enumerate(ahead)
            for name, value in block._asdict().items()
        }
        return _pack_bytes(
            json.dumps(header).encode(),
            {**{f"packer/{name}": value for name, value in self._packer.state().items()}, **blocks},
        )

    def restore(self, state: bytes) -> None:
        """Makes the reader go on where `state()` was taken."""
        header, arrays = _unpack_bytes(state)
        values = json.loads(header)
        count = self.options.micro_batches
        blocks = [
            Batch(*(arrays[f"ahead/{i}/{name}"] for name in Batch._fields))
            for i in range(values["ahead"] * count)
        ]
        self._ahead = collections.deque(blocks[i : i + count] for i in range(0, len(blocks), count))
        self._draws, self.counts = values["draws"], values["counts"]
        for reader in self._tasks.values():
            reader.restore(values["tasks"][reader.source.task.name])
        self._packer.restore(
            {
                name.removeprefix("packer/"): value
                for name, value in arrays.items()
                if name.startswith("packer/")
            }
        )


def make_segments(
    source: Source,
    task_id: int,
    examples: Sequence[Example],
    where: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    counts: dict[str, dict[str, int]],
    *,
    first_id: int | None = None,
    unlabelled: bool = False,
) -> list[Segment]:
    """Tokenised examples of one task, their labels checked and scaled as training sees them.

    Args:
        source: the task.
        task_id: its number in the mixture.
        examples: what to tokenise, unless that was done ahead.
        where: names each example in messages.
        tokenizer, max_length: as for `encode`.
        counts: per task, how many texts there were and what was cut; added to.
        first_id: `example_id` of the first; the others follow. None for training, where no table is kept.
        unlabelled: whether labels may be unknown (a test split); those that are stay as they are.
    """
    if any(example.encoded is None for example in examples):
        encoded = encode(
            tokenizer,
            source.task.template,
            [example.fields for example in examples],
            max_length,
            where,
        )
    else:
        encoded = [example.encoded for example in examples]
    count = counts[source.task.name]
    count["texts"] += len(encoded)
    count["cut_texts"] += sum(text.cut > 0 for text in encoded)
    count["cut_tokens"] += sum(text.cut for text in encoded)
    task = source.task
    labels = [
        example.label
        if unlabelled and task.is_unlabelled(example.label)
        else task.check_label(example.label, place)
        for example, place in zip(examples, where, strict=True)
    ]
    return [
        Segment(text.tokens, task_id, label, -1 if first_id is None else first_id + i)
        for i, (text, label) in enumerate(zip(encoded, labels, strict=True))
    ]


def average_examples(
    sources: Sequence[Source],
    rates: np.ndarray,
    tokenizer: Tokenizer,
    options: StreamOptions,
    blocks: int = MEASURED,
) -> float:
    """Texts (a list counts once) in a global batch, averaged over the first blocks of reader 0: a function of config and data alone."""
    reader = Reader(sources, rates, tokenizer, options, 0)
    counts = []
    for _ in range(blocks):
        made = reader.next_blocks()
        counts.append(
            sum(
                np.sum((block.weight > 0) & (block.group_id < 0)) + block.group_id.max() + 1
                for block in made
            )
        )
    return float(np.mean(counts)) * options.readers


class TrainStream:
    """Endless training batches: this process's rows of every global batch, made ahead in a background thread.

    Rows of one micro-batch stand together, and lists are numbered within it.

    Args:
        sources: the tasks of the mixture; a segment's `task_id` is its task's place here.
        rates: the share of each.
        tokenizer: text to ids.
        options: shapes and seeds.
        process, processes: which part of the readers runs here.
        prefetch: batches made ahead.
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
                f"batch.readers={options.readers} must be a multiple of the number of processes, {processes}"
            )
        share = options.readers // processes
        self._first = process * share
        self._options = options
        self._readers = [
            Reader(sources, rates, tokenizer, options, self._first + i) for i in range(share)
        ]
        self._ready: collections.deque[tuple[Batch, list[list[Batch]]]] = (
            collections.deque()
        )  # a batch, and the blocks that each reader gave to it
        self._prefetch = prefetch
        self._making = threading.Lock()  # held while a batch is made and queued: a state is never taken in between; taken before _changed
        self._changed = threading.Condition()  # guards the queue
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._ready or self._error)
            if not self._ready:
                raise self._error
            batch, _ = self._ready.popleft()
            self._changed.notify_all()
            return batch

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closed or len(self._ready) < self._prefetch
                    )
                    if self._closed:
                        return
                with self._making:
                    blocks = [reader.next_blocks() for reader in self._readers]
                    micro = [
                        concatenate(part, self._options.block.groups, self._first)
                        for part in zip(*blocks, strict=True)
                    ]
                    with self._changed:
                        self._ready.append(
                            (
                                Batch(
                                    *(np.concatenate(field) for field in zip(*micro, strict=True))
                                ),
                                blocks,
                            )
                        )
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Per task of this process: texts tokenised so far, how many were cut, and by how many tokens in all."""
        with self._making:
            total: dict[str, dict[str, int]] = {}
            for reader in self._readers:
                for task, values in reader.counts.items():
                    for name, value in values.items():
                        total.setdefault(task, {}).setdefault(name, 0)
                        total[task][name] += value
            return total

    @property
    def names(self) -> list[str]:
        """What `state` calls this process's readers."""
        return [f"reader_{self._first + place:05d}" for place in range(len(self._readers))]

    def state(self) -> dict[str, bytes]:
        """One entry per reader of this process, batches made ahead included; `restore` is its inverse."""
        with self._making, self._changed:
            return {
                name: reader.state([blocks[place] for _, blocks in self._ready])
                for place, (name, reader) in enumerate(zip(self.names, self._readers, strict=True))
            }

    def restore(self, states: dict[str, bytes]) -> None:
        """Makes the stream go on where `state()` was taken, on this or another number of processes. Call it before the first batch is drawn."""
        with self._making:
            for name, reader in zip(self.names, self._readers, strict=True):
                reader.restore(states[name])

    def close(self) -> None:
        """Ends the background thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


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
    """This process's rows of the batches that hold every example of a split exactly once, in order.

    Every process reads all records into its table; example i is tokenised and packed by reader i mod `readers` alone. Processes
    may end after different numbers of batches; `empty_batch` fills the difference.

    Args:
        source, task_id: the task and its number.
        split: one of the source's; labels may be unknown where its name begins with "test".
        tokenizer, options: as for training; the seed is not used.
        table: filled with the examples, complete when the stream has ended.
        process, processes: which part of the readers runs here.
    """
    share = options.readers // processes
    first, block_shape = process * share, options.shape.split(options.readers)
    packers = [Packer(block_shape, options.padding) for _ in range(share)]
    table.counts = {source.task.name: {"texts": 0, "cut_texts": 0, "cut_tokens": 0}}

    def join(blocks: Sequence[Batch]) -> Batch:
        return concatenate(blocks, block_shape.groups, first)

    def flush(pending: list[tuple[int, Example]]) -> None:
        where = [f"{split} example {i}" for i, _ in pending]
        examples, unlabelled = [example for _, example in pending], split.startswith("test")
        segments = make_segments(
            source,
            task_id,
            examples,
            where,
            tokenizer,
            options.max_length,
            table.counts,
            first_id=0,
            unlabelled=unlabelled,
        )
        for (i, _), segment in zip(pending, segments, strict=True):
            packers[i % options.readers - first].add(Unit((segment._replace(example_id=i),)))

    pending: list[tuple[int, Example]] = []
    for batch in source.dataset(split).batch(CHUNK):
        for record in to_records(batch):
            for example in source.expand(record, split, None):
                number = len(table.labels)
                table.add(example)
                if first <= number % options.readers < first + share:
                    pending.append((number, example))
                if len(pending) >= CHUNK:
                    flush(pending)
                    pending = []
        while all(packer.ready for packer in packers):
            yield join([packer.emit() for packer in packers])
    flush(pending)
    while any(len(packer) for packer in packers):
        yield join(
            [packer.emit() if len(packer) else empty_batch(block_shape) for packer in packers]
        )


def _pack_bytes(header: bytes, arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        header=np.frombuffer(header, np.uint8),
        **{f"array/{name}": value for name, value in arrays.items()},
    )
    return buffer.getvalue()


def _unpack_bytes(content: bytes) -> tuple[bytes, dict[str, np.ndarray]]:
    with np.load(io.BytesIO(content)) as archive:
        return archive["header"].tobytes(), {
            name.removeprefix("array/"): archive[name]
            for name in archive.files
            if name.startswith("array/")
        }
