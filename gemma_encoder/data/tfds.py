"""Sources of tables: each record is a row, read from prepared TensorFlow Datasets."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from gemma_encoder.data.source import DataOptions, Source, load_seqio, sample_list
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task

Row = Mapping[str, Any]  # one row of a table: text, numbers, lists of texts

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
