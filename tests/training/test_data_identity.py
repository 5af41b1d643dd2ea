"""A run resumes only on the data that it started with, and imports TensorFlow only if needed."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from gemma_encoder import digests
from gemma_encoder.data import registry
from gemma_encoder.data.tasks import own_held_out
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training import loop
from gemma_encoder.training.event_file import EventFile
from gemma_encoder.training.hooks import Hook
from gemma_encoder.weights import native


def csv(count, flipped=False):
    labels = "ba" if flipped else "ab"
    rows = (f"text {i},{labels[i % 2]}\n" for i in range(count))
    return "text,label\n" + "".join(rows)


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """(fields, folder, backup): a run in `folder` after two of its four steps, and a copy."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "train.csv").write_text(csv(60))
    (folder / "dev.csv").write_text(csv(12))
    fields = {
        "tasks": ("own",),
        "own__train": str(folder / "train.csv"),
        "own__validation": str(folder / "dev.csv"),
        "checkpoint_every": "2 steps",
    }
    loop.train(micro(**fields), folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "4")
    return fields, folder, shutil.copytree(folder, tmp_path_factory.mktemp("backup") / "own")


@pytest.fixture
def own(micro, trained):
    """(config, folder): a config over two files, and a run in it after two of its four steps."""
    fields, folder, backup = trained
    shutil.rmtree(folder)  # the config names its files, hence the same path for every test
    shutil.copytree(backup, folder)
    return micro(**fields), folder


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.csv", csv(60, flipped=True)),
        ("train.csv", csv(50)),
        ("train.csv", csv(61)),
        ("dev.csv", csv(12, flipped=True)),
    ],
    ids=["labels flipped", "fewer rows", "more rows", "other validation"],
)
def test_a_run_refuses_to_resume_on_changed_data(own, file, content):
    config, folder = own
    before = (folder / file).read_text()
    (folder / file).write_text(content)
    with pytest.raises(
        InputError,
        match=f"task 'own': {file} of its .* split changed since the run in .*run was started",
    ):
        loop.train(config, folder / "run")
    (folder / file).write_text(before)  # another mtime, the same content
    assert loop.train(config, folder / "run").step == 4


class Change(Hook):
    """Changes the training file after the first step, and interrupts the run after the second."""

    def __init__(self, path, content):
        self._path = path
        self._content = content

    def before_step(self, run, step):
        if run.step == 1:
            if self._content:
                self._path.write_text(self._content)
            else:
                self._path.unlink()
        if run.step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("content", [csv(60, flipped=True), ""], ids=["flipped", "removed"])
def test_data_that_change_during_a_run_are_refused_on_resume(micro, tmp_path, content):
    before = csv(60)
    path = tmp_path / "train.csv"
    path.write_text(before)
    config = micro(tasks=("own",), own__train=str(path), checkpoint_every="2 steps")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", hooks=[Change(path, content)])
    if content:
        with pytest.raises(InputError, match="train.csv of its train split changed"):
            loop.train(config, tmp_path / "run")
    path.write_text(before)
    assert loop.train(config, tmp_path / "run").step == 4


def test_files_in_another_order_are_other_data(micro, tmp_path):
    for folder, names in {"one": "ab", "two": "ba"}.items():
        (tmp_path / folder).mkdir()
        for index, name in enumerate(names):
            (tmp_path / folder / f"{index}.csv").write_text(csv(40, flipped=name == "b"))
    config = micro(tasks=("own",), own__train=str(tmp_path / "data/*.csv"), train_for="2 steps")
    (tmp_path / "one").rename(tmp_path / "data")
    loop.train(config, tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "one")
    (tmp_path / "two").rename(tmp_path / "data")
    with pytest.raises(InputError, match="0.csv of its train split changed"):
        loop.train(config, tmp_path / "run")
    (tmp_path / "data/1.csv").unlink()
    (tmp_path / "data/0.csv").write_text(csv(40))
    with pytest.raises(InputError, match=r"the list of files \(1.csv -> none\)"):
        loop.train(config, tmp_path / "run")


def test_another_held_out_selection_is_other_data(micro, tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text(csv(60))
    config = micro(tasks=("own",), own__train=str(tmp_path / "train.csv"), train_for="2 steps")
    assert loop.train(config, tmp_path / "run").step == 2
    assert loop.train(config, tmp_path / "run").step == 2
    monkeypatch.setattr(own_held_out, "VERSION", 0)  # as if by an earlier version
    with pytest.raises(InputError, match="held-out records of train.csv of its train split"):
        loop.train(config, tmp_path / "run")


def test_a_run_does_not_write_through_symbolic_links(own):
    config, folder = own
    victims = {name: folder / f"victim_{name}" for name in ("metrics.jsonl.tmp", "parameters.txt")}
    for name, victim in victims.items():
        victim.write_text("precious")
        (folder / "run" / name).unlink(missing_ok=True)
        (folder / "run" / name).symlink_to(victim)
    assert loop.train(config, folder / "run").step == 4
    assert all(victim.read_text() == "precious" for victim in victims.values())


def test_a_damaged_line_of_the_log_is_dropped_alone(own):
    config, folder = own
    log = folder / "run/metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{half", "3", *lines[1:]]) + "\n")
    before = len([line for line in map(json.loads, lines) if line["step"] <= 2])
    assert loop.train(config, folder / "run").step == 4
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert len([line for line in again if line["step"] <= 2]) == before


def test_moved_data_are_the_same_data(own):
    config, folder = own
    (folder / "elsewhere").mkdir()
    stored = json.loads((folder / "run/config.json").read_text())
    for split, name in (("train", "train.csv"), ("validation", "dev.csv")):
        moved = folder / "elsewhere" / name
        (folder / name).rename(moved)
        config.own[split] = stored["own"][split] = str(moved)
    (folder / "run/config.json").write_text(json.dumps(stored))
    assert loop.train(config, folder / "run").step == 4


def edit_record(folder, change):
    """Edits the record of the newest checkpoint, as if a former version had written it."""
    path = native.find(folder) / "inference" / "inference.json"
    (native.find(folder) / digests.NAME).unlink()
    description = json.loads(path.read_text())
    change(description["record"])
    path.write_text(json.dumps(description))


def test_a_run_of_a_former_version_is_refused_with_advice(own, micro):
    config, folder = own
    edit_record(folder / "run", lambda record: record.pop("data"))
    with pytest.raises(InputError) as refused:
        loop.train(config, folder / "run")
    message = str(refused.value)
    assert "earlier version" in message and "finish it with that version" in message
    assert f"--config.model.warm_start={folder / 'run'}" in message and "\n" not in message
    config.model.warm_start = str(folder / "run")  # the advice of the message works
    assert loop.train(config, folder / "new").step == 4


def test_a_damaged_or_former_reader_state_is_one_line(own):
    config, folder = own
    (state,) = (folder / "run/checkpoints/2/data").glob("reader_*")
    (folder / "run/checkpoints/2" / digests.NAME).unlink()
    for content in (b"PK\x03\x04 a zip", b"{}", b'{"drawn": 3, "waiting": ["x"], "counts": {}}'):
        state.write_bytes(content)
        with pytest.raises(InputError, match="state of the data readers is damaged"):
            loop.train(config, folder / "run")


def test_the_reader_state_is_small_and_names_no_file(own):
    _, folder = own
    (state,) = (folder / "run/checkpoints/2/data").glob("reader_*")
    assert state.stat().st_size < 2000
    assert set(json.loads(state.read_text())) == {"drawn", "waiting", "counts"}


PROGRAM = """
import json, sys
from gemma_encoder.experiments import quickstart
from gemma_encoder.training import loop
from gemma_encoder.training.event_file import EventFile
from gemma_encoder.training.hooks import Hook

config = quickstart.get_config("smoke")
for path, value in json.loads(sys.argv[1]).items():
    *parents, field = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.ignore_type():
        node[field] = tuple(value) if isinstance(value, list) else value
step = loop.train(config, sys.argv[2]).step
print(step, sorted({"tensorflow", "seqio", "tensorflow_datasets"} & set(sys.modules)))
"""


def write_marco(folder):
    """Writes a small collection in the layout of MS MARCO."""
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{i}\tpassage {i}\n" for i in range(20)))
    for split in ("train", "dev"):
        queries = "".join(f"{i}\tquery {i}\n" for i in range(8))
        qrels = "".join(f"{i}\t0\t{i}\t1\n" for i in range(8))
        run = "".join(f"{i}\t{(i + j) % 20}\t{j}\n" for i in range(8) for j in range(1, 6))
        (folder / f"queries.{split}.tsv").write_text(queries)
        (folder / f"qrels.{split}.tsv").write_text(qrels)
        (folder / f"run.{split}.tsv.gz").write_bytes(gzip.compress(run.encode()))


def test_training_imports_tensorflow_only_for_new_tfrecords(benchmarks, tmp_path, monkeypatch):
    """The user's own CSV, MS MARCO's layout, toy data, and a dataset that was read before."""
    monkeypatch.setenv("GEMMA_ENCODER_CACHE", str(tmp_path / "cache"))
    registry.get("glue_sst2").examples("train", 0)
    for split in ("train", "validation"):
        registry.get("glue_sst2").examples(split, 0)
    marco = tmp_path / "marco"
    write_marco(marco)
    (tmp_path / "train.csv").write_text(csv(60))
    changes = {
        "tasks": ["own", "msmarco", "glue_sst2", "toy_similarity"],
        "own.train": str(tmp_path / "train.csv"),
        "max_train_examples": 0,
        "model.size": "gemma2_tiny",
        "train_for": "3 steps",
    }
    environment = os.environ | {"MSMARCO_DIR": str(marco)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(changes), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[-1:] == ["3 []"], result.stderr[-2000:]


def test_tensorboard_reads_event_files_without_tensorflow(micro, tmp_path):
    loop.train(micro(tasks=("toy_sentiment",)), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    assert "validation/toy_sentiment/accuracy" in events.Tags()["scalars"]
    file = EventFile(tmp_path / "names")
    file.write(1, {"mrr(rel=2)@10": 0.5})
    file.close()
    events = EventAccumulator(str(tmp_path / "names"))
    events.Reload()
    assert events.Tags()["scalars"] == ["mrr(rel=2)@10"]
