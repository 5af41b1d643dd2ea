"""The contract of a data source: a task, and its examples by number.

A source says which splits it has, how many records each holds, which examples a record stands for
and which files they were read from. Records are read by number, so that an epoch is a permutation
of whole numbers and a stream that stopped is resumed by knowing where it was.
"""

import abc
import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The part of a config that concerns sources.

    Attributes:
        list_size: documents in a training list of a ranking task.
        negative_ranks: (first, last) ranks of the first-stage run from which negatives are sampled,
            counted from 1.
        run: path of the first-stage run of ranking tasks that read files, `{split}` standing for
            the files' name of the split; "" for the one that lies with them.
        own: fields of `own_options.OwnOptions`, for the task `own`.
        max_train_examples, max_eval_examples: use only so many records of a split, the first ones; 0 for all.
        text: fields of `text.TextOptions`, for the task `text`.
    """

    list_size: int = 8
    negative_ranks: tuple[int, int] = (1, 1000)
    run: str = ""
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_train_examples: int = 0
    max_eval_examples: int = 0
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Any) -> "DataOptions":
        """The options of a whole config, a `training.config.TrainConfig`."""
        ranking = config.ranking
        files = {"own": dataclasses.asdict(config.own), "text": dataclasses.asdict(config.text)}
        return cls(
            ranking.list_size,
            ranking.negative_ranks,
            ranking.run,
            max_train_examples=config.max_train_examples,
            max_eval_examples=config.max_eval_examples,
            **files,
        )

    def limit(self, split: str) -> int:
        """The most records of `split` that are used, 0 for all."""
        return self.max_train_examples if split == "train" else self.max_eval_examples


class Record(NamedTuple):
    """The examples of a record; each is made when it is asked for.

    Attributes:
        labels: of every example.
        example: makes the example of an index.
    """

    labels: Sequence[Label]
    example: Callable[[int], Example]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Record":
        """The record of examples that are there already."""
        return cls([example.label for example in examples], examples.__getitem__)


class Source(abc.ABC):
    """A task together with its data.

    Args:
        task: what is learnt.
        options: the part of the config that concerns sources.

    Attributes:
        task, options: as given.
        splits: names of the splits.
        first_stage: tells that evaluation meets a query's documents in a first stage's order.
        mixture: name of the mixture of seqio that the task comes from, "" for none.
        rate: how often that mixture draws the task, relative to its other tasks.
    """

    splits: tuple[str, ...] = ("train", "validation", "test")
    first_stage = False
    mixture = ""
    rate = 1.0

    def __init__(self, task: Task, options: DataOptions):
        self.task, self.options = task, options

    def check(self) -> None:  # noqa: B027, most sources have nothing to check
        """Raises InputError where the data are missing, before anything slow is done."""

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Called before records are counted or read, for sources that cut texts into records."""
        del tokenizer, max_length

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """The number of records that a split has."""

    def size(self, split: str) -> int:
        """The number of records of a split that are used: as many as the options allow.

        Raises:
            InputError: the task has no such split.
        """
        if split not in self.splits:
            raise InputError(
                f"task {self.task.name!r} has no {split} split; it has {', '.join(self.splits)}"
            )
        count = self.count(split)
        return min(self.options.limit(split) or count, count)

    @abc.abstractmethod
    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The record at `index`: one example, the documents of a query, or a question's options.

        Args:
            split: one of `splits`.
            index: from 0 to size - 1.
            training: a training list will be drawn from the examples; a source whose evaluation
                has others (all that a first stage found) gives those that may be drawn.
        """

    def examples(
        self, split: str, index: int, rng: np.random.Generator | None = None
    ) -> list[Example]:
        """The examples of a record.

        Args:
            split: one of `splits`.
            index: from 0 to size - 1.
            rng: draws a training list: a positive first, then different negatives. None for
                evaluation, which gets every example.

        Returns:
            The examples; none where no training list can be drawn.
        """
        draws = rng is not None and self.task.is_list
        record = self.record(split, index, training=draws)
        if draws:
            return [record.example(i) for i in draw(record.labels, self.options.list_size, rng)]
        return [record.example(i) for i in range(len(record.labels))]

    def training_examples(self, index: int, seed: int, epoch: int) -> list[Example]:
        """The examples of a training record in an epoch, lists drawn by (seed, task, epoch, index)."""
        rng = np.random.default_rng([seed, self.key, epoch, index]) if self.task.is_list else None
        return self.examples("train", index, rng)

    @property
    def key(self) -> int:
        """A number for the task, the same in every mixture."""
        return zlib.crc32(self.task.name.encode())

    def files(self, split: str) -> Sequence[pathlib.Path]:
        """The files that a split is read from; none where a program makes it."""
        del split
        return ()

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Name and fingerprint of each file that a split is read from, in the order of reading.

        Raises:
            InputError: a file is gone.
        """
        try:
            return [(path.name, cache.fingerprint_as_read(path)) for path in self.files(split)]
        except OSError as error:
            raise InputError(f"task {self.task.name!r}: {one_line(error)}") from error

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Judged documents by query, for ranking; None where the labels are all there is."""
        del split
        return None

    def where(self, split: str, index: int) -> str:
        """Names a record in messages."""
        return f"{split} record {index + 1}"

    def raw(self, split: str, index: int) -> Mapping[str, Any]:
        """Columns of a record that are no fields of its text, to show a person."""
        del split, index
        return {}

    def evaluation_splits(self, name: str) -> dict[str, str]:
        """The splits that evaluating on `name` means, by what tells their metrics apart.

        That is the split of this name alone, by "", or all of its parts: of `validation`, MNLI has
        `validation_matched` and `validation_mismatched`, by "matched" and "mismatched". Nothing
        where the task has neither.
        """
        if name in self.splits:
            return {"": name}
        return {
            split.removeprefix(f"{name}_"): split
            for split in self.splits
            if split.startswith(f"{name}_")
        }


def draw(labels: Sequence[Label], list_size: int, rng: np.random.Generator) -> list[int]:
    """Draws a training list: indices of one positive, then of at most `list_size - 1` negatives.

    Returns:
        The indices; none where there is no positive or no negative.
    """
    is_positive = np.asarray(labels) > 0
    positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    if not len(positives) or not len(negatives):
        return []
    count = min(list_size - 1, len(negatives))
    first = positives[rng.integers(len(positives))]
    return [int(first), *negatives[rng.choice(len(negatives), count, replace=False)].tolist()]
