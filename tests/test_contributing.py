"""The code blocks of CONTRIBUTING.md work: they become modules, and runs use all of them."""

import contextlib
import copy
import csv
import importlib
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import explain
from gemma_encoder.cli import predict
from gemma_encoder.data import registry
from gemma_encoder.evaluation import metrics
from gemma_encoder.inputs import kind
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import config as model_config
from gemma_encoder.model import heads, pooling
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.training import hooks, loop, losses

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
MODULES = {
    "weather_task",
    "reviews_task",
    "max_pooler",
    "brier_loss",
    "cosine_head",
    "count_kind",
    "norm_hook",
}
REGISTRIES = (
    registry._TASKS,
    metrics.METRICS,
    metrics.LOWEST_IS_BEST,
    kind._KINDS,
    model_config.POOLERS,
    pooling.POOLERS,
    heads.HEADS,
    losses.LOSSES,
    hooks._FACTORIES,
)
SMALL = {
    "model.size": "gemma2_tiny",
    "model.transformer": {
        "num_layers": 2,
        "embed_dim": 32,
        "hidden_dim": 64,
        "head_dim": 8,
        "query_scale": 8**-0.5,
    },
    "max_length": 64,
    "batch": {"row_length": 64, "rows": 8, "segments": 4},
    "train_for": "4 steps",
}


@contextlib.contextmanager
def restored_registries():
    """Restores the registries on exit, in place, since other modules refer to them."""
    before = [copy.copy(entries) for entries in REGISTRIES]
    nested = [
        {name: dict(value) for name, value in entries.items()}
        for entries in (metrics.METRICS, losses.LOSSES)
    ]
    try:
        yield
    finally:
        for entries, old in zip(REGISTRIES, before, strict=True):
            entries.clear()
            if isinstance(entries, list):
                entries.extend(old)
            else:
                entries.update(old)
        for entries, old in zip((metrics.METRICS, losses.LOSSES), nested, strict=True):
            for name, value in old.items():
                entries[name].clear()
                entries[name].update(value)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Folder of the page's modules, on Python's path; what they register is removed afterwards."""
    for name, body in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with restored_registries():
        yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name, None)


def lines(workdir, split):
    text = (workdir / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def states(predictor, text):
    """Returns the hidden states of the tokens of a text, [L, D]."""
    tokenizer = predictor.spec.tokenizer
    tokens = jnp.asarray([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
    encoder = abstract_encoder(predictor.spec.encoder).merge(predictor.parameters)
    ones = jnp.ones_like(tokens)
    return np.asarray(encoder(tokens, ones, jnp.arange(tokens.shape[1])[None], 1).hidden[0])


def write_reviews(folder, split, count):
    rows = [f"{split} review {i} is {('bad', 'good')[i % 2]}" for i in range(count)]
    lines = [f"{text}\t{('bad', 'good')[i % 2]}" for i, text in enumerate(rows)]
    (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")


def test_a_custom_source_is_read_by_index(modules, tmp_path, monkeypatch, micro):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reviews"
    folder.mkdir()
    write_reviews(folder, "train", 40)
    write_reviews(folder, "validation", 10)
    config = micro(
        modules=("reviews_task",), tasks=("reviews",), max_train_examples=30, max_eval_examples=8
    )
    outcome = loop.train(config, tmp_path / "run")
    assert outcome.metrics["reviews"].keys() == {"accuracy", "macro_f1"}
    (predictions,) = outcome.predictions["reviews"]
    assert predictions.table.labels == [i % 2 for i in range(8)]
    assert ge.Predictor.load(tmp_path / "run").spec.record["examples"] == {"reviews": 30}
    write_reviews(folder, "train", 50)
    with pytest.raises(InputError, match="train.tsv of its train split changed"):
        loop.train(config, tmp_path / "run")


def test_every_block_is_tested_and_every_file_exists():
    assert BLOCKS.keys() == MODULES
    assert PAGE.count("```python") == len(BLOCKS)
    named = re.findall(r"`((?:gemma_encoder|tests|experiments)/[\w./]*)`", PAGE)
    assert len(named) > 25
    assert [path for path in named if not (ROOT / path).exists()] == []
    targets = re.findall(r"^make ([\w-]+)", PAGE, re.MULTILINE)
    assert targets and all(
        re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in targets
    )


def test_task_metric_pooler_loss_and_hook(modules, micro, monkeypatch):
    """A run uses all five; its loss is predictable: one text, fixed weights, no dropout."""
    task = importlib.import_module("weather_task")
    records = task.records
    monkeypatch.setattr(
        task,
        "records",
        lambda split: records(split)[:1] * 60 if split == "train" else records(split),
    )
    config = micro(
        modules=("weather_task", "max_pooler", "brier_loss", "norm_hook"),
        tasks=("weather",),
        model__pooling__name="max",
        losses__classification="brier",
        hooks=("norm_trace",),
        optimizer__learning_rate=1e-12,
        model__feed_forward_dropout=0.0,
        model__compute_dtype="float32",
        log_every="1 step",
    )
    workdir = modules / "run"
    outcome = loop.train(config, workdir)
    assert outcome.metrics["weather"].keys() == {"accuracy", "balanced_accuracy"}
    labels = np.arange(20) % 2
    decided = np.array([output.argmax() for output in outcome.predictions["weather"][0].outputs])
    recalls = [(decided[labels == label] == label).mean() for label in (0, 1)]
    assert outcome.metrics["weather"]["balanced_accuracy"] == pytest.approx(np.mean(recalls))

    predictor = ge.Predictor.load(outcome.checkpoint)
    assert predictor.spec.encoder.pooling.name == "max"
    (pooled,) = predictor.embed(["day 0 brings sun"])
    largest = states(predictor, "day 0 brings sun").max(axis=0)
    np.testing.assert_allclose(pooled, largest, atol=1e-5)  # float32, two programs
    with pytest.raises(InputError, match="pooler 'max' does not expose its weights"):
        explain.pooler_weights(predictor, "day 0 brings sun")
    probability = predictor.predict(["day 0 brings sun"])[0]
    expected = ((probability - [1, 0]) ** 2).sum()
    assert abs(expected + np.log(probability[0])) > 0.01  # cross entropy is another number
    logged = [line["loss"] for line in lines(workdir, "train")]
    np.testing.assert_allclose(logged, expected, rtol=1e-4)  # float32, two programs
    rows = list(csv.reader((workdir / "norms.csv").open()))
    assert [row[0] for row in rows] == ["2", "4"]
    np.testing.assert_allclose([float(row[1]) for row in rows], expected, rtol=1e-4)


def test_head(modules):
    importlib.import_module("cosine_head")
    rows = [
        {"text": f"it was {word}, number {i}", "label": word}
        for i in range(20)
        for word in ("good", "bad")
    ]
    predictor = ge.fine_tune(
        "cosine_classification",
        train=rows,
        workdir=modules / "run",
        overrides=SMALL | {"modules": ("cosine_head",)},
    )
    assert predictor.spec.encoder.heads["own"].kind == "cosine"
    assert predictor.parameters["heads"]["own"]["prototypes"].shape == (2, 32)
    probabilities = predictor.predict(["it was good"])
    pooled = predictor.embed(["it was good"])[0]
    prototypes = np.asarray(predictor.parameters["heads"]["own"]["prototypes"])
    cosines = prototypes @ pooled / np.linalg.norm(prototypes, axis=1) / np.linalg.norm(pooled)
    odds = np.exp(10 * (cosines[0] - cosines[1]))
    np.testing.assert_allclose(probabilities[0, 0] / probabilities[0, 1], odds, rtol=0.01)


def test_kind(modules, capsys):
    with restored_registries():
        train_counts(modules)
    # Another process, which has not imported the module.
    sys.modules.pop("count_kind")
    message = "unknown task kind 'count'.*; import count_kind first \\(--modules\\)"
    with pytest.raises(InputError, match=message):
        ge.Predictor.load(modules / "run")
    (modules / "texts.txt").write_text("visit visit\n")
    flags = [f"--workdir={modules / 'run'}", f"--input={modules / 'texts.txt'}"]
    assert predict.main(flags) == 2
    assert predict.main([*flags, "--modules=count_kind"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] > 0


def train_counts(modules):
    importlib.import_module("count_kind")
    task = ge.Task("visits", "count", ge.Template("{text}"))
    rows = [{"text": " ".join(["visit"] * n), "label": n} for n in range(1, 5) for _ in range(10)]
    overrides = SMALL | {"modules": ("count_kind",)}
    predictor = ge.fine_tune(task, train=rows, workdir=modules / "run", overrides=overrides)
    assert predictor.task() == task and (predictor.predict(["visit"]) > 0).all()
    *_, line = lines(modules / "run", "validation")
    assert line["task"] == "visits" and line["mean_absolute_count_error"] > 0
    assert metrics.lowest_is_best("mean_absolute_count_error")
    rows[7]["label"] = 1.5
    with pytest.raises(InputError, match=r"label 1\.5 is not a count; expected a whole number"):
        ge.fine_tune(task, train=rows, workdir=modules / "bad", overrides=overrides)


def registry_sizes():
    return [len(entries) for entries in REGISTRIES], len(losses.LOSSES["classification"])


def test_registries_are_restored(modules):
    before = registry_sizes()
    with restored_registries():
        for name in BLOCKS:
            importlib.import_module(name)
        assert "brier" in losses.LOSSES["classification"] and "max" in pooling.POOLERS
    assert registry_sizes() == before
