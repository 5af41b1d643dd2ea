"""Interface of data sources: a task and its examples by index.

A source declares its splits, the number of records in each, the examples of a record, and the files
they were read from. Records support random access by index, so an epoch is a permutation of
indices, and the state of a stream is a few integers.
"""

import abc
import dataclasses
import pathlib
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_encoder.data import cache
from gemma_encoder.data.retrieval_options import RetrievalOptions
from gemma_encoder.inputs.errors import InputError, one_line
from gemma_encoder.inputs.kind import Label
from gemma_encoder.inputs.options import check_at_least
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.tokenizer import Tokenizer

HELD_OUT = "held out"  # begins the facts on held-out records in fingerprints


class StoredTask(NamedTuple):
    """A task as a checkpoint stores it.

    Attributes:
        task: the declaration.
        inferred: `Source.inferred` of its training data; empty if nothing was inferred.
        origin: names the checkpoint, for messages.
    """

    task: Task
    inferred: Mapping[str, Any]
    origin: str


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Data options of a config.

    Attributes:
        list_size: documents in a training list of a ranking task.
        negative_ranks: (first, last) ranks of the first-stage run from which negatives are sampled,
            counted from 1.
        run: path of the first-stage run for ranking tasks that read files; `{split}` is replaced by
            the split's name in file names. By default the run in the task's folder.
        own: fields of `own_options.OwnOptions`, for the task `own`.
        max_train_examples, max_eval_examples: use only the first records of a split; 0 for all.
        text: fields of `text.TextOptions`, for the task `text`.
        retrieval: data options of retrieval tasks.
        stored: tasks by name, as the checkpoint that is resumed or evaluated stores them: they take
            precedence over what a source would infer from its files.

    Raises:
        InputError: `list_size` or `negative_ranks` is invalid.
    """

    list_size: int = 8
    negative_ranks: tuple[int, int] = (1, 1000)
    run: str = ""
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_train_examples: int = 0
    max_eval_examples: int = 0
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, StoredTask] = dataclasses.field(default_factory=dict)
    retrieval: RetrievalOptions = dataclasses.field(default_factory=RetrievalOptions)

    def __post_init__(self):
        check_at_least("ranking", self, ("list_size",), 2)
        first, last = self.negative_ranks
        if not 1 <= first <= last:
            raise InputError(
                "ranking.negative_ranks must be (first, last) with 1 <= first <= last, got "
                f"{self.negative_ranks}"
            )

    @classmethod
    def from_config(
        cls, config: Any, stored: Mapping[str, StoredTask] | None = None
    ) -> "DataOptions":
        """Extracts the data options of a `training.config.TrainConfig`; `stored` as above."""
        ranking = config.ranking
        files = {"own": dataclasses.asdict(config.own), "text": dataclasses.asdict(config.text)}
        return cls(
            ranking.list_size,
            ranking.negative_ranks,
            ranking.run,
            max_train_examples=config.max_train_examples,
            max_eval_examples=config.max_eval_examples,
            stored=stored or {},
            retrieval=config.retrieval,
            **files,
        )

    def limit(self, split: str) -> int:
        """Returns the maximum number of records of `split` to use, 0 for all."""
        return self.max_train_examples if split == "train" else self.max_eval_examples


class Record(NamedTuple):
    """Lazy examples of a record.

    Attributes:
        labels: label of every example.
        example: creates the example at an index.
    """

    labels: Sequence[Label]
    example: Callable[[int], Example]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Record":
        """Returns a record of existing examples."""
        return cls([example.label for example in examples], examples.__getitem__)


class Source(abc.ABC):
    """A task together with its data.

    Args:
        task: the task to learn.
        options: the data options of the config.

    Attributes:
        task, options: the arguments of these names.
        splits: names of the splits.
        first_stage: True if evaluation reads a query's documents in the order of a first stage.
        mixture: name of the seqio mixture that the task comes from, "" for none.
        rate: sampling rate of the task in that mixture, relative to its other tasks.
        has_teacher: training labels have scores of a teacher.
        inferred: further decisions made from the training data, JSON-ready. Checkpoints store them
            beside the task, for `DataOptions.stored`.
    """

    splits: tuple[str, ...] = ("train", "validation", "test")
    first_stage = False
    mixture = ""
    rate = 1.0
    has_teacher = False
    inferred: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(self, task: Task, options: DataOptions):
        self.task = task
        self.options = options

    def check(self) -> None:  # noqa: B027, most sources have nothing to check
        """Raises InputError if data are missing; called before any slow work."""

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Called before records are counted or read, for sources that split texts into records."""
        del tokenizer, max_length

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """Returns the number of records of a split."""

    def size(self, split: str) -> int:
        """Returns the number of records of a split that are used, limited by the options.

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
        """Returns the record at `index`: one example, the documents of a query, or the options.

        Args:
            split: one of `splits`.
            index: index of the record, from 0 to size - 1.
            training: return the candidates for a training list, if they differ from the examples
                to evaluate (such as all documents that a first stage retrieved).
        """

    def examples(
        self, split: str, index: int, rng: np.random.Generator | None = None
    ) -> list[Example]:
        """Returns the examples of a record.

        Args:
            split: one of `splits`.
            index: index of the record, from 0 to size - 1.
            rng: samples a training list: a positive first, then different negatives. With None (for
                evaluation) all examples are returned.

        Returns:
            The examples; an empty list if no training list can be drawn.
        """
        draws = rng is not None and self.task.is_list
        record = self.record(split, index, training=draws)
        if draws:
            return [record.example(i) for i in self._draw(record.labels, rng)]
        return [record.example(i) for i in range(len(record.labels))]

    def _draw(self, labels: Sequence[Label], rng: np.random.Generator) -> list[int]:
        """Returns the indices of a training list; empty if none can be drawn."""
        if self.task.kind.embeds:
            retrieval = self.options.retrieval
            return draw_retrieval(labels, retrieval.positives, retrieval.negatives, rng)
        return draw(labels, self.options.list_size, rng)

    def training_examples(self, index: int, seed: int, epoch: int) -> list[Example]:
        """Returns the examples of a training record in an epoch.

        Training lists depend only on (seed, task, epoch, index).
        """
        rng = np.random.default_rng([seed, self.key, epoch, index]) if self.task.is_list else None
        return self.examples("train", index, rng)

    @property
    def range_is_inferred(self) -> bool:
        """True if the label range is that of the training targets: others may lie outside of it."""
        return self.inferred.get("range_is_inferred", False)

    @property
    def key(self) -> int:
        """Integer id of the task, the same in every mixture."""
        return zlib.crc32(self.task.name.encode())

    def files(self, split: str) -> Sequence[pathlib.Path]:
        """Returns the files that a split is read from; none if it is generated."""
        del split
        return ()

    def fingerprints(self, split: str) -> list[tuple[str, str]]:
        """Returns (name, fingerprint) of each file of a split, in reading order.

        Raises:
            InputError: a file no longer exists.
        """
        try:
            return [(path.name, cache.fingerprint_as_read(path)) for path in self.files(split)]
        except OSError as error:
            raise InputError(f"task {self.task.name!r}: {one_line(error)}") from error

    def is_held_out(self, split: str) -> bool:
        """Returns True if the records of a split are held out of the training files."""
        return any(f", {HELD_OUT} " in fingerprint for _, fingerprint in self.fingerprints(split))

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Returns relevance grades by query and document; None if the labels are complete."""
        del split
        return None

    def where(self, split: str, index: int) -> str:
        """Returns the location of a record, for messages."""
        return f"{split} record {index + 1}"

    def raw(self, split: str, index: int) -> Mapping[str, Any]:
        """Returns columns of a record that are not fields of its text, for display."""
        del split, index
        return {}

    def evaluation_splits(self, name: str) -> dict[str, str]:
        """Returns the splits to evaluate for `name`, keyed by the suffix of their metrics.

        Either the split `name` itself, keyed by "", or all splits `name_SUFFIX`: for `validation`,
        MNLI has `validation_matched` and `validation_mismatched`, keyed by "matched" and
        "mismatched". Empty if the task has neither.
        """
        if name in self.splits:
            return {"": name}
        return {
            split.removeprefix(f"{name}_"): split
            for split in self.splits
            if split.startswith(f"{name}_")
        }


def draw(labels: Sequence[Label], list_size: int, rng: np.random.Generator) -> list[int]:
    """Samples a training list: one positive, then at most `list_size - 1` different negatives.

    Returns:
        Indices into `labels`; empty if there is no positive or no negative.
    """
    is_positive = np.asarray(labels) > 0
    positives = np.flatnonzero(is_positive)
    negatives = np.flatnonzero(~is_positive)
    if not len(positives) or not len(negatives):
        return []
    count = min(list_size - 1, len(negatives))
    positive = positives[rng.integers(len(positives))]
    sampled = negatives[rng.choice(len(negatives), count, replace=False)]
    return [int(positive), *sampled.tolist()]


def draw_retrieval(
    labels: Sequence[Label], max_positives: int, max_negatives: int, rng: np.random.Generator
) -> list[int]:
    """Samples a training list of retrieval: the query, positives, then negatives.

    Args:
        labels: 0 for the query, which comes first, then a grade, or (grade, teacher's score), of
            each document.
        max_positives, max_negatives: most documents of a kind.
        rng: the randomness.

    Returns:
        Indices into `labels`; empty if there is no positive.
    """
    grades = np.array([label[0] if isinstance(label, tuple) else label for label in labels[1:]])
    positives = 1 + np.flatnonzero(grades > 0)
    negatives = 1 + np.flatnonzero(grades == 0)
    if not len(positives):
        return []
    sampled = [
        rng.choice(indices, min(count, len(indices)), replace=False).tolist()
        for indices, count in ((positives, max_positives), (negatives, max_negatives))
    ]
    return [0, *sampled[0], *sampled[1]]
