"""Evaluating, resuming and warm starts take tasks from the checkpoint, not from other files."""

import dataclasses

import jax
import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.tasks import own_held_out, toy
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.template import Template
from gemma_encoder.training import loop
from gemma_encoder.training.build import build
from gemma_encoder.training.stored_tasks import StoredTasks
from gemma_encoder.weights import native

STEPS = {"tasks": ("own",), "train_for": "1 steps", "log_every": "1 steps"}


def write(path, labels, header="text,label", extra=""):
    rows = (f"it was {label} number {i}{extra},{label}\n" for i, label in enumerate(labels))
    path.write_text(f"{header}\n{''.join(rows)}")
    return str(path)


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """A run on the classes a, b, c, and its config's changes."""
    folder = tmp_path_factory.mktemp("trained")
    train = write(folder / "train.csv", "abc" * 20)
    changes = STEPS | {"own__train": train, "own__validation": train}
    loop.train(micro(**changes), folder / "run")
    return folder / "run", changes


def evaluate(micro, workdir, changes, **more):
    """Returns the metrics, the labels and the outputs."""
    result = loop.evaluate(micro(**changes | more), workdir)
    (predictions,) = result.predictions["own"]
    return result.metrics["own"], list(predictions.table.labels), predictions.outputs


def test_classes_are_those_of_the_checkpoint(micro, tmp_path, trained):
    workdir, changes = trained
    other = write(tmp_path / "other.csv", "bc" * 6)
    metrics, labels, _ = evaluate(micro, workdir, changes, own__train=other, own__validation=other)
    assert labels == [1, 2] * 6
    predicted = Predictor.load(workdir).predict(
        [f"it was {label} number {i}" for i, label in enumerate("bc" * 6)]
    )
    right = predicted.argmax(axis=1) == np.tile([1, 2], 6)
    assert metrics["accuracy"] == pytest.approx(right.mean())


def test_a_class_that_the_checkpoint_lacks_is_an_error(micro, tmp_path, trained):
    workdir, changes = trained
    other = write(tmp_path / "other.csv", "bcd")
    with pytest.raises(InputError, match=r"other.csv:4: unknown class 'd'. Valid: a, b, c"):
        loop.evaluate(micro(**changes | {"own__validation": other}), workdir)


def test_another_column_does_not_change_the_template(micro, tmp_path, trained):
    workdir, changes = trained
    plain = write(tmp_path / "plain.csv", "bc" * 6)
    wide = write(tmp_path / "wide.csv", "bc" * 6, "text,note,label", ",some note")
    *expected, outputs = evaluate(micro, workdir, changes, own__validation=plain)
    files = {"own__train": wide, "own__validation": wide}
    *actual, other_outputs = evaluate(micro, workdir, changes, **files)
    assert actual == expected
    np.testing.assert_array_equal(outputs, other_outputs)


def test_a_column_that_the_template_needs_is_missed(micro, tmp_path, trained):
    workdir, changes = trained
    other = write(tmp_path / "other.csv", "bc" * 6, header="sentence,label")
    with pytest.raises(InputError, match=r"other.csv has no column 'text'; it has 'sentence'"):
        loop.evaluate(micro(**changes | {"own__validation": other}), workdir)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "ordinal", "own.kind is 'ordinal', but .*run was trained with 'classification'"),
        ("template", "Say: {text}", r"own.template is 'Say: \{text\}', .* with '\{text\}'"),
        ("classes", ("c", "b", "a"), "own.classes is c, b, a, but .* with a, b, c"),
        ("fields", ("label",), "own.fields is label, but .* was trained with text"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint(micro, trained, field, value, message):
    workdir, changes = trained
    with pytest.raises(InputError, match=message):
        loop.evaluate(micro(**changes | {f"own__{field}": value}), workdir)


def test_a_range_that_contradicts_the_checkpoint(micro, tmp_path):
    train = write(tmp_path / "train.csv", [0, 1, 4, 2] * 10)
    changes = STEPS | {"own__train": train, "own__validation": train, "own__kind": "regression"}
    workdir = tmp_path / "run"
    loop.train(micro(**changes), workdir)
    spec = native.load_inference_spec(native.find(workdir))
    assert spec.tasks[0].label_range == (0.0, 4.0)
    with pytest.raises(InputError, match=r"own.label_range is 0.0, 5.0, but .* with 0.0, 4.0"):
        loop.evaluate(micro(**changes | {"own__label_range": (0.0, 5.0)}), workdir)
    wider = write(tmp_path / "wider.csv", [-2, 0, 9] * 4)
    files = {"own__train": wider, "own__validation": wider}
    _, labels, outputs = evaluate(micro, workdir, changes, **files)
    assert labels == [-2, 0, 9] * 4
    texts = [f"it was {label} number {i}" for i, label in enumerate([-2, 0, 9] * 4)]
    expected = Predictor.load(workdir).predict(texts)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)  # other shapes, float32


def test_resuming_takes_the_task_from_the_checkpoint(micro, trained, tmp_path, monkeypatch):
    """A later version may infer another task from the same files."""
    workdir, changes = trained
    stored = StoredTasks.of_newest(workdir)
    (task,) = stored.spec.tasks
    renamed = dataclasses.replace(task, template=Template("Text: {text}"))
    spec = dataclasses.replace(stored.spec, tasks=(renamed,))
    recipe = build(micro(**changes), stored=dataclasses.replace(stored, spec=spec))
    assert recipe.tasks[0].template.text == "Text: {text}"
    (source,) = recipe.sources
    assert source.inferred == stored.spec.record["inferred"]["own"]


def test_a_checkpoint_of_an_earlier_version_gives_its_task(micro, trained, tmp_path):
    """Earlier versions stored the task, but not how its files were read."""
    workdir, changes = trained
    stored = StoredTasks.of_newest(workdir)
    record = {name: x for name, x in stored.spec.record.items() if name != "inferred"}
    spec = dataclasses.replace(stored.spec, record=record)
    wide = write(tmp_path / "wide.csv", "bc" * 6, "text,note,label", ",some note")
    changes = changes | {"own__train": wide, "own__validation": wide}
    recipe = build(micro(**changes), stored=dataclasses.replace(stored, spec=spec))
    assert recipe.tasks == stored.spec.tasks


@pytest.mark.parametrize("field", ["template", "classes"])
def test_a_declaration_that_changed_since_training(micro, tmp_path, monkeypatch, field):
    changes = {"tasks": ("toy_sentiment",), "train_for": "1 steps", "log_every": "1 steps"}
    loop.train(micro(**changes), tmp_path / "run")
    make = toy.TASKS["toy_sentiment"]

    def changed(options):
        source = make(options)
        values = {"template": Template("New: {text}"), "classes": source.task.classes[::-1]}
        source.task = dataclasses.replace(source.task, **{field: values[field]})
        return source

    monkeypatch.setitem(registry._TASKS, "toy_sentiment", changed)
    with pytest.raises(InputError, match=f"task 'toy_sentiment': its {field} is .*, but the run"):
        loop.evaluate(micro(**changes), tmp_path / "run")


def head_of(recipe_changes, micro, mesh):
    from gemma_encoder.training.trainer import Trainer

    trainer = Trainer(build(micro(**recipe_changes), for_training=True), mesh, 1)
    trainer.initialize()
    return jax.tree.leaves(trainer.state.parameters["heads"])


@pytest.mark.parametrize(("labels", "reused"), [("abc", True), ("bcd", False)])
def test_a_warm_start_reuses_heads_of_the_same_classes(
    micro, trained, tmp_path, caplog, labels, reused
):
    from gemma_encoder.model import sharding

    workdir, changes = trained
    other = write(tmp_path / "other.csv", labels * 10)
    files = {
        "own__train": other,
        "own__validation": other,
        "model__warm_start": str(workdir),
        "seed": 1,
    }
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    leaves = head_of(changes | files, micro, mesh)
    spec = native.load_inference_spec(native.find(workdir))
    stored = jax.tree.leaves(native.load_parameters(native.find(workdir), spec.encoder)["heads"])
    equal = [np.array_equal(a, b) for a, b in zip(leaves, stored, strict=True)]
    assert all(equal) == reused
    message = "its classes is ('a', 'b', 'c'), for task 'own' it is ('b', 'c', 'd')"
    assert (message in caplog.text) == (not reused)


def test_another_kind_is_refused_before_labels_are_read(micro, trained):
    workdir, changes = trained
    with pytest.raises(InputError, match=r"own.kind is 'regression', but .* 'classification'"):
        loop.evaluate(micro(**changes | {"own__kind": "regression"}), workdir)


def test_decisions_of_another_source_are_not_those_of_files(micro, trained):
    """A task of seqio may be evaluated on a file under its name."""
    workdir, changes = trained
    stored = StoredTasks.of_newest(workdir)
    record = stored.spec.record | {"inferred": {"own": {"range_is_inferred": True}}}
    spec = dataclasses.replace(stored.spec, record=record)
    recipe = build(micro(**changes), stored=dataclasses.replace(stored, spec=spec))
    assert recipe.tasks == stored.spec.tasks


@pytest.mark.parametrize(
    ("change", "is_reported"),
    [("none", False), ("rows", True), ("own__held_out", True), ("own__validation", False)],
)
def test_records_that_the_run_did_not_hold_out_are_reported(
    micro, trained, tmp_path, caplog, change, is_reported
):
    workdir, changes = trained
    stored = StoredTasks.of_newest(workdir)
    train = write(tmp_path / "train.csv", "abc" * 20)
    changes = changes | {"own__train": train, "own__validation": ""}
    (source,) = build(micro(**changes)).sources
    data = {"own": {name: source.fingerprints(name) for name in ("train", "validation")}}
    record = stored.spec.record | {"data": data}
    stored = dataclasses.replace(stored, spec=dataclasses.replace(stored.spec, record=record))
    if change == "rows":
        write(tmp_path / "train.csv", "abc" * 21)
    elif change != "none":
        changes |= {change: {"own__held_out": 0.3, "own__validation": train}[change]}
    stored.report_other_records(build(micro(**changes), stored=stored).sources, "validation")
    assert ("may have been trained on them" in caplog.text) == is_reported


def test_evaluating_other_held_out_records_is_reported(micro, trained, caplog):
    workdir, changes = trained  # the run has a validation file
    loop.evaluate(micro(**changes | {"own__validation": ""}), workdir)
    assert "held out of the training file, but other ones than in training" in caplog.text


def test_a_version_that_holds_out_other_records_does_not_resume(micro, tmp_path, monkeypatch):
    changes = STEPS | {"own__train": write(tmp_path / "train.csv", "ab" * 20)}
    loop.train(micro(**changes), tmp_path / "run")
    monkeypatch.setattr(own_held_out, "VERSION", 99)
    with pytest.raises(InputError, match="held-out records of train.csv .* the version that start"):
        loop.train(micro(**changes), tmp_path / "run")
