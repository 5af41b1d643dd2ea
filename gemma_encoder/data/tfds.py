"""Sources over prepared TensorFlow Datasets, whose splits become Arrow tables when first read.

TensorFlow is imported for that first reading alone: a table in the cache folder serves every later
start and every task of the same data.
"""

import functools
import itertools
import json
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
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

Row = Mapping[str, Any]  # of a table: texts, whole numbers, lists of texts


def data_folder() -> str:
    """The folder of prepared datasets: `TFDS_DATA_DIR`, else TFDS's own default."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class Dataset:
    """A prepared dataset: its splits as tables.

    Args:
        name: as TFDS has it, with its version, e.g. "glue/sst2:2.0.0"; without one, the newest that
            is prepared.
        needed_by: begins the message where the data are missing.

    Raises:
        InputError: the dataset is not prepared.
    """

    def __init__(self, name: str, needed_by: str):
        name, _, version = name.partition(":")
        self.name, self._root = name, epath.Path(data_folder())
        descriptions = self._root.glob(f"{name}/{version or '*'}/dataset_info.json")
        folders = sorted(descriptions, key=lambda path: _version(path.parent.name))
        if not folders:
            raise InputError(
                f"{needed_by}: no prepared data in {self._root / name / version}. Point "
                f"TFDS_DATA_DIR at a folder that holds {name}, or prepare it once with: "
                f"tfds build {name} --data_dir={self._root}"
            )
        self.folder = folders[-1].parent

    def files(self, split: str) -> list[epath.Path | pathlib.Path]:
        """The files of a split."""
        names = sorted(self.folder.glob(f"*-{split}.*"))
        if not names:
            raise InputError(f"{self.folder} holds no files of the split {split}")
        return [name if "://" in str(name) else pathlib.Path(name) for name in names]

    def table(self, split: str) -> Table:
        """The split as a table: text as bytes, nested features as "outer/inner"."""
        what = f"table of {self.name} {split}"
        try:
            return Table(cache.keep(self.files(split), what, lambda to: self._write(to, split)))
        except InputError:
            raise
        except Exception as error:  # TensorFlow's own, of files that are damaged
            raise InputError(
                f"the {split} split in {self.folder} cannot be read: {described(error)[:300]}"
            ) from error

    def _write(self, folder: pathlib.Path, split: str) -> None:
        import pyarrow as pa

        runtime.import_quietly("tensorflow")  # which the next one imports later, and loudly
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
        classes = {name: one.names for name, one in features if hasattr(one, "names")}
        table.write_summary(folder, {"classes": classes})


def _version(name: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value.tolist() if hasattr(value, "tolist") else value


def _wide(kind: Any) -> Any:
    """The Arrow type with room for more than 2 GB of text."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(_wide(kind.value_type))
    return pa.large_binary() if pa.types.is_binary(kind) else kind


class TfdsSource(Source):
    """A task of TensorFlow Datasets, read from where `TFDS_DATA_DIR` points; nothing is downloaded.

    Args:
        task: what is learnt.
        options: the part of the config that concerns sources.
        tfds_name: with its version, e.g. "glue/sst2:2.0.0".
        columns: for each name that `examples` uses, the column that holds it: a text, a whole
            number, or a list of texts. By default the template's fields and `idx`, which
            submissions need, from columns of the same names. "idx/question" is the column
            "question" in "idx".
        splits: the dataset's.
        label: the column that holds the label; None where there is none.
        examples: the examples of a row, which maps all those names (and "label") to values; by
            default one, whose fields are those of the template and whose info is `idx`.
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
        self.tfds_name, self.splits, self.label = tfds_name, splits, label
        self.columns = columns or {name: name for name in (*task.template.fields, "idx")}
        self._examples = examples or self._example
        self.table = functools.cache(self._table)  # of a split

    def _example(self, row: Row) -> list[Example]:
        fields = {field: row[field] for field in self.task.template.fields}
        return [Example(fields, row["label"], info={"idx": row["idx"]})]

    @functools.cached_property
    def _dataset(self) -> Dataset:
        return Dataset(self.tfds_name, f"task {self.task.name!r}")

    def check(self) -> None:
        """Raises InputError where the dataset is not prepared."""
        _ = self._dataset

    def files(self, split: str) -> list[pathlib.Path]:
        """The TFRecord files."""
        return self._dataset.files(split)

    def _table(self, split: str) -> Table:
        """The rows; raises InputError where they name the task's classes in another order."""
        dataset, classes = self._dataset, self.task.classes
        rows = dataset.table(split)
        names = tuple(rows.summary["classes"].get(self.label, ()))
        if classes and names != classes:
            raise InputError(
                f"task {self.task.name!r}: the data in {dataset.folder} name the classes "
                f"{', '.join(names)}; expected {', '.join(classes)}; prepare them anew"
            )
        return rows

    def count(self, split: str) -> int:
        """Rows, by the dataset's description."""
        path = self._dataset.folder / "dataset_info.json"
        try:
            info = json.loads(path.read_text())
            counts = {one["name"]: sum(map(int, one["shardLengths"])) for one in info["splits"]}
            return counts[split]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not describe {split}: {described(error)}") from error

    def row(self, split: str, index: int) -> dict[str, Any]:
        """The row by the task's names for its columns; raises InputError for text that is none."""
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
        """The examples of a row."""
        row = self.row(split, index)
        try:
            return Record.of(self._examples(row))
        except InputError as error:
            raise InputError(f"{self._where_row(split, index, row)}: {error}") from error

    def _where_row(self, split: str, index: int, row: Row) -> str:
        numbers = [f" {name}={value}" for name, value in row.items() if isinstance(value, int)]
        return "".join([f"task {self.task.name!r}, {self.where(split, index)}", *numbers])

    def raw(self, split: str, index: int) -> Mapping[str, Any]:
        """All columns but the label."""
        return {name: value for name, value in self.row(split, index).items() if name != "label"}


def declare_t5(
    name: str,
    tfds_name: str,
    fields: str,
    metrics: str,
    classes: str = "",
    chance: float | None = None,
    *,
    kind: str = "classification",
    splits: str = " ".join(Source.splits),
    truncation: str = "",
    head: str = "",
    label_range: tuple[float, float] = (0.0, 1.0),
    **table: Any,
) -> tuple[str, Callable[[DataOptions], Source]]:
    """The declaration of a task whose text is written as T5 does (arXiv 1910.10683, appendix D).

    The text is the name of the task that trains the head, then every field behind its own name:
    "rte sentence1: … sentence2: …".

    Args:
        name: with the suite, e.g. "glue_rte".
        fields, metrics, classes, splits, truncation: names, separated by blanks.
        tfds_name, table: as for TfdsSource; the other arguments are those of Task.
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
        chance,
    )
    table["splits"] = tuple(splits.split())
    return name, lambda options: TfdsSource(task, options, tfds_name, **table)
