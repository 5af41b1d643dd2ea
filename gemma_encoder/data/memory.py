"""Sources that hold their examples in memory."""

import functools
from collections.abc import Callable, Sequence

from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.inputs.task import Example, Task


class MemorySource(Source):
    """A task whose examples a function makes or holds.

    Args:
        task: what is learnt.
        options: the part of the config that concerns sources.
        records: for a split, one list of examples per record: a single one, or the documents of a
            query.
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
        """The examples of every record of a split."""
        return self._records(split)

    def count(self, split: str) -> int:
        """Those that the function gave."""
        return len(self.records(split))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The examples at `index`."""
        return Record.of(self.records(split)[index])
