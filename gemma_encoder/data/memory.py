"""Sources whose records are numbers, and sources that hold their examples in memory."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder.data.source import DataOptions, Source, load_seqio, sample_list
from gemma_encoder.inputs.task import Example, Task


class NumberedSource(Source):
    """A source whose records are mere numbers 0 … n − 1; what they stand for is looked up when a record is expanded.

    Numbers are shuffled by a seeded permutation of all of them, so an epoch's order does not follow the file's, however the file is sorted.
    """

    shuffle_buffer = 1

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """n."""

    def seqio_source(self, split: str) -> Any:
        """The seqio source of the numbers."""
        seqio = load_seqio()
        import tensorflow as tf

        count = self.count(split)

        def numbers(split, shuffle_files, seed=None):
            del split
            dataset = tf.data.Dataset.range(count)
            if shuffle_files:
                key = tf.constant(np.random.SeedSequence(seed).generate_state(3), tf.uint32)
                # The raw operation: tf.random.experimental.index_shuffle fails inside tf.data.
                dataset = dataset.map(
                    lambda number: tf.raw_ops.RandomIndexShuffle(
                        index=number, seed=key, max_index=tf.cast(count - 1, tf.int64), rounds=8
                    )
                )
            return dataset.map(lambda number: {"number": tf.cast(number, tf.int32)})

        return seqio.FunctionDataSource(numbers, splits=(split,), num_input_examples={split: count})

    def preprocess(self, dataset: Any) -> Any:
        """Records need no change."""
        return dataset

    def features(self) -> Mapping[str, str]:
        """The number."""
        return {"number": "int32"}


class MemorySource(NumberedSource):
    """A task whose examples a function makes or holds.

    Args:
        task: what is learnt.
        options: what the config says about sources.
        records: for a split, one list of examples per record: a single one, or the documents of a query.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        records: Callable[[str], Sequence[Sequence[Example]]],
    ):
        super().__init__(task, options)
        self._make, self._records = records, {}

    def check(self) -> None:
        """Memory is always there."""

    def records(self, split: str) -> Sequence[Sequence[Example]]:
        """The examples of every record of a split, as many as the options allow."""
        if split not in self._records:
            records = self._make(split)
            self._records[split] = records[: self.options.limit(split) or len(records)]
        return self._records[split]

    def count(self, split: str) -> int:
        """How many records a split has."""
        return len(self.records(split))

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The examples of the record; of a training list that is longer than `list_size`, a sample."""
        examples = list(self.records(split)[int(record["number"])])
        if rng is None or len(examples) <= self.options.list_size:
            return examples
        return sample_list(
            [e for e in examples if e.label > 0],
            [e for e in examples if e.label <= 0],
            self.options.list_size,
            rng,
        )
