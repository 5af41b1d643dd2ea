"""Our tasks in seqio's registries: the same token ids, metrics and rates."""

import itertools

import numpy as np
import pytest

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.evaluation_stream import evaluation_stream
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.evaluation.predictions import Predictions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import from_json
from gemma_encoder.inputs.task import ExampleTable
from gemma_encoder.inputs.template import encode

OPTIONS = StreamOptions(BatchShape(rows=8, row_length=128, segments=8), max_length=128)
GLUE = ("glue_cola", "glue_sst2", "glue_mrpc", "glue_stsb")


SMALL = ("glue_mnli", "glue_ax", "superglue_copa", "superglue_record", "superglue_multirc")


def elements(seqio, name, split):
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset({"inputs": 128}, split, shuffle=False)
    return list(dataset.as_numpy_iterator())


def assert_same_tokens(seqio, tokenizer, name, split):
    """Compares tokens and labels of every text of a split with those of evaluation."""
    table = ExampleTable()
    ours = {}
    stream = evaluation_stream(registry.get(name), 0, split, tokenizer, OPTIONS, table)
    for batch in stream:
        for row, slot in zip(*np.nonzero(batch.weight), strict=True):
            tokens = batch.tokens[row][batch.segment_ids[row] == slot + 1]
            ours[int(batch.example_id[row, slot])] = (tokens, batch.label[row, slot])
    theirs = elements(seqio, name, split)
    assert len(theirs) == len(ours)
    for index, element in enumerate(theirs):
        tokens, label = ours[index]
        np.testing.assert_array_equal(element["inputs"], tokens)
        assert element["targets"] == np.float32(label)


@pytest.mark.parametrize("name", GLUE)
def test_token_ids_equal_those_of_training(seqio, tokenizer, shared_data, monkeypatch, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    for split in ("validation", "test"):
        assert_same_tokens(seqio, tokenizer, name, split)
    source = registry.get(name)
    examples = [source.examples("train", index)[0] for index in range(source.size("train"))]
    fields = [example.fields for example in examples]
    ours = encode(tokenizer, source.task.template, fields, OPTIONS.max_length)
    theirs = elements(seqio, name, "train")
    assert len(theirs) == len(ours)
    for element, text in zip(theirs, ours, strict=True):
        assert np.array_equal(element["inputs"], text.tokens)


@pytest.mark.parametrize("name", SMALL)
def test_token_ids_of_options_answers_and_several_splits(seqio, tokenizer, benchmarks, name):
    for split in registry.get(name).splits:
        if split != "train":
            assert_same_tokens(seqio, tokenizer, name, split)


def test_retrieval_has_roles_lists_and_metrics(seqio, tokenizer):
    source = registry.get("toy_retrieval")
    task = seqio.get_mixture_or_task("toy_retrieval")
    dataset = task.get_dataset({"inputs": 128}, "train", shuffle=False)
    theirs = list(itertools.islice(dataset.as_numpy_iterator(), 6))
    ours = [e for index in range(2) for e in source.training_examples(index, 0, 0)]
    for element, example in zip(theirs, ours, strict=True):
        text = encode(tokenizer, source.task.template_for(example.role), [example.fields], 128)
        np.testing.assert_array_equal(element["inputs"], text[0].tokens)
        assert from_json(element["example"])["role"] == example.role
        assert element["targets"].tolist() == [float(example.role and example.label), 0.0]
    data = elements(seqio, "toy_retrieval", "validation")
    targets = [
        task.postprocess_fn(e["targets_pretokenized"], example=e, is_target=True) for e in data
    ]
    outputs = np.random.default_rng(0).normal(size=(len(data), 8)).astype(np.float32)
    (metric_fn,) = task.metric_fns
    table = ExampleTable()
    for index in range(source.size("validation")):
        table.add(source.examples("validation", index)[0])
    qrels = source.qrels("validation")
    ours = Predictions(source.task, "validation", outputs, table=table, qrels=qrels).metrics()
    assert metric_fn(targets, outputs) == ours


@pytest.mark.parametrize("name", ["toy_sentiment", "toy_similarity", "toy_ranking"])
def test_metric_functions_equal_our_metrics(seqio, name):
    task = seqio.get_mixture_or_task(name)
    source = registry.get(name)
    targets = [
        task.postprocess_fn(element["targets_pretokenized"], example=element, is_target=True)
        for element in elements(seqio, name, "validation")
    ]
    table = ExampleTable()
    for index in range(source.size("validation")):
        for example in source.examples("validation", index):
            table.add(example)
    shape = (len(targets), source.task.num_outputs)
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    outputs = source.task.kind.postprocess(source.task, scores)
    (metric_fn,) = task.metric_fns
    assert (
        metric_fn(targets, outputs)
        == Predictions(source.task, "validation", outputs, table).metrics()
    )


def test_all_tasks_are_registered_without_data(seqio, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("MSMARCO_DIR", raising=False)
    for name in registry.names():
        if name not in ("own", "text"):
            assert set(seqio.get_mixture_or_task(name).splits) == set(registry.get(name).splits)
    for name, tasks in mixtures.MIXTURES.items():
        assert {task.name for task in seqio.MixtureRegistry.get(name).tasks} == set(tasks)
    with pytest.raises(InputError, match="TFDS_DATA_DIR.*tfds build glue/qnli"):
        elements(seqio, "glue_qnli", "validation")


def test_mixtures_have_our_rates(seqio, benchmarks):
    mixture = seqio.MixtureRegistry.get("superglue")
    sources = [registry.get(name) for name in mixtures.MIXTURES["superglue"]]
    ours = dict(
        zip(mixtures.MIXTURES["superglue"], mixtures.rates(sources, "proportional"), strict=True)
    )
    theirs = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    for name, share in ours.items():
        assert theirs[name] / sum(theirs.values()) == pytest.approx(share)
    dataset = mixture.get_dataset({"inputs": 64}, "train", shuffle=True, seed=0)
    assert all(len(e["inputs"]) <= 64 for e in itertools.islice(dataset.as_numpy_iterator(), 40))


def test_add_task_registers_own_files(seqio, tmp_path):
    from gemma_encoder.data import seqio_tasks

    (tmp_path / "t.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    options = DataOptions(own={"train": str(tmp_path / "t.csv"), "name": "mine"})
    seqio_tasks.add_task("mine", options)
    assert {e["targets_pretokenized"] for e in elements(seqio, "mine", "train")} == {b"a", b"b"}
    with pytest.raises(InputError, match="task 'mine' is already registered in seqio"):
        seqio_tasks.add_task("mine", options)


def test_the_vocabulary_encodes_and_decodes(seqio, tokenizer):
    feature = seqio.get_mixture_or_task("toy_sentiment").output_features["inputs"]
    ids = tokenizer.encode(["hello é"])[0]
    assert feature.vocabulary.decode(ids) == "hello é"
    assert feature.vocabulary.encode("hello é") == ids
    assert feature.vocabulary.encode_tf("hello é").numpy().tolist() == ids
    assert feature.vocabulary.decode_tf(np.array(ids)).numpy().decode() == "hello é"
