"""A fixture for the benchmarks: arms run in this process, one after another, on a tiny model.

A test then takes seconds. test_harness.py tests that arms take turns in processes of their own.
"""

import dataclasses
import importlib
import time

import pytest

from gemma_encoder.experiments.benchmarks import fresh, harness, models
from gemma_encoder.model import sizes


def call(function, settings):
    """Calls "module:function" in this process."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**settings)


def timed(function, *args, **settings):
    """Calls a function that returns figures and adds those that the harness measures."""
    began = time.perf_counter()
    result = dict(function(*args, **settings))
    return {"seconds": time.perf_counter() - began, "gib": 0.0} | result


def take_turns(arms, repeats, warmup=1):
    """`harness.take_turns` without processes."""
    results = {}
    for arm in arms:
        run = call(arm.setup, arm.settings)
        turns = [timed(run, turn) for turn in range(warmup + repeats)]
        results[arm.name] = turns[warmup:]
    return results


def run_fresh(function, settings, environment=None):
    """`fresh.run` without a process."""
    return timed(call, function, settings)


def write_model(folder, size, max_length, task=models.TASK, pooling="mean"):
    """`models.write` without a process."""
    models._write(folder, size, max_length, task, pooling)


@pytest.fixture
def in_process(monkeypatch):
    """Replaces processes by calls, and registers "bench", a model of a local and a global layer."""
    tiny = dataclasses.replace(
        sizes.GEMMA_CONFIGS["gemma3_tiny"],
        num_layers=2,
        embed_dim=32,
        hidden_dim=48,
        head_dim=8,
        query_scale=8**-0.5,
        sliding_window=16,
    )
    sizes.register_size("bench", dataclasses.replace(tiny, pattern=("local", "global")))
    monkeypatch.setattr(harness, "take_turns", take_turns)
    monkeypatch.setattr(fresh, "run", run_fresh)
    monkeypatch.setattr(models, "write", write_model)
    yield
    del sizes.GEMMA_CONFIGS["bench"]
