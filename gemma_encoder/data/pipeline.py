"""Streams of training batches.

Step n's global batch is a function of the config and n alone, whatever the number of hosts. The
stream is cut into `readers`, a constant of the config: reader r takes shard r of every task, draws
from the tasks by the mixture's rates, packs its own rows, and fills block r of each global batch.
A process runs its share of the readers.
"""

import collections
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from gemma_encoder.data.reader import Reader
from gemma_encoder.data.source import Source
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import Batch, concatenate
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.tokenizer import Tokenizer

PREFETCH = 4  # batches made ahead
MEASURED = 16  # batches whose average says how many examples a batch holds


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
