"""Unlabelled text, by config alone: `config.text`, task `text`, from which a decoder is pretrained.

    --config=pretrain_decoder --config.text.train="('reviews.txt.gz','collection.tsv','tfds:glue/sst2')"

A source is a file of one text a line, or the text features of a TensorFlow dataset's train split. All of it is held in memory: tens of
megabytes of text, not a crawl of the web.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from gemma_encoder.data.lines import numbered
from gemma_encoder.data.memory import NumberedSource
from gemma_encoder.data.source import DataOptions, Source, load_seqio
from gemma_encoder.data.tfds import tfds_folder
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.options import from_mapping, option
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.inputs.tokenizer import Tokenizer

TFDS = "tfds:"
SLACK = 1.1  # a text is cut into equal parts so much shorter than they might be, for words differ in length


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """`config.text`: where unlabelled text comes from. A text that comes twice counts once."""

    train: tuple[str, ...] = option(
        (),
        "sources: paths (plain or .gz; of a .tsv the last column), or tfds:NAME, all text features "
        "of the train split of a dataset that lies where TFDS_DATA_DIR points",
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


def file_texts(path: pathlib.Path) -> Iterator[str]:
    """One text a line, from a plain or gzipped file; of a table (`.tsv`), the last column. Raises InputError when it cannot be read as UTF-8 text."""
    table = ".tsv" in path.suffixes
    _check_file(path)
    for _, line in numbered(path):
        text = line.rstrip("\r\n")
        yield text.rpartition("\t")[2] if table else text


def tfds_texts(name: str) -> Iterator[str]:
    """Every text feature of the train split of a prepared TensorFlow dataset such as "glue/sst2"; raises InputError where it is not prepared."""
    load_seqio()  # first: it keeps TensorFlow's start-up notes back
    import tensorflow_datasets as tfds

    _check_dataset(name)
    for record in tfds.as_numpy(
        tfds.load(name, split="train", data_dir=tfds_folder(), download=False)
    ):
        yield from (
            value.decode("utf-8") for _, value in sorted(record.items()) if isinstance(value, bytes)
        )


def cut(texts: Sequence[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """The texts, each that has more than `most` tokens as several in its place, cut at blanks: joined by blanks they are the text again.

    Parts are about equal. A word that is too long by itself is cut between characters.
    """
    result: list[str] = []
    for text, ids in zip(texts, tokenizer.encode(list(texts)), strict=True):
        whole = len(ids) <= most or len(text) == 1
        result += (
            [text]
            if whole
            else cut(
                [part for part in _parts(text, math.ceil(SLACK * len(ids) / most)) if part.strip()],
                tokenizer,
                most,
            )
        )
    return result


def _parts(text: str, count: int) -> list[str]:
    """The text in at most `count` parts, at the blanks that come first behind even places; at least two unless it is one character."""
    parts, start = [], 0
    for number in range(1, count):
        place = text.find(" ", max(len(text) * number // count, start + 1))
        if place < 0 or not text[place + 1 :].strip():
            break
        if text[start:place].strip():
            parts.append(text[start:place])
            start = place + 1
    if parts:
        return [*parts, text[start:]]
    last = text.rstrip().rfind(" ")  # the only blanks are early ones, or there is none
    return (
        [text[:last], text[last + 1 :]]
        if text[: max(last, 0)].strip()
        else [text[: len(text) // 2], text[len(text) // 2 :]]
    )


class TextSource(NumberedSource):
    """Pieces of text as records, each short enough for `max_length`: nothing of a text is lost.

    Args:
        task: a language model's, of one field.
        options: what the config says about sources.
        text: what it says about this one.
    """

    splits = ("train", "validation")

    def __init__(self, task: Task, options: DataOptions, text: TextOptions):
        super().__init__(task, options)
        self.text = text
        self._fitting: tuple[Tokenizer, int] | None = None
        self._texts: dict[str, list[str]] = {}
        self._pieces: dict[str, list[str]] = {}

    def check(self) -> None:
        """Raises InputError where a file or a dataset is missing."""
        for source in (*self.text.train, *self.text.validation):
            if source.startswith(TFDS):
                _check_dataset(source.removeprefix(TFDS))
            else:
                _check_file(pathlib.Path(source))

    def fit(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Pieces are to be at most `max_length` of its tokens, bos and eos included."""
        self._fitting, self._pieces = (tokenizer, max_length), {}

    def texts(self, split: str) -> list[str]:
        """The texts of a split, whole, in the order of the sources, each once."""
        if not self._texts:
            train, validation = (
                list(dict.fromkeys(_read(sources)))
                for sources in (self.text.train, self.text.validation)
            )
            if self.text.validation:
                known = set(validation)
                train = [text for text in train if text not in known]
            else:
                mixed = np.random.default_rng(0).permutation(len(train))
                chosen = set(mixed[: max(round(self.text.held_out * len(train)), 1)].tolist())
                validation = [text for number, text in enumerate(train) if number in chosen]
                train = [text for number, text in enumerate(train) if number not in chosen]
                logging.warning(
                    "text: %d of %d texts are held out for validation; text.validation names sources of your own",
                    len(validation),
                    len(mixed),
                )
            for name, found in (("train", train), ("validation", validation)):
                if not found:
                    raise InputError(
                        f"text.{name}: {', '.join(getattr(self.text, name) or self.text.train)} leave no text"
                    )
            self._texts = {"train": train, "validation": validation}
        return self._texts[split]

    def pieces(self, split: str) -> list[str]:
        """The texts of a split, those cut that are too long; as many as the options allow."""
        if split not in self._pieces:
            limit, found = self.options.limit(split), self.texts(split)
            found = found[: limit or len(found)]
            if self._fitting is not None:
                found = cut(found, self._fitting[0], self._fitting[1] - 2)
            self._pieces[split] = found[: limit or len(found)]
        return self._pieces[split]

    def count(self, split: str) -> int:
        """How many pieces a split has."""
        return len(self.pieces(split))

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The piece."""
        return [Example({"text": self.pieces(split)[int(record["number"])]}, 0.0)]


def _read(sources: Sequence[str]) -> Iterator[str]:
    """The texts of all sources that are not blank."""
    for source in sources:
        found = (
            tfds_texts(source.removeprefix(TFDS))
            if source.startswith(TFDS)
            else file_texts(pathlib.Path(source))
        )
        yield from (text for text in found if text.strip())


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        raise InputError(
            f"text: there is no file {path}; name a file of one text a line, or {TFDS}NAME for a TensorFlow dataset"
        )


def _check_dataset(name: str) -> None:
    if not epath.Path(tfds_folder(), name).exists():
        raise InputError(
            f"text: no prepared data in {tfds_folder()}/{name}. Point TFDS_DATA_DIR at a folder that holds {name}, "
            f"or prepare it once with: tfds build {name} --data_dir={tfds_folder()}"
        )


def _make(options: DataOptions) -> Source:
    text = from_mapping(TextOptions, options.text, "text")
    text.check()
    return TextSource(
        Task("text", "language_model", Template("{text}"), ("perplexity", "nll")),
        options,
        text,
    )


TASKS: dict[str, Callable[[DataOptions], Source]] = {"text": _make}
