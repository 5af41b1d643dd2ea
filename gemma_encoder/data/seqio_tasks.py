"""Registers every task and mixture in seqio's registries when imported.

    import gemma_encoder.data.seqio_tasks
    import seqio

    seqio.get_mixture_or_task("glue_sst2").get_dataset({"inputs": 128}, "validation")

An element has the same inputs and targets as in training:

| feature | type | meaning |
| --- | --- | --- |
| `inputs` | [length] int32 | token ids, bos and eos included, truncated by the template |
| `targets` | [1] or [K] float32 | class index, scaled target or grade; (grade, teacher's score) |
| `inputs_pretokenized`, `targets_pretokenized` | string | the text, and the label in words |
| `example` | string | JSON: label, query, document, role and other inputs of the metrics |

Metric functions take targets from `postprocess_fn`, and predictions from `Kind.postprocess`: [N],
or [N, C] probabilities.

The default tokenizer is the small one; `use_tokenizer` selects another. Files are read only when a
dataset is requested. `own` and `text` need options, so `add_task` has to register them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_encoder import runtime
from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.segments import CHUNK, make_segments, no_counts
from gemma_encoder.data.seqio_source import UNLIMITED
from gemma_encoder.data.source import DataOptions, Source
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json, to_json
from gemma_encoder.inputs.packing import Segment
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.tokenizer import Tokenizer

seqio = runtime.import_quietly("seqio")
tf = runtime.import_quietly("tensorflow")

NEED_OPTIONS = ("own", "text")

_in_use: list[Tokenizer] = []


def use_tokenizer(name: str) -> None:
    """Sets the tokenizer of all tasks to a name or path, as in `config.tokenizer`."""
    _in_use[:] = [Tokenizer.load(name)]


def tokenizer() -> Tokenizer:
    """Returns the tokenizer in use."""
    if not _in_use:
        use_tokenizer("small")
    return _in_use[0]


class Vocabulary(seqio.Vocabulary):
    """The tokenizer in use as a seqio vocabulary."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary)  # the tasks of a mixture must have equal vocabularies

    __hash__ = object.__hash__

    @property
    def bos_id(self) -> int:
        """Id of the first token of every text."""
        return tokenizer().bos_id

    @property
    def eos_id(self) -> int:
        """Id of the last token of every text."""
        return tokenizer().eos_id

    @property
    def unk_id(self) -> int:
        """Id of the unknown token."""
        return 3

    @property
    def _base_vocab_size(self) -> int:
        return tokenizer().vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return tokenizer().encode([s])[0]

    def _decode(self, ids: Sequence[int]) -> str:
        return tokenizer().decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            return np.array(self._encode(tf.compat.as_text(np.asarray(text).item())), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda values: self._decode(values).encode(), [ids], tf.string)


class Records(seqio.DataSource):
    """The records of a source by index.

    Args:
        source: the task with its data, which are read only when a dataset is requested.
    """

    def __init__(self, source: Source):
        super().__init__(splits=source.splits, caching_permitted=False)
        self.source = source

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True, since records have random access."""
        return True

    def num_input_examples(self, split: str) -> int:
        """Returns the number of records of a split."""
        return self.source.size(split)

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard, which can be divided arbitrarily."""
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Returns elements {"split", "index"}, in a seeded permutation if `shuffle`."""
        del sequence_length, use_cached, num_epochs
        self.source.check()
        order = np.arange(self.source.size(split))
        if shuffle:
            order = np.random.default_rng(seed).permutation(order)
        if shard_info is not None:
            order = order[shard_info.index :: shard_info.num_shards]
        indices = tf.data.Dataset.from_tensor_slices(order)
        return indices.map(lambda index: {"split": tf.constant(split), "index": index})


def apply_template(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None, *, source: Source
) -> tf.data.Dataset:
    """Preprocessor from record indices to tokenized texts.

    A list is consecutive elements; of retrieval, its first is the query, by "role" in the JSON.
    Lists of the train split are drawn as in the first epoch of a run with seed 0.
    """
    max_length = (sequence_length or {}).get("inputs") or UNLIMITED

    def expand(splits: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
        return _elements(source, splits[0].decode(), indices.tolist(), max_length)

    def elements(row: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        types = [tf.int32, tf.int64, tf.float32, tf.string, tf.string, tf.string]
        expanded = tf.numpy_function(expand, [row["split"], row["index"]], types)
        shapes = ([None], [None], [None, None], [None], [None], [None])
        tokens, lengths, targets, *texts = map(tf.ensure_shape, expanded, shapes)
        names = ("inputs_pretokenized", "targets_pretokenized", "example")
        return tf.data.Dataset.from_tensor_slices(
            {
                "inputs": tf.RaggedTensor.from_row_lengths(tokens, lengths),
                "targets": targets,
                **dict(zip(names, texts, strict=True)),
            }
        )

    return dataset.batch(CHUNK).flat_map(elements)  # amortizes the overhead of calling Python


def _elements(
    source: Source, split: str, indices: Sequence[int], max_length: int
) -> list[np.ndarray]:
    """Returns the columns of `apply_template` for all texts of some records.

    These are the concatenated tokens, lengths, targets, texts, labels in words, and JSON.
    """
    task = source.task
    examples: list[Example] = []
    where: list[str] = []
    for index in indices:
        if split == "train":
            of_record = source.training_examples(index, seed=0, epoch=0)
        else:
            of_record = source.examples(split, index)
        examples += of_record
        where += [source.where(split, index)] * len(of_record)
    segments = make_segments(
        source,
        0,
        examples,
        where,
        tokenizer(),
        max_length,
        no_counts([source]),
        split=split,
    )
    targets = [_targets(task, segment) for segment in segments]
    texts = [
        [task.template_for(e.role).render(e.fields)[0] for e in examples],
        [task.kind.show_label(task, e.label) for e in examples],
        [to_json({"split": split, **_metric_inputs(e)}) for e in examples],
    ]
    return [
        np.concatenate([np.zeros(0, np.int32), *(segment.tokens for segment in segments)]),
        np.array([len(segment.tokens) for segment in segments], np.int64),
        np.array(targets, np.float32).reshape(len(examples), _targets_width(task)),
        *(np.array([text.encode() for text in column], object) for column in texts),
    ]


def _targets(task: Task, segment: Segment) -> list[float]:
    """Returns the label for the loss; of retrieval, the grade and the score of a teacher."""
    if task.kind.embeds:
        return [segment.label, *(segment.targets if len(segment.targets) else [0.0])]
    return segment.targets if len(segment.targets) else [segment.label]


def _targets_width(task: Task) -> int:
    return 1 + task.target_width if task.kind.embeds else max(task.target_width, 1)


def _metric_inputs(example: Example) -> dict[str, Any]:
    ids = {"query_id": example.query_id, "document_id": example.document_id}
    role = {"role": example.role} if example.role else {}
    return {"label": example.label, **ids, **role, "info": dict(example.info)}


def _postprocess(output: Any, example: Mapping[str, Any] | None = None, is_target=False) -> Any:
    """Replaces a target by the parsed JSON of its element; returns predictions unchanged."""
    return from_json(example["example"]) if is_target else output


def _metric_fn(source: Source) -> Callable[[Sequence[Any], Any], dict[str, float]]:
    """Returns seqio's metric function for the metrics of a task."""

    def compute(targets, predictions):
        table = ExampleTable()
        for target in targets:
            label = target["label"]
            label = tuple(label) if isinstance(label, list) else label
            table.add(Example({}, label, target["query_id"], target["document_id"], target["info"]))
        split = targets[0]["split"]
        outputs = np.asarray(predictions)  # of `Kind.postprocess`, whose type counts
        return Predictions(source.task, split, outputs, table, source.qrels(split)).metrics()

    return compute


def add_task(name: str, options: DataOptions | None = None) -> None:
    """Registers a task of this library in seqio's `TaskRegistry`.

    Args:
        name: name of the task in `registry`.
        options: data options, required for some tasks.

    Raises:
        InputError: the task does not exist, or its name is already registered in seqio.
    """
    source = registry.get(name, options)
    name = source.task.name
    if name in seqio.TaskRegistry.names():
        raise InputError(f"task {name!r} is already registered in seqio")
    pass_through = seqio.PassThroughVocabulary(0)
    seqio.TaskRegistry.add(
        name,
        source=Records(source),
        preprocessors=[functools.partial(apply_template, source=source)],
        output_features={
            "inputs": seqio.Feature(Vocabulary(), add_eos=False, dtype=tf.int32),
            "targets": seqio.Feature(pass_through, add_eos=False, dtype=tf.float32),
        },
        postprocess_fn=_postprocess,
        metric_fns=[_metric_fn(source)],
    )


def _rate(task: Any) -> float:
    """Returns the number of training records, as for `mixture.mixing="proportional"`."""
    return float(task.source.num_input_examples("train")) if "train" in task.splits else 0.0


for _name in registry.names():
    if _name not in NEED_OPTIONS:
        add_task(_name)
for _name, _tasks in mixtures.MIXTURES.items():
    seqio.MixtureRegistry.add(_name, list(_tasks), default_rate=_rate)
