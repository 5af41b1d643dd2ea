"""What every data source offers: a seqio task that yields records, and the examples that a record stands for.

Records are small and cheap to shuffle; whatever is large (passages) or random (negatives) is looked up when a record is
expanded. seqio and TensorFlow are imported when a stream is opened, not before.
"""

import abc
import dataclasses
import functools
import importlib
import logging
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import absl.logging
import numpy as np

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.tokenizer import Tokenizer

Item = TypeVar("Item")

SHUFFLE_BUFFER = 10_000  # records; a checkpoint holds them, so it costs a few megabytes there


@functools.cache
def load_seqio() -> ModuleType:
    """Imports seqio, and with it TensorFlow.

    TensorFlow's C++ start-up notes reach no logging switch: they are held back unless it fails.
    seqio warns at each start that sources are not cached, whatever their size: that is logged only
    where absl logs more than warnings.
    """
    logging.getLogger("absl").addFilter(
        lambda record: (
            absl.logging.get_verbosity() > absl.logging.WARNING or "seqio" not in record.pathname
        )
    )
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            return importlib.import_module("seqio")
        except BaseException:
            notes.seek(0)
            os.write(stderr, notes.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What a config says about sources.

    Attributes:
        list_size: documents in a training list of a ranking task.
        negative_ranks: (first, last) ranks of the first-stage run from which negatives are sampled, counted from 1.
        run: path of the first-stage run of ranking tasks that read files, `{split}` standing for the files' name of the split; "" for
            the one that lies with them.
        own: fields of `own.OwnOptions`, for the task `own`.
        text: fields of `text.TextOptions`, for the task `text`.
        max_train, max_eval: use only so many records of a split, the first ones; 0 for all.
    """

    list_size: int = 8
    negative_ranks: tuple[int, int] = (1, 1000)
    run: str = ""
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_train: int = 0
    max_eval: int = 0
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
            max_train=config.max_train,
            max_eval=config.max_eval,
            **files,
        )

    def limit(self, split: str) -> int:
        """The most records of `split`, 0 for all."""
        return self.max_train if split == "train" else self.max_eval


class Source(abc.ABC):
    """A task together with its data.

    Args:
        task: what is learnt.
        options: what the config says about sources.
    """

    splits: tuple[str, ...] = ("train", "validation", "test")
    shuffle_buffer = SHUFFLE_BUFFER
    first_stage = False  # whether evaluation meets a query's documents in the order in which a first stage ranked them

    def __init__(self, task: Task, options: DataOptions):
        self.task, self.options = task, options

    @abc.abstractmethod
    def check(self) -> None:
        """Raises InputError where the data are missing, before anything slow is done."""

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Told before records are counted or read what their texts will be tokenised with; for a source whose records depend on it."""
        del tokenizer, max_length

    @abc.abstractmethod
    def seqio_source(self, split: str) -> Any:
        """The `seqio.DataSource` of one split."""

    @abc.abstractmethod
    def preprocess(self, dataset: Any) -> Any:
        """Maps the source's `tf.data.Dataset` to records: dictionaries of scalars."""

    @abc.abstractmethod
    def features(self) -> Mapping[str, str]:
        """Name and TensorFlow dtype ("string", "float32", "int32") of each scalar of a record."""

    @abc.abstractmethod
    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The examples of a record: one, the documents of a query, or the options of a question; none where training skips it.

        Args:
            record: scalars as `features` declares them, text as bytes.
            split: where it comes from.
            rng: draws what is random in training (the negatives of a list); None for evaluation, which draws nothing.
        """

    def evaluation_splits(self, name: str) -> dict[str, str]:
        """The splits that evaluating on `name` means, by what tells their metrics apart.

        That is the split of this name alone, by "", or all of its parts: of `validation`, MNLI has `validation_matched` and
        `validation_mismatched`, by "matched" and "mismatched". Nothing where the task has neither.
        """
        if name in self.splits:
            return {"": name}
        return {
            split.removeprefix(f"{name}_"): split
            for split in self.splits
            if split.startswith(f"{name}_")
        }

    def seqio_task(self, split: str) -> Any:
        """The seqio task of one split."""
        seqio = load_seqio()
        import tensorflow as tf

        features = {
            name: seqio.Feature(
                seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.as_dtype(dtype), rank=0
            )
            for name, dtype in self.features().items()
        }
        return seqio.Task(
            f"{self.task.name}_{split.replace('/', '_')}",
            source=self.seqio_source(split),
            preprocessors=[self.preprocess],
            output_features=features,
            shuffle_buffer_size=self.shuffle_buffer,
        )

    def training_epoch(self, seed: int, epoch: int, shard: int, shards: int) -> Any:
        """The records of one epoch as a `tf.data.Dataset`: shard `shard` of `shards`, in an order of its own that hangs on the arguments alone."""
        return self.dataset(
            "train",
            seed=int(np.random.SeedSequence([seed, self._key, epoch]).generate_state(1)[0] >> 1),
            shard=shard,
            shards=shards,
        )

    def training_examples(
        self, record: Mapping[str, Any], seed: int, epoch: int, shard: int, place: int
    ) -> list[Example]:
        """The examples of the record at `place` of a shard of an epoch; none where training skips it."""
        return self.expand(
            record, "train", np.random.default_rng([seed, self._key, epoch, shard, place])
        )

    @property
    def _key(self) -> int:
        """A number for the task, the same in every mixture."""
        return zlib.crc32(self.task.name.encode())

    def dataset(
        self, split: str, *, seed: int | None = None, shard: int = 0, shards: int = 1
    ) -> Any:
        """One pass over a split as a `tf.data.Dataset` of records, shuffled if there is a seed; shard `shard` of `shards`."""
        if split not in self.splits:
            raise InputError(
                f"task {self.task.name!r} has no {split} split; it has {', '.join(self.splits)}"
            )
        return self._dataset(split, seed, shard, shards)

    def _dataset(self, split: str, seed: int | None = None, shard: int = 0, shards: int = 1) -> Any:
        """The same for whatever `seqio_source` knows as a split."""
        seqio = load_seqio()
        import tensorflow as tf

        dataset = self.seqio_task(split).get_dataset(
            split=split,
            shuffle=seed is not None,
            seed=seed,
            shard_info=seqio.ShardInfo(shard, shards),
            num_epochs=1,
            try_in_mem_cache=False,  # a cached dataset would be copied into every checkpoint
        )
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = 1
        options.autotune.enabled = False
        return dataset.with_options(options)

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """Relevance grades of judged documents by query, for ranking; None where the examples' own labels are all there is."""
        del split
        return None

    def num_records(self, split: str) -> int:
        """Records in one pass over a split."""
        return int(self.seqio_source(split).num_input_examples(split))


def sample_list(
    positives: Sequence[Item], negatives: Sequence[Item], list_size: int, rng: np.random.Generator
) -> list[Item]:
    """A training list: one of the positives, then at most `list_size − 1` different negatives."""
    count = min(list_size - 1, len(negatives))
    return [
        positives[rng.integers(len(positives))],
        *(negatives[i] for i in rng.choice(len(negatives), count, replace=False)),
    ]
