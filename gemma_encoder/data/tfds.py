"""Sources over prepared TensorFlow Datasets (TFDS), converted to Arrow tables when first read.

TensorFlow is imported only for the conversion: later starts, and other tasks with the same data,
read the table from the cache folder.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from gemma_encoder import runtime
from gemma_encoder.data import cache, table
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError, described
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

Row = Mapping[str, Any]  # column -> text, integer or list of texts


def data_folder() -> str:
    """Returns the folder of prepared datasets: `TFDS_DATA_DIR`, or the default of TFDS."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class Dataset:
    """A prepared dataset, with its splits as tables.

    Args:
        name: TFDS name with a version, e.g. "glue/sst2:2.0.0"; without a version, the newest one
            that is prepared.
        needed_by: prefix of the message if the data are missing.

    Raises:
        InputError: the dataset is not prepared.
    """

    def __init__(self, name: str, needed_by: str):
        name, _, version = name.partition(":")
        self.name = name
        self._root = epath.Path(data_folder())
        descriptions = self._root.glob(f"{name}/{version or '*'}/dataset_info.json")
        folders = sorted(descriptions, key=lambda path: _version(path.parent.name))
        if not folders:
            raise InputError(
                f"{needed_by}: no prepared data in {self._root / name / version}. Point "
                f"TFDS_DATA_DIR at a folder that contains {name}, or prepare it once with: "
                f"tfds build {name} --data_dir={self._root}"
            )
        self.folder = folders[-1].parent

    def files(self, split: str) -> list[epath.Path | pathlib.Path]:
        """Returns the files of a split."""
        paths = sorted(self.folder.glob(f"*-{split}.*"))
        if not paths:
            raise InputError(f"{self.folder} has no files of the split {split}")
        return [path if "://" in str(path) else pathlib.Path(path) for path in paths]

    def table(self, split: str) -> Table:
        """Returns a split as a table: text as bytes, nested features as "outer/inner"."""
        description = f"table of {self.name} {split}"
        try:
            folder = cache.keep(self.files(split), description, lambda to: self._write(to, split))
            return Table(folder)
        except InputError:
            raise
        except Exception as error:  # TensorFlow raises its own types for damaged files
            raise InputError(
                f"the {split} split in {self.folder} cannot be read: {described(error)[:300]}"
            ) from error

    def _write(self, folder: pathlib.Path, split: str) -> None:
        import pyarrow as pa

        runtime.import_quietly("tensorflow")  # tensorflow_datasets would import it with warnings
        tfds = runtime.import_quietly("tensorflow_datasets")
        builder = tfds.builder_from_directory(str(self.folder))
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
        rows = (dict(_flat(record)) for record in tfds.as_numpy(dataset))
        first = list(itertools.islice(rows, table.BATCH))
        schema = pa.Table.from_pylist(first).schema
        types = {field.name: _wide(field.type) for field in schema}
        values = ([row[name] for name in types] for row in itertools.chain(first, rows))
        table.write_table_rows(folder, types, values)
        features = builder.info.features.items()
        classes = {name: feature.names for name, feature in features if hasattr(feature, "names")}
        table.write_summary(folder, {"classes": classes})


def _version(name: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of a nested record with names such as "outer/inner"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value.tolist() if hasattr(value, "tolist") else value


def _wide(kind: Any) -> Any:
    """Returns the Arrow type with 64-bit offsets, for columns of more than 2 GB."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(_wide(kind.value_type))
    return pa.large_binary() if pa.types.is_binary(kind) else kind


class TfdsSource(Source):
    """A task of TensorFlow Datasets, read from `TFDS_DATA_DIR`; nothing is downloaded.

    Args:
        task: the task to learn.
        options: the data options of the config.
        tfds_name: TFDS name with a version, e.g. "glue/sst2:2.0.0".
        columns: the names used by `examples`, mapped to columns of texts, integers or lists of
            texts. "idx/question" is the column "question" nested in "idx". By default the fields of
            the template and `idx`, which submissions need.
        splits: splits of the dataset.
        label: column of the label; None if there is none.
        examples: converts a row (a mapping from the names in `columns`, and "label", to values) to
            examples. By default to one example with the fields of the template and `idx` as info.
    """

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        tfds_name: str,
        columns: Mapping[str, str] | None = None,
        *,
        splits: tuple[str, ...] = Source.splits,
        label: str | None = "label",
        examples: Callable[[Row], list[Example]] | None = None,
    ):
        super().__init__(task, options)
        self.tfds_name = tfds_name
        self.splits = splits
        self.label = label
        self.columns = columns or {name: name for name in (*task.template.fields, "idx")}
        self._examples = examples or self._example
        self.table = functools.cache(self._table)  # by split

    def _example(self, row: Row) -> list[Example]:
        fields = {field: row[field] for field in self.task.template.fields}
        return [Example(fields, row["label"], info={"idx": row["idx"]})]

    @functools.cached_property
    def _dataset(self) -> Dataset:
        return Dataset(self.tfds_name, f"task {self.task.name!r}")

    def check(self) -> None:
        """Raises InputError if the dataset is not prepared."""
        _ = self._dataset

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the TFRecord files of a split."""
        return self._dataset.files(split)

    def _table(self, split: str) -> Table:
        """Returns the rows of a split; raises InputError if their classes are not the task's."""
        dataset = self._dataset
        rows = dataset.table(split)
        expected = self.task.classes
        actual = tuple(rows.summary["classes"].get(self.label, ()))
        if expected and actual != expected:
            raise InputError(
                f"task {self.task.name!r}: the data in {dataset.folder} have the classes "
                f"{', '.join(actual)}; expected {', '.join(expected)}; prepare them again"
            )
        return rows

    def count(self, split: str) -> int:
        """Returns the number of rows from the dataset's metadata."""
        path = self._dataset.folder / "dataset_info.json"
        try:
            info = from_json(path.read_bytes())
            counts = {
                metadata["name"]: sum(map(int, metadata["shardLengths"]))
                for metadata in info["splits"]
            }
            return counts[split]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not describe {split}: {described(error)}") from error

    def row(self, split: str, index: int) -> dict[str, Any]:
        """Returns a row by the names in `columns`; raises InputError if text is not valid UTF-8."""
        values = self.table(split).row(index)
        row = {name: values[column] for name, column in self.columns.items()}
        where = self._where_row(split, index, row)
        for name, value in row.items():
            if isinstance(value, bytes):
                row[name] = table.decode(value, name, where)
            elif isinstance(value, list):
                row[name] = [table.decode(text, name, where) for text in value]
        return row | ({"label": float(values[self.label])} if self.label else {})

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns the examples of a row."""
        row = self.row(split, index)
        try:
            return Record.of(self._examples(row))
        except InputError as error:
            raise InputError(f"{self._where_row(split, index, row)}: {error}") from error

    def _where_row(self, split: str, index: int, row: Row) -> str:
        """Returns the location of a row for messages, with its integers such as `idx`."""
        ids = [f" {name}={value}" for name, value in row.items() if isinstance(value, int)]
        return "".join([f"task {self.task.name!r}, {self.where(split, index)}", *ids])

    def raw(self, split: str, index: int) -> Mapping[str, Any]:
        """Returns all columns except the label."""
        return {name: value for name, value in self.row(split, index).items() if name != "label"}


def declare_t5(
    name: str,
    tfds_name: str,
    fields: str,
    metrics: str,
    classes: str = "",
    *,
    kind: str = "classification",
    splits: str = " ".join(Source.splits),
    truncation: str = "",
    head: str = "",
    label_range: tuple[float, float] = (0.0, 1.0),
    **table: Any,
) -> tuple[str, Callable[[DataOptions], Source]]:
    """Declares a task with the text format of T5 (arXiv 1910.10683, appendix D).

    The text is the name of the task that trains the head, followed by all fields with their names:
    "rte sentence1: … sentence2: …".

    Args:
        name: name of the task with the suite, e.g. "glue_rte".
        fields, metrics, classes, splits, truncation: names separated by spaces.
        tfds_name, table: arguments of `TfdsSource`. All others are arguments of `Task`.

    Returns:
        The name, and the function that creates the source for given options.
    """
    text = (head or name).partition("_")[2]
    text += "".join(f" {field}: {{{field}}}" for field in fields.split())
    task = Task(
        name,
        kind,
        Template(text, tuple(truncation.split())),
        tuple(metrics.split()),
        tuple(classes.split()),
        label_range,
        head,
    )
    table["splits"] = tuple(splits.split())
    return name, lambda options: TfdsSource(task, options, tfds_name, **table)
