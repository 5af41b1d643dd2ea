"""Sources that hold their examples in memory."""

import functools
from collections.abc import Callable, Sequence

from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.task import Example, Task


class MemorySource(Source):
    """A task whose examples come from a function.

    Args:
        task: the task to learn.
        options: the data options of the config.
        records: maps a split to its records, each a list of examples: a single one, or the
            documents of a query. Called once per split.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        records: Callable[[str], Sequence[Sequence[Example]]],
    ):
        super().__init__(task, options)
        self._records = functools.cache(records)

    def records(self, split: str) -> Sequence[Sequence[Example]]:
        """Returns the examples of every record of a split."""
        return self._records(split)

    def count(self, split: str) -> int:
        """Returns the number of records of the split."""
        return len(self.records(split))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns the examples of the record at `index`."""
        return Record.of(self.records(split)[index])
