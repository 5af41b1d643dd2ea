"""Tasks whose texts were tokenised ahead, once, by as many machines as one likes; training then reads tokens.

A prepared task is a folder:

    info.json                            what the files hang on: task, tokenizer, lengths, seed, readers, options, epochs
    train/epoch_000/reader_00002         the records that reader 2 draws in epoch 0, in its order, lists sampled
    validation                           the records of a split
    validation.qrels.json                the judgements of a ranking task

Each file is a TFRecord of records as `Source` has them, with tokens in the place of text. What a reader sees is what it would see
reading raw, to the bit, so preparing is a matter of speed alone; the price is that a folder serves one seed, one number of readers
and so many epochs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gemma_encoder.data.reader import CHUNK, to_records
from gemma_encoder.data.source import DataOptions, Source, load_seqio
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Encoded, encode
from gemma_encoder.inputs.tokenizer import Tokenizer

VERSION = 1  # of the folder; raised when the meaning of what is in it changes
INFO = "info.json"  # written last: a folder that has it is whole
BEGUN = "begun.json"  # the same content, written first
COLUMNS = ("tokens", "lengths", "cut", "labels", "about")  # of a record: arrays as bytes, and JSON


class Part(NamedTuple):
    """One file of a prepared task: a reader's share of an epoch, or a whole evaluation split."""

    split: str
    epoch: int = 0
    reader: int = 0

    @property
    def path(self) -> str:
        """Its place in the task's folder."""
        return (
            f"train/epoch_{self.epoch:03d}/reader_{self.reader:05d}"
            if self.split == "train"
            else self.split
        )


def parts(source: Source, readers: int, epochs: int) -> list[Part]:
    """All files of a task; `epochs` of its training split, if it has one."""
    train = [Part("train", epoch, reader) for epoch in range(epochs) for reader in range(readers)]
    return [
        part for split in source.splits for part in (train if split == "train" else [Part(split)])
    ]


def describe(
    source: Source, tokenizer: Tokenizer, options: StreamOptions, epochs: int
) -> dict[str, Any]:
    """What the files of a task hang on, for JSON."""
    splits = {split: source.num_records(split) for split in source.splits}
    described = {
        "version": VERSION,
        "task": source.task.to_dict(),
        "splits": splits,
        "epochs": epochs,
        "first_stage": source.first_stage,
    }
    return _as_json(described) | _contract(source.options, tokenizer, options)


def _contract(data: DataOptions, tokenizer: Tokenizer, options: StreamOptions) -> dict[str, Any]:
    """What must be the same where files are made and where they are read."""
    return _as_json(
        {
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": hashlib.sha256(tokenizer.model).hexdigest(),
            },
            "max_length": options.max_length,
            "seed": options.seed,
            "readers": options.readers,
            "options": dataclasses.asdict(data),
        }
    )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as they come back from a file."""
    return json.loads(json.dumps(values, default=list))


def write(
    source: Source, part: Part, tokenizer: Tokenizer, options: StreamOptions, folder: epath.PathLike
) -> dict[str, int]:
    """Writes one file of a task, unless it is there: it has its name only when it is whole. Returns texts, tokens and what was cut.

    Args:
        source: the task, read raw.
        part: which file.
        tokenizer, options: as training will have them.
        folder: of the task.
    """
    import tensorflow as tf

    path = epath.Path(folder) / part.path
    counts = {"records": 0, "texts": 0, "tokens": 0, "cut_texts": 0, "cut_tokens": 0}
    if path.exists():
        return counts
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with tf.io.TFRecordWriter(str(partial)) as file:
        for examples in _encoded(source, part, tokenizer, options):
            file.write(_serialise(examples, with_fields=part.split != "train"))
            counts["records"] += 1
            counts["texts"] += len(examples)
            counts["tokens"] += sum(len(example.encoded.tokens) for example in examples)
            counts["cut_texts"] += sum(example.encoded.cut > 0 for example in examples)
            counts["cut_tokens"] += sum(example.encoded.cut for example in examples)
    partial.replace(path)
    if part.split != "train" and (qrels := source.qrels(part.split)) is not None:
        _qrels_file(folder, part.split).write_text(json.dumps(qrels))
    return counts


def _encoded(
    source: Source, part: Part, tokenizer: Tokenizer, options: StreamOptions
) -> Iterator[list[Example]]:
    """The examples of each record of a part, in order, with their tokens."""
    train = part.split == "train"
    dataset = (
        source.training_epoch(options.seed, part.epoch, part.reader, options.readers)
        if train
        else source.dataset(part.split)
    )
    place = 0
    for batch in dataset.batch(CHUNK):
        records, where = [], []
        for record in to_records(batch):
            records.append(
                source.training_examples(record, options.seed, part.epoch, part.reader, place)
                if train
                else source.expand(record, part.split, None)
            )
            place += 1
            where += [f"{part.split} record {place}"] * len(records[-1])
        flat = [example for examples in records for example in examples]
        templates = [source.task.template_for(example.role) for example in flat]
        fields = [example.fields for example in flat]
        tokens = iter(encode(tokenizer, templates, fields, options.max_length, where))
        yield from (
            [example._replace(encoded=next(tokens)) for example in examples] for examples in records
        )


def _serialise(examples: Sequence[Example], with_fields: bool) -> bytes:
    import tensorflow as tf

    texts = [example.encoded.tokens for example in examples]
    about = [
        {"query": e.query_id, "document": e.document_id, "info": dict(e.info), "role": e.role}
        | ({"fields": e.fields} if with_fields else {})
        | ({"classes": e.label} if isinstance(e.label, tuple) else {})
        for e in examples
    ]
    values = (
        np.concatenate(texts or [[]]).astype("<i4").tobytes(),
        np.array([len(text) for text in texts], "<i4").tobytes(),
        np.array([example.encoded.cut for example in examples], "<i4").tobytes(),
        np.array(
            [0.0 if isinstance(example.label, tuple) else example.label for example in examples],
            "<f8",
        ).tobytes(),
        json.dumps(about).encode(),
    )
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in zip(COLUMNS, values, strict=True)
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(
        deterministic=True
    )


def _qrels_file(folder: epath.PathLike, split: str) -> epath.Path:
    return epath.Path(folder) / f"{split}.qrels.json"


def begin(folder: epath.PathLike, description: Mapping[str, Any]) -> bool:
    """Makes a folder ready for a task's files; False where they are all there.

    A folder that was begun, or holds fewer epochs, is gone on with. Raises InputError where it holds files of another kind.
    """
    folder = epath.Path(folder)
    for path in (folder / INFO, folder / BEGUN):
        if not path.exists():
            continue
        stored = json.loads(path.read_text())
        if found := _differences(stored, {**description, "epochs": stored.get("epochs")}):
            raise InputError(
                f"{folder} was prepared differently ({'; '.join(found)}); name another folder, or delete it"
            )
        if path.name == INFO and stored["epochs"] >= description["epochs"]:
            return False
        path.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).write_text(json.dumps(description, indent=1))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return True


def finish(folder: epath.PathLike) -> None:
    """Declares a folder whole."""
    (epath.Path(folder) / BEGUN).replace(epath.Path(folder) / INFO)


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The entries of `wanted` that are stored otherwise, as "name: stored -> wanted"."""
    found = []
    for name, value in wanted.items():
        before = stored.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            found += [f"{name}.{line}" for line in _differences(before, value)]
        elif before != value:
            found.append(f"{name}: {before!r} -> {value!r}")
    return found


class PreparedSource(Source):
    """A task read from its prepared folder; the raw data are not needed.

    Args:
        name: the task.
        root: the folder that holds prepared tasks.
        options: what the config says about sources; it must be what the files were made with.

    Raises:
        InputError: the folder is not there, or not whole.
    """

    shuffle_buffer = 1

    def __init__(self, name: str, root: epath.PathLike, options: DataOptions):
        self.folder = epath.Path(root) / name
        if not (self.folder / INFO).exists():
            state = (
                "is not whole: the program that prepares it did not end"
                if (self.folder / BEGUN).exists()
                else "does not exist"
            )
            raise InputError(
                f"task {name!r}: the prepared folder {self.folder} {state}; run gemma-encoder prepare with this config"
            )
        self.info = json.loads((self.folder / INFO).read_text())
        if self.info.get("version") != VERSION:
            raise InputError(
                f"{self.folder} is of version {self.info.get('version')}, this program reads {VERSION}; prepare it anew"
            )
        super().__init__(Task.from_dict(self.info["task"]), options)
        self.splits, self.first_stage = (
            tuple(self.info["splits"]),
            self.info.get("first_stage", False),
        )

    def check(self) -> None:
        """The constructor did."""

    def training_epoch(self, seed: int, epoch: int, shard: int, shards: int) -> Any:
        """The records of a file."""
        if epoch >= self.info["epochs"]:
            raise InputError(
                f"{self.folder} holds {self.info['epochs']} epochs and training wants another; prepare more with --epochs={epoch + 1}"
            )
        return self._dataset(Part("train", epoch, shard).path)

    def training_examples(
        self, record: Mapping[str, Any], seed: int, epoch: int, shard: int, place: int
    ) -> list[Example]:
        """What the record holds: lists were sampled when it was made."""
        return self.expand(record, "train", None)

    def dataset(
        self, split: str, *, seed: int | None = None, shard: int = 0, shards: int = 1
    ) -> Any:
        """An evaluation split, in its order."""
        if split not in self.splits or split == "train":
            raise InputError(
                f"task {self.task.name!r} has no {split} split to evaluate; it has {', '.join(self.splits)}"
            )
        return self._dataset(Part(split).path)

    def seqio_source(self, split: str) -> Any:
        """The seqio source of the file that lies at `split` in the folder."""
        seqio = load_seqio()
        import tensorflow as tf

        features = {name: tf.io.FixedLenFeature([], tf.string) for name in COLUMNS}
        counts = {split: self.info["splits"][split]} if split in self.info["splits"] else None
        return seqio.TFExampleDataSource(
            {split: str(self.folder / split)}, features, num_input_examples=counts
        )

    def preprocess(self, dataset: Any) -> Any:
        """Records need no change."""
        return dataset

    def features(self) -> Mapping[str, str]:
        """Bytes."""
        return dict.fromkeys(COLUMNS, "string")

    def expand(
        self, record: Mapping[str, Any], split: str, rng: np.random.Generator | None
    ) -> list[Example]:
        """The examples with their tokens; their fields are kept for evaluation only."""
        lengths, cut = np.frombuffer(record["lengths"], "<i4"), np.frombuffer(record["cut"], "<i4")
        ends = np.cumsum(lengths)
        tokens, labels = (
            np.frombuffer(record["tokens"], "<i4"),
            np.frombuffer(record["labels"], "<f8"),
        )
        return [
            Example(
                about.get("fields", {}),
                tuple(about["classes"]) if "classes" in about else float(labels[i]),
                about["query"],
                about["document"],
                about["info"],
                Encoded(tokens[end - length : end], int(cut[i])),
                about.get("role", ""),
            )
            for i, (about, length, end) in enumerate(
                zip(json.loads(record["about"]), lengths, ends, strict=True)
            )
        ]

    def qrels(self, split: str) -> Mapping[str, Mapping[str, float]] | None:
        """As the raw data had them."""
        file = _qrels_file(self.folder, split)
        return json.loads(file.read_text()) if file.exists() else None


def check_prepared(
    sources: Sequence[PreparedSource], tokenizer: Tokenizer, options: StreamOptions
) -> None:
    """Raises InputError where tasks were prepared with different tokenizers, or for another config."""
    first = sources[0]
    for source in sources[1:]:
        if source.info["tokenizer"]["sha256"] != first.info["tokenizer"]["sha256"]:
            names = [
                f"{s.task.name!r} with {s.info['tokenizer']['name']!r} ({s.info['tokenizer']['sha256'][:8]})"
                for s in (first, source)
            ]
            raise InputError(
                f"the tasks of a mixture share one tokenizer; prepared were {' and '.join(names)}: prepare one of them anew"
            )
    for source in sources:
        if found := _differences(source.info, _contract(source.options, tokenizer, options)):
            raise InputError(
                f"{source.folder} was prepared for another config: {'; '.join(found)}; prepare it anew in another folder, or undo"
            )
