"""Unlabelled text, by config alone: `config.text`, task `text`, from which a decoder is pretrained.

    --config=pretrain_decoder --config.text.train="('reviews-*.txt.gz','tfds:glue/sst2')"

A source is a file of one text a line, a pattern that names several, or the text features of a
TensorFlow dataset's train split. Texts are read once, cut into pieces that fit the model, and held
as tables in the cache folder.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from gemma_encoder.data import cache, table, tfds
from gemma_encoder.data.files.lines import numbered
from gemma_encoder.data.files.paths import named_files
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping, option
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer

TFDS = "tfds:"
SLACK = 1.1  # parts of a long text are so much shorter than they might be: words differ in length
CHUNK = 1000  # texts that are tokenized at a time


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """`config.text`: where unlabeled text comes from. A text that comes twice counts once."""

    train: tuple[str, ...] = option(
        (),
        "sources: paths or patterns such as part-*.txt (plain, .gz or .zst; of a .tsv the last "
        "column), or tfds:NAME, all text features of the train split of a dataset that lies where "
        "TFDS_DATA_DIR points",
    )
    validation: tuple[str, ...] = option(
        (), "sources that are left out of train; by default a share of train is held out"
    )
    held_out: float = option(0.02, "that share; the same texts for every seed")

    def check(self) -> None:
        """Raises InputError where no source is named, or the share is none."""
        if not self.train:
            raise InputError(
                "text.train is not set; it names files and datasets, "
                "e.g. --config.text.train=\"('reviews.txt.gz','tfds:glue/sst2')\""
            )
        if not 0 < self.held_out < 1:
            raise InputError(f"text.held_out is a share between 0 and 1, got {self.held_out}")


class UnlabeledTexts:
    """The texts that some sources hold, those that are blank left out.

    Args:
        sources: files, patterns and datasets, as `TextOptions.train` names them.

    Raises:
        InputError: one of them is missing.
    """

    def __init__(self, sources: Sequence[str]):
        self.sources = sources
        self._parts: list[pathlib.Path | tfds.Dataset] = []
        for source in sources:
            if source.startswith(TFDS):
                self._parts.append(tfds.Dataset(source.removeprefix(TFDS), "text"))
            else:
                self._parts += named_files(source, "text")

    def files(self) -> list[pathlib.Path]:
        """All files that texts are read from."""
        return [
            path
            for part in self._parts
            for path in (part.files("train") if isinstance(part, tfds.Dataset) else [part])
        ]

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            read = _dataset_texts if isinstance(part, tfds.Dataset) else _file_texts
            yield from (text for text in read(part) if text.strip())

    def digests(self) -> np.ndarray:
        """[N] uint64 of the texts."""
        return np.fromiter((_digest(text) for text in self), np.uint64)


def _file_texts(path: pathlib.Path) -> Iterator[str]:
    """One text a line; of a table (`.tsv`), the last column."""
    is_table = ".tsv" in path.suffixes
    for _, line in numbered(path):
        text = line.rstrip("\r\n")
        yield text.rpartition("\t")[2] if is_table else text


def _dataset_texts(dataset: tfds.Dataset) -> Iterator[str]:
    """Every text feature of the train split."""
    rows = dataset.table("train")
    for index in range(len(rows)):
        for column, value in sorted(rows.row(index).items()):
            if isinstance(value, bytes):
                yield table.decode(value, column, f"text: {dataset.name} record {index + 1}")


def split_texts(texts: Sequence[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """The texts, each of more than `most` tokens cut into several at blanks.

    Joined by blanks the parts are the text again. They are about equal. A word that is too long by
    itself is cut between characters.
    """
    result: list[str] = []
    for text, ids in zip(texts, tokenizer.encode(list(texts)), strict=True):
        if len(ids) <= most or len(text) == 1:
            result.append(text)
            continue
        parts = _parts(text, math.ceil(SLACK * len(ids) / most))
        result += split_texts([part for part in parts if part.strip()], tokenizer, most)
    return result


def _parts(text: str, count: int) -> list[str]:
    """The text in at most `count` parts, cut at the first blanks behind even positions.

    There are at least two parts unless the text is one character.
    """
    parts, start = [], 0
    for number in range(1, count):
        blank = text.find(" ", max(len(text) * number // count, start + 1))
        if blank < 0 or not text[blank + 1 :].strip():
            break
        if text[start:blank].strip():
            parts.append(text[start:blank])
            start = blank + 1
    if parts:
        return [*parts, text[start:]]
    last = text.rstrip().rfind(" ")  # the only blanks are early ones, or there is none
    if text[: max(last, 0)].strip():
        return [text[:last], text[last + 1 :]]
    return [text[: len(text) // 2], text[len(text) // 2 :]]


class TextSource(Source):
    """Pieces of text as records, each short enough for `max_length`: nothing of a text is lost.

    Args:
        task: a language model's, of one field.
        options: the part of the config that concerns sources.
        text: the part that concerns this one.
    """

    splits = ("train", "validation")

    def __init__(self, task: Task, options: DataOptions, text: TextOptions):
        super().__init__(task, options)
        self.text = text
        self._fitting: tuple[Tokenizer, int] | None = None
        self._tables: dict[str, Table] | None = None

    def check(self) -> None:
        """Raises InputError where a file or a dataset is missing."""
        self._sources()

    def _sources(self) -> tuple[UnlabeledTexts, UnlabeledTexts]:
        """Those of train and of validation; the latter may have none."""
        return UnlabeledTexts(self.text.train), UnlabeledTexts(self.text.validation)

    def files(self, split: str) -> list[pathlib.Path]:
        """Files of the named sources; TFRecord files of datasets."""
        train, validation = self._sources()
        is_named = split == "validation" and validation.sources
        return (validation if is_named else train).files()

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Sets the tokenizer and the length, bos and eos included, that pieces are cut to."""
        self._fitting, self._tables = (tokenizer, max_length), None

    def _table(self, split: str) -> Table:
        if self._tables is None:
            self._tables = self._read()
        return self._tables[split]

    def _read(self) -> dict[str, Table]:
        import pyarrow as pa

        train, validation = self._sources()
        settings = [self.text.train, self.text.validation, self.text.held_out]
        if self._fitting is not None:
            tokenizer, length = self._fitting
            settings += [hashlib.sha256(tokenizer.model).hexdigest(), length]

        def write(folder: pathlib.Path) -> None:
            for split, (texts, used) in self._choose(train, validation).items():
                (folder / split).mkdir()
                pieces = self._pieces(itertools.compress(texts, used))
                table.write_table_rows(
                    folder / split, {"text": pa.large_string()}, ([p] for p in pieces)
                )
                table.write_summary(folder / split, {"texts": int(used.sum())})

        tables = cache.derive(
            [*train.files(), *validation.files()],
            f"pieces with {settings}",
            write,
            lambda folder: {split: Table(folder / split) for split in self.splits},
        )
        for split, rows in tables.items():
            if not len(rows):
                sources = ", ".join(getattr(self.text, split) or self.text.train)
                raise InputError(f"text.{split}: {sources} leave no text")
        if not self.text.validation:
            logging.warning(
                "text: %d of %d texts are held out for validation; text.validation names sources "
                "of your own",
                tables["validation"].summary["texts"],
                sum(rows.summary["texts"] for rows in tables.values()),
            )
        return tables

    def _choose(
        self, train: UnlabeledTexts, validation: UnlabeledTexts
    ) -> dict[str, tuple[UnlabeledTexts, np.ndarray]]:
        """For each split where its texts are, and which of them it has; 8 bytes a text in memory."""
        digests = train.digests()
        is_train = _first_of_each(digests)
        if self.text.validation:
            reserved = validation.digests()
            is_train &= ~np.isin(digests, reserved)
            return {
                "train": (train, is_train),
                "validation": (validation, _first_of_each(reserved)),
            }
        different = digests[is_train]
        held_out = min(max(round(self.text.held_out * len(different)), 1), len(different))
        last = np.partition(different, held_out - 1)[held_out - 1] if held_out else 0
        is_held_out = digests <= last
        return {
            "train": (train, is_train & ~is_held_out),
            "validation": (train, is_train & is_held_out),
        }

    def _pieces(self, texts: Iterator[str]) -> Iterator[str]:
        if self._fitting is None:
            yield from texts
            return
        tokenizer, length = self._fitting
        while chunk := list(itertools.islice(texts, CHUNK)):
            yield from split_texts(chunk, tokenizer, length - 2)

    def count(self, split: str) -> int:
        """Pieces."""
        return len(self._table(split))

    def pieces(self, split: str) -> Iterator[str]:
        """The texts of a split; after `fit` those that are too long are cut."""
        return (self._table(split).value("text", index) for index in range(self.size(split)))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """The piece."""
        return Record.of([Example({"text": self._table(split).value("text", index)}, 0.0)])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """[N] bool: whether no earlier value is the same."""
    result = np.zeros(len(values), bool)
    result[np.unique(values, return_index=True)[1]] = True
    return result


def _make(options: DataOptions) -> Source:
    text = from_mapping(TextOptions, options.text, "text")
    text.check()
    task = Task("text", "language_model", Template("{text}"), ("perplexity", "nll"))
    return TextSource(task, options, text)


TASKS: dict[str, Callable[[DataOptions], Source]] = {"text": _make}
