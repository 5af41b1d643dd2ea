"""The trainer alone: its example, restore precedence, and the same steps as the loop."""

import contextlib
import dataclasses
import doctest
import itertools

import jax
import numpy as np
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.training import loop, trainer
from gemma_encoder.training.build import build
from gemma_encoder.training.metrics_log import read_metrics
from gemma_encoder.training.trainer import Trainer

FIELDS = {"tasks": ("toy_sentiment",), "max_eval_examples": 8, "log_every": "1 steps"}


def make(config, total=4, warmup=0):
    return Trainer(build(config, for_training=True), sharding.make_mesh(config.mesh), total, warmup)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(Trainer.__doc__, {}, "Trainer", None, 0)
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0 and result.attempted > 10
    assert not list(tmp_path.iterdir())


def test_it_takes_the_steps_of_the_loop_without_a_file(micro, tmp_path, monkeypatch):
    config = micro(**FIELDS, warmup="1 steps")
    outcome = loop.train(config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    alone = make(config, total=4, warmup=1)
    alone.initialize()
    losses = []
    with contextlib.closing(alone.stream()) as stream:
        for batch in itertools.islice(stream, 4):
            before = alone.state
            losses.append(float(alone.step(batch).loss))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.parameters))
    assert losses == [line["loss"] for line in lines] and len(losses) == 4
    assert alone.step_number == int(alone.state.step) == 4
    evaluation = alone.evaluate()
    assert evaluation.step == 4 and evaluation.metrics == outcome.metrics
    assert not list((tmp_path / "here").iterdir())


def test_restore_precedence(micro, monkeypatch):
    """This run's checkpoint, a warm start, pretrained weights, random values."""
    config = micro(**FIELDS)
    loaded = []
    random = make(config)
    random.initialize()

    def load(name):
        def fake(checkpoint, encoder, shapes, tasks=()):
            loaded.append((name, checkpoint))
            return {"heads": jax.tree.map(np.zeros_like, random.state.parameters["heads"])}

        return fake

    monkeypatch.setattr(trainer, "load_warm", load("warm"))
    monkeypatch.setattr(trainer, "load_pretrained", load("pretrained"))
    recipe = build(config, for_training=True)

    def starting_from(checkpoint, **fields):
        model = dataclasses.replace(recipe.config.model, **fields)
        changed = dataclasses.replace(recipe.config, model=model)
        changed_recipe = dataclasses.replace(recipe, config=changed, checkpoint=checkpoint)
        return Trainer(changed_recipe, random.mesh, 4)

    both = starting_from("W", warm_start="W", pretrained="P")
    restored = random.state._replace(step=np.int32(3))
    both.initialize(restored)
    assert both.state is restored and both.step_number == 3 and not loaded
    for started, expected in (
        (both, ("warm", "W")),
        (starting_from("P", pretrained="P"), ("pretrained", "P")),
    ):
        started.initialize()
        assert loaded.pop() == expected and not loaded and started.step_number == 0
        heads = jax.tree.leaves(started.state.parameters["heads"])
        assert not any(leaf.any() for leaf in heads)
    plain = starting_from(None)
    plain.initialize()
    assert not loaded
    jax.tree.map(np.testing.assert_array_equal, plain.state.parameters, random.state.parameters)


def test_a_mesh_or_warmup_that_does_not_fit_is_refused(micro, tmp_path):
    with pytest.raises(InputError, match="warmup of 5 steps does not fit in a training of 4"):
        make(micro(**FIELDS), total=4, warmup=5)
    with pytest.raises(InputError, match="batch.rows=6 must be a multiple of data x fsdp = 8"):
        make(micro(**FIELDS, batch__rows=6, mesh=(8, 1, 1)))
    with pytest.raises(InputError, match="warmup of 5 steps does not fit in a training of 4"):
        loop.train(micro(**FIELDS, warmup="5 steps"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
