"""Training step: a turn is several new batches in a row."""

import types

import pytest

from gemma_encoder.experiments.benchmarks import train_step


def test_turn_of_the_training_step_is_a_row_of_new_batches(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 16.0])
    seen = []
    monkeypatch.setattr(train_step, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))

    def step(index):
        seen.append(index)
        return {"loss": float(index)}

    run = train_step.in_a_row(step, 3)
    assert [run(turn) for turn in range(2)] == [
        {"seconds": 1.0, "loss": 1.0},
        {"seconds": 2.0, "loss": 4.0},
    ]
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_arms_that_differ_are_an_error(value):
    results = {"ours": [{"loss": 1.0}], "peer": [{"loss": value}]}
    with pytest.raises(SystemExit, match="do not compute the same"):
        train_step.check_same("step", results, "loss", "float32")
    train_step.check_same("step", {"ours": [{"loss": 1.0}]}, "loss", "float32")
