"""What every data source offers: a seqio task that yields records, and the examples that a record stands for.

Records are small and cheap to shuffle; whatever is large (passages) or random (negatives) is looked up when a record is
expanded. seqio and TensorFlow are imported when a stream is opened, not before.
"""

import abc
import dataclasses
import functools
import importlib
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from etils import epath

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.tokenizer import Tokenizer

Item = TypeVar("Item")
Row = Mapping[str, Any]  # one row of a table: text, numbers, lists of texts

SHUFFLE_BUFFER = 10_000  # records; a checkpoint holds them, so it costs a few megabytes there


@functools.cache
def load_seqio() -> ModuleType:
    """Imports seqio, and with it TensorFlow, whose C++ start-up notes reach no logging switch: they are kept back unless it fails."""
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


LIST_SEPARATOR = "\x1f"  # a record is scalars: a list of texts travels as one text


class TableSource(Source):
    """A task whose records are rows of a table.

    Args:
        task: what is learnt.
        options: what the config says about sources.
        columns: the text columns: for each name that `examples` uses, the column that holds it.
        label: the column that holds the label; None where there is none.
        numbers: columns of whole numbers, by name.
        lists: columns that hold a list of texts each, by name.
        examples: the examples of a row, which maps all those names (and "label") to values; by default one, whose fields are the
            text columns and whose info is the numbers.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        columns: Mapping[str, str],
        label: str | None = "label",
        *,
        numbers: Mapping[str, str] | None = None,
        lists: Mapping[str, str] | None = None,
        examples: Callable[[Row], list[Example]] | None = None,
    ):
        super().__init__(task, options)
        self.columns, self.label, self.numbers, self.lists = (
            dict(columns),
            label,
            dict(numbers or {}),
            dict(lists or {}),
        )
        self._examples = examples or self._example

    def _example(self, row: Row) -> list[Example]:
        return [
            Example(
                {field: row[field] for field in self.columns},
                row["label"],
                info={name: row[name] for name in self.numbers},
            )
        ]

    def features(self) -> Mapping[str, str]:
        """The columns by name, and the label."""
        label = {"label": "float32"} if self.label else {}
        return (
            dict.fromkeys([*self.columns, *self.lists], "string")
            | dict.fromkeys(self.numbers, "int32")
            | label
        )

    def preprocess(self, dataset: Any) -> Any:
        """Takes the columns by name, each as a scalar of the declared type; "idx/question" is the column "question" in "idx"."""
        import tensorflow as tf

        def column(record, path):
            for part in path.split("/"):
                record = record[part]
            return record

        def row(record):
            result = {name: column(record, path) for name, path in self.columns.items()}
            result |= {
                name: tf.strings.reduce_join(column(record, path), separator=LIST_SEPARATOR)
                for name, path in self.lists.items()
            }
            result |= {
                name: tf.cast(column(record, path), tf.int32) for name, path in self.numbers.items()
            }
            return result | (
                {"label": tf.cast(column(record, self.label), tf.float32)} if self.label else {}
            )

        return dataset.map(row)

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The examples of the row; for training, of a list one that is right and others that are wrong, or nothing where either lacks."""
        where = f"task {self.task.name!r}, {split} record{''.join(f' {name}={int(record[name])}' for name in self.numbers)}"
        row: dict[str, Any] = {name: _text(record[name], name, where) for name in self.columns}
        row |= {
            name: _text(record[name], name, where).split(LIST_SEPARATOR) if record[name] else []
            for name in self.lists
        }
        row |= {name: int(record[name]) for name in self.numbers}
        if self.label:
            row["label"] = float(record["label"])
        try:
            examples = self._examples(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if rng is None or not self.task.is_list:
            return examples
        right, wrong = [e for e in examples if e.label > 0], [e for e in examples if e.label <= 0]
        return sample_list(right, wrong, self.options.list_size, rng) if right and wrong else []


def _text(value: bytes, name: str, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: field {name!r} is not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def tfds_folder() -> str:
    """Where prepared datasets lie: what TFDS_DATA_DIR says, else TFDS's own default."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class TfdsSource(TableSource):
    """A task of TensorFlow Datasets, read from where `TFDS_DATA_DIR` points; nothing is downloaded.

    Args:
        task, options: as in TableSource.
        tfds_name: with its version, e.g. "glue/sst2:2.0.0".
        columns: by default the template's fields, from columns of the same names.
        splits: the dataset's.
        table: label, numbers, lists and examples, as in TableSource. By default the only number is `idx`, which submissions need.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        tfds_name: str,
        columns: Mapping[str, str] | None = None,
        *,
        splits: tuple[str, ...] = Source.splits,
        **table: Any,
    ):
        super().__init__(
            task,
            options,
            columns or {field: field for field in task.template.fields},
            **({"numbers": {"idx": "idx"}} | table),
        )
        self.tfds_name, self.splits = tfds_name, splits

    @property
    def folder(self) -> str:
        """Where prepared datasets lie."""
        return tfds_folder()

    def check(self) -> None:
        """Raises InputError where the dataset is not prepared."""
        name, version = self.tfds_name.split(":")
        if not epath.Path(self.folder, name, version).exists():
            raise InputError(
                f"task {self.task.name!r}: no prepared data in {self.folder}/{name}/{version}. Point TFDS_DATA_DIR at a folder that holds {name}/{version}, "
                f"or prepare it once with: tfds build {name} --data_dir={self.folder}"
            )

    def seqio_source(self, split: str) -> Any:
        """The seqio source over prepared TFDS files; raises InputError where they do not name the task's classes in the task's order."""
        seqio = load_seqio()
        whole = seqio.TfdsDataSource(
            self.tfds_name, tfds_data_dir=self.folder, splits=(split,), read_only=True
        )
        info, limit = whole.tfds_dataset.info, self.options.limit(split)
        if self.task.kind == "classification":
            prepared = tuple(info.features[self.label].names)
            if prepared != self.task.classes:
                raise InputError(
                    f"task {self.task.name!r}: the data in {self.folder}/{self.tfds_name.replace(':', '/')} name the classes {', '.join(prepared)}; "
                    f"expected {', '.join(self.task.classes)}; prepare them anew"
                )
        if not limit or limit >= info.splits[split].num_examples:
            return whole
        return seqio.TfdsDataSource(
            self.tfds_name,
            tfds_data_dir=self.folder,
            splits={split: f"{split}[:{limit}]"},
            read_only=True,
        )


def declare_tfds(
    task: Task, tfds_name: str, columns: Mapping[str, str] | None = None, **table: Any
) -> tuple[str, Callable[[DataOptions], Source]]:
    """A benchmark's declaration of one task: its name, and what makes its source. Arguments as in TfdsSource."""
    return task.name, lambda options: TfdsSource(task, options, tfds_name, columns, **table)
