"""Sources: GLUE from its real files, the toy tasks, and errors."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gemma_encoder.data import registry, tfds
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.pipeline import training_order
from gemma_encoder.data.source import DataOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, Task
from gemma_encoder.inputs.template import Template

GLUE = {
    "glue_cola": (8551, 1043, 1063),
    "glue_sst2": (67349, 872, 1821),
    "glue_mrpc": (3668, 408, 1725),
    "glue_stsb": (5749, 1500, 1379),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_sizes_fields_and_labels(name, shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    source = registry.get(name)
    assert tuple(source.size(split) for split in ("train", "validation", "test")) == GLUE[name]
    for split in ("train", "validation"):
        for index in range(200):
            (example,) = source.examples(split, index)
            text, _ = source.task.template.render(example.fields)
            assert text.startswith(name.removeprefix("glue_") + " sentence")
            source.task.check_label(example.label, split)
    (unlabeled,) = source.examples("test", 0)
    assert unlabeled.label == -1


def test_a_limit_selects_the_first_records(shared_data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data / "tfds"))
    limited = registry.get("glue_cola", DataOptions(max_train_examples=7, max_eval_examples=5))
    assert limited.size("train") == 7
    whole = registry.get("glue_cola")
    assert limited.size("validation") == 5
    for index in range(5):
        assert limited.examples("validation", index) == whole.examples("validation", index)


def test_missing_tfds_data_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"TFDS_DATA_DIR.*tfds build glue/sst2"):
        registry.get("glue_sst2").check()


def test_unknown_task_names_the_nearest_one():
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
    texts = {}
    labels = {}
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


def test_epoch_order_is_independent_of_file_order():
    """A file that is sorted by class must not start with one class."""
    options = StreamOptions(BatchShape(1, 128), 128)
    positions = training_order([memory(30_000)], np.ones(1), options, 0)
    order = np.array([positions[i].index for i in range(30_000)])
    assert np.array_equal(np.sort(order), np.arange(30_000))
    assert abs(np.corrcoef(order, np.arange(30_000))[0, 1]) < 0.02
    assert abs(order[:1000].mean() / 30_000 - 0.5) < 0.05


@pytest.fixture(scope="module")
def starts(shared_data, tmp_path_factory):
    """Lines of two processes that print a record of each task; the first finds an empty cache."""
    program = (
        "import sys; from gemma_encoder.data import registry\n"
        f"for name in {[*GLUE]}:\n"
        "    print(registry.get(name).examples('validation', 3))\n"
        "print('tensorflow' in sys.modules, 'seqio' in sys.modules)"
    )
    environment = os.environ | {
        "TFDS_DATA_DIR": str(shared_data / "tfds"),
        "GEMMA_ENCODER_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    return [
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]


def test_a_second_start_imports_no_tensorflow(starts):
    first, second = starts
    assert first[-1] == "True False" and second[-1] == "False False"


@pytest.mark.parametrize("name", GLUE)
def test_a_second_start_reads_the_same_table(starts, name):
    first, second = (lines[[*GLUE].index(name)] for lines in starts)
    assert first == second and "Example(" in first


TASK = Task("t", "classification", Template("{x}"), ("accuracy",), ("a", "b"))


def memory(count):
    return MemorySource(
        TASK,
        DataOptions(),
        lambda split: [[Example({"x": f"text {i}"}, i % 2)] for i in range(count)],
    )


def test_damaged_tfrecords_are_one_line_errors(shared_data, tmp_path, monkeypatch):
    shutil.copytree(shared_data / "tfds/glue/mrpc", tmp_path / "glue/mrpc")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    (file,) = (tmp_path / "glue/mrpc").rglob("*-train.*")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match="the train split in .*glue/mrpc/2.0.0 cannot be read"):
        registry.get("glue_mrpc").examples("train", 0)
    (tmp_path / "glue/mrpc/2.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="dataset_info.json does not describe train"):
        registry.get("glue_mrpc").size("train")


def test_the_newest_version_of_a_dataset_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version in ("2.0.0", "10.0.0", "9.1.0"):
        (tmp_path / "a" / version).mkdir(parents=True)
        (tmp_path / "a" / version / "dataset_info.json").write_text("{}")
    assert tfds.Dataset("a", "test").folder.name == "10.0.0"
    assert tfds.Dataset("a:9.1.0", "test").folder.name == "9.1.0"


def test_listing_tasks_imports_neither_jax_nor_grain():
    program = (
        "import sys; from gemma_encoder.data import mixtures, registry; registry.names(); "
        "print([name for name in ('jax', 'grain', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
