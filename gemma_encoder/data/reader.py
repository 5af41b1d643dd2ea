"""Readers: each draws records of its shard by the mixture's rates, tokenizes them and packs rows.

A reader's state (the position in each task's dataset, records drawn but not yet packed, texts that
wait in the packer) is saved to the byte, so a restored reader continues exactly.
"""

import collections
import io
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, Segment, Unit
from gemma_encoder.inputs.task import Example
from gemma_encoder.inputs.template import encode
from gemma_encoder.inputs.tokenizer import Tokenizer

CHUNK = 64  # records that are read, and texts that are tokenized, at a time


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
