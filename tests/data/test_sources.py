"""Sources: GLUE through its real files, the toy tasks; and every refusal of theirs."""

import itertools

import numpy as np
import pytest

from gemma_encoder.data import mixtures, registry
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.source import DataOptions
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

GLUE = {
    "glue_cola": (8551, 1043, 1063),
    "glue_sst2": (67349, 872, 1821),
    "glue_mrpc": (3668, 408, 1725),
    "glue_stsb": (5749, 1500, 1379),
}


def records(source, split, **options):
    for batch in source.dataset(split, **options).batch(64):
        columns = {name: column.numpy() for name, column in batch.items()}
        yield from (
            {name: column[i] for name, column in columns.items()}
            for i in range(len(next(iter(columns.values()))))
        )


@pytest.mark.parametrize("name", GLUE)
def test_glue_sizes_fields_and_labels(name, shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    source = registry.get(name)
    assert (
        tuple(source.num_records(split) for split in ("train", "validation", "test")) == GLUE[name]
    )
    for split in ("train", "validation"):
        for record in itertools.islice(records(source, split), 200):
            (example,) = source.expand(record, split, None)
            text, _ = source.task.template.render(example.fields)
            assert text.startswith(name.removeprefix("glue_") + " sentence")
            source.task.check_label(example.label, split)
    (unlabelled,) = source.expand(next(records(source, "test")), "test", None)
    assert unlabelled.label == -1


def test_a_limit_takes_the_first_records(shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    limited = registry.get("glue_cola", DataOptions(max_train=7, max_eval=5))
    assert limited.num_records("train") == 7
    whole = [
        r["sentence"] for r in itertools.islice(records(registry.get("glue_cola"), "validation"), 5)
    ]
    assert [r["sentence"] for r in records(limited, "validation")] == whole


def test_missing_tfds_data_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"TFDS_DATA_DIR.*tfds build glue/sst2"):
        registry.get("glue_sst2").check()


def test_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'glue_sst2'"):
        registry.get("glue_sst3")


def test_a_task_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    registry.register("mine", lambda options: None)
    with pytest.raises(InputError, match="already registered"):
        registry.register("mine", lambda options: None)


@pytest.mark.parametrize("name", ["toy_sentiment", "toy_similarity", "toy_ranking"])
def test_toy_tasks_are_valid_balanced_and_disjoint(name):
    source = registry.get(name)
    texts, labels = {}, {}
    for split in ("train", "validation"):
        rows = [example for record in source.records(split) for example in record]
        texts[split] = {tuple(sorted(example.fields.items())) for example in rows}
        labels[split] = np.array([example.label for example in rows])
        for example in rows:
            source.task.check_label(example.label, split)
            source.task.template.render(example.fields)
    assert not texts["train"] & texts["validation"]
    if name == "toy_sentiment":
        assert abs(labels["validation"].mean() - 0.5) < 0.05
    elif name == "toy_similarity":
        assert len(np.unique(labels["validation"])) >= 4
    else:
        assert all(
            sum(example.label for example in record) == 1 and len(record) == 10
            for record in source.records("validation")
        )


def test_a_pass_is_complete_and_shuffled_by_the_seed():
    source = registry.get("toy_sentiment", DataOptions(max_train=300))
    orders = [[int(r["number"]) for r in records(source, "train", seed=seed)] for seed in (1, 1, 2)]
    assert sorted(orders[0]) == list(range(300))
    assert orders[0] == orders[1] != orders[2]


def test_the_order_of_an_epoch_does_not_follow_the_order_of_the_file():
    """A file sorted by class, longer than any shuffle buffer, must not give one class first."""
    source = memory(30_000)
    order = np.array([int(r["number"]) for r in records(source, "train", seed=0)])
    assert np.array_equal(np.sort(order), np.arange(30_000))
    assert abs(np.corrcoef(order, np.arange(30_000))[0, 1]) < 0.02
    assert abs(order[:1000].mean() / 30_000 - 0.5) < 0.05


def test_shards_are_disjoint_and_together_complete():
    source = registry.get("toy_sentiment", DataOptions(max_train=101))
    shards = [
        {int(r["number"]) for r in records(source, "train", seed=3, shard=i, shards=4)}
        for i in range(4)
    ]
    assert sum(map(len, shards)) == 101 and set.union(*shards) == set(range(101))


TASK = Task("t", "classification", Template("{x}"), ("accuracy",), ("a", "b"))


def memory(count):
    return MemorySource(
        TASK,
        DataOptions(),
        lambda split: [[Example({"x": f"text {i}"}, i % 2)] for i in range(count)],
    )


def test_rates():
    sources = [memory(100), memory(300)]
    np.testing.assert_allclose(mixtures.rates(sources, "equal"), [0.5, 0.5])
    np.testing.assert_allclose(mixtures.rates(sources, "proportional"), [0.25, 0.75])
    # T5's temperature 2: the square roots of the sizes, 10 : 17.32.
    np.testing.assert_allclose(
        mixtures.rates(sources, "temperature", 2.0), [0.3660254, 0.6339746], rtol=1e-6
    )
    with pytest.raises(InputError, match="did you mean 'proportional'"):
        mixtures.rates(sources, "proportionl")
    with pytest.raises(InputError, match="temperature"):
        mixtures.rates(sources, "temperature", 0.0)
