"""Task `text`: unlabeled text for pretraining a decoder, described by `config.text`.

    --config=pretrain_decoder --config.text.train="('reviews-*.txt.gz','tfds:glue/sst2')"

A source is a file with one text per line, a pattern for several files, or the text features in the
train split of a TensorFlow dataset. Texts are read once, split into pieces that fit the model, and
stored as tables in the cache folder.
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
from gemma_encoder.data.files.lines import text_lines
from gemma_encoder.data.files.paths import named_files
from gemma_encoder.data.source import DataOptions, Record, Source
from gemma_encoder.data.table import Table
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping, option
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer

TFDS = "tfds:"
SLACK = 1.1  # ratio of the maximum to the mean length of pieces, since words differ in length
CHUNK = 1000  # texts per call of the tokenizer


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """`config.text`: sources of unlabeled text. Duplicate texts are used once."""

    train: tuple[str, ...] = option(
        (),
        "sources: paths or patterns such as part-*.txt (plain, .gz or .zst; for .tsv the last "
        "column), or tfds:NAME for all text features in the train split of a dataset in "
        "TFDS_DATA_DIR",
    )
    validation: tuple[str, ...] = option(
        (), "sources to exclude from train; by default a fraction of train is held out"
    )
    held_out: float = option(0.02, "the held out fraction; the same texts for every seed")

    def check(self) -> None:
        """Raises InputError if there is no source, or the fraction is invalid."""
        if not self.train:
            raise InputError(
                "text.train is not set; set it to files and datasets, "
                "e.g. --config.text.train=\"('reviews.txt.gz','tfds:glue/sst2')\""
            )
        if not 0 < self.held_out < 1:
            raise InputError(f"text.held_out must be between 0 and 1, got {self.held_out}")


class UnlabeledTexts:
    """Iterable of the texts of sources, without blank ones.

    Args:
        sources: files, patterns and datasets, as in `TextOptions.train`.

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
        """Returns all files of the sources."""
        paths: list[pathlib.Path] = []
        for part in self._parts:
            paths += part.files("train") if isinstance(part, tfds.Dataset) else [part]
        return paths

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            read = _dataset_texts if isinstance(part, tfds.Dataset) else _file_texts
            yield from (text for text in read(part) if text.strip())

    def digests(self) -> np.ndarray:
        """Returns [N] uint64, a digest of each text."""
        return np.fromiter((_digest(text) for text in self), np.uint64)


def _file_texts(path: pathlib.Path) -> Iterator[str]:
    """Yields one text per line, from tables (`.tsv`) the last column."""
    is_table = ".tsv" in path.suffixes
    for _, text in text_lines(path):
        yield text.rpartition("\t")[2] if is_table else text


def _dataset_texts(dataset: tfds.Dataset) -> Iterator[str]:
    """Yields all text features of the train split."""
    rows = dataset.table("train")
    for index in range(len(rows)):
        for column, value in sorted(rows.row(index).items()):
            if isinstance(value, bytes):
                yield table.decode(value, column, f"text: {dataset.name} record {index + 1}")


def split_texts(texts: Sequence[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """Splits texts of more than `most` tokens at spaces into pieces of about equal length.

    Joining the pieces with spaces restores the text. A single word that is too long is split
    between characters.
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
    """Splits a text into at most `count` parts, at the first spaces after equidistant offsets.

    Returns at least two parts unless the text is a single character.
    """
    parts = []
    start = 0
    for index in range(1, count):
        space = text.find(" ", max(len(text) * index // count, start + 1))
        if space < 0 or not text[space + 1 :].strip():
            break
        if text[start:space].strip():
            parts.append(text[start:space])
            start = space + 1
    if parts:
        return [*parts, text[start:]]
    last = text.rstrip().rfind(" ")  # there are only early spaces, or none
    if text[: max(last, 0)].strip():
        return [text[:last], text[last + 1 :]]
    return [text[: len(text) // 2], text[len(text) // 2 :]]


class TextSource(Source):
    """A task whose records are pieces of text that fit `max_length`; no text is truncated.

    Args:
        task: a language model task with one field.
        options: the data options of the config.
        text: `config.text`.
    """

    splits = ("train", "validation")

    def __init__(self, task: Task, options: DataOptions, text: TextOptions):
        super().__init__(task, options)
        self.text = text
        self._fitting: tuple[Tokenizer, int] | None = None
        self._tables: dict[str, Table] | None = None

    def check(self) -> None:
        """Raises InputError if a file or a dataset is missing."""
        self._sources()

    def _sources(self) -> tuple[UnlabeledTexts, UnlabeledTexts]:
        """Returns the texts of train and of validation, which may be empty."""
        return UnlabeledTexts(self.text.train), UnlabeledTexts(self.text.validation)

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the files of a split's sources."""
        train, validation = self._sources()
        is_named = split == "validation" and validation.sources
        return (validation if is_named else train).files()

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Sets the tokenizer and the maximum length of pieces, bos and eos included."""
        self._fitting = (tokenizer, max_length)
        self._tables = None

    def _table(self, split: str) -> Table:
        if self._tables is None:
            self._tables = self._read()
        return self._tables[split]

    def _read(self) -> dict[str, Table]:
        """Returns the pieces of each split, from the cache if possible."""
        train, validation = self._sources()
        settings = [self.text.train, self.text.validation, self.text.held_out]
        if self._fitting is not None:
            tokenizer, length = self._fitting
            settings += [hashlib.sha256(tokenizer.model).hexdigest(), length]
        tables = cache.derive(
            [*train.files(), *validation.files()],
            f"pieces with {settings}",
            lambda folder: self._write(folder, train, validation),
            lambda folder: {split: Table(folder / split) for split in self.splits},
        )
        for split, rows in tables.items():
            if not len(rows):
                sources = ", ".join(getattr(self.text, split) or self.text.train)
                raise InputError(f"text.{split}: no text is left in {sources}")
        if not self.text.validation:
            logging.warning(
                "text: holding out %d of %d texts for validation; set text.validation to use other "
                "sources",
                tables["validation"].summary["texts"],
                sum(rows.summary["texts"] for rows in tables.values()),
            )
        return tables

    def _write(
        self, folder: pathlib.Path, train: UnlabeledTexts, validation: UnlabeledTexts
    ) -> None:
        """Writes one table of pieces per split."""
        import pyarrow as pa

        types = {"text": pa.large_string()}
        for split, (texts, is_selected) in self._select(train, validation).items():
            (folder / split).mkdir()
            pieces = self._pieces(itertools.compress(texts, is_selected))
            table.write_table_rows(folder / split, types, ([piece] for piece in pieces))
            table.write_summary(folder / split, {"texts": int(is_selected.sum())})

    def _select(
        self, train: UnlabeledTexts, validation: UnlabeledTexts
    ) -> dict[str, tuple[UnlabeledTexts, np.ndarray]]:
        """Returns, for each split, its source and a [N] mask of the source's texts.

        Duplicates are found by digests, which take 8 bytes of memory per text.
        """
        digests = train.digests()
        is_train = _is_first_occurrence(digests)
        if self.text.validation:
            reserved = validation.digests()
            is_train &= ~np.isin(digests, reserved)
            return {
                "train": (train, is_train),
                "validation": (validation, _is_first_occurrence(reserved)),
            }
        distinct = digests[is_train]
        held_out = min(max(round(self.text.held_out * len(distinct)), 1), len(distinct))
        threshold = np.partition(distinct, held_out - 1)[held_out - 1] if held_out else 0
        is_held_out = digests <= threshold
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
        """Returns the number of pieces."""
        return len(self._table(split))

    def pieces(self, split: str) -> Iterator[str]:
        """Yields the texts of a split, split into pieces if `fit` was called."""
        return (self._table(split).value("text", index) for index in range(self.size(split)))

    def record(self, split: str, index: int, *, training: bool = False) -> Record:
        """Returns the piece at `index`."""
        return Record.of([Example({"text": self._table(split).value("text", index)}, 0.0)])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _is_first_occurrence(values: np.ndarray) -> np.ndarray:
    """Returns [N] bool, True for the first occurrence of each value."""
    result = np.zeros(len(values), bool)
    result[np.unique(values, return_index=True)[1]] = True
    return result


def _make(options: DataOptions) -> Source:
    text = from_mapping(TextOptions, options.text, "text")
    text.check()
    task = Task("text", "language_model", Template("{text}"), ("perplexity", "nll"))
    return TextSource(task, options, text)


TASKS: dict[str, Callable[[DataOptions], Source]] = {"text": _make}
