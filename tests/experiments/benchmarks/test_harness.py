"""The harness: arms take turns in processes, figures are medians, and failures are explained."""

import os
import signal
import time

import pytest

from gemma_encoder.experiments.benchmarks import fresh, harness
from gemma_encoder.inputs.errors import InputError

HERE = "tests.experiments.benchmarks.test_harness"


def counting(step):
    """An arm that reports its process and the index of its turn."""
    return lambda turn: {"seconds": step * (turn + 1), "turn": turn, "process": os.getpid()}


def timed(pause):
    def run(turn):
        time.sleep(pause)
        return {"turn": turn}

    return run


def failing():
    def run(turn):
        raise ValueError("no such luck")

    return run


def killed():
    """An arm that the system kills, as it does when memory runs out."""
    return lambda turn: os.kill(os.getpid(), signal.SIGKILL)


def echo(value):
    return {"value": value, "argument": 1.0}


def raising():
    raise InputError("no such luck")


def test_arms_take_turns_in_processes_of_their_own():
    arms = [
        harness.Arm("one", f"{HERE}:counting", {"step": 1.0}),
        harness.Arm("two", f"{HERE}:counting", {"step": 4.0}),
    ]
    results = harness.take_turns(arms, repeats=3, warmup=2)
    assert [turn["turn"] for turn in results["one"]] == [2, 3, 4]
    assert [turn["turn"] for turn in results["two"]] == [2, 3, 4]
    processes = {turn["process"] for turns in results.values() for turn in turns}
    assert len(processes) == 2
    assert os.getpid() not in processes
    medians = harness.medians(results)
    assert medians["one"]["seconds"] == 4.0
    assert medians["one"]["spread"] == pytest.approx(0.5)
    assert medians["two"]["gib"] > 0
    assert harness.ratio(results, "one", "two") == 4.0
    assert harness.ratio(results, "two", "one") == 0.25


def test_turn_without_its_own_time_is_timed():
    arms = [harness.Arm("one", f"{HERE}:timed", {"pause": 0.05})]
    results = harness.take_turns(arms, repeats=1, warmup=0)
    assert results["one"][0]["seconds"] >= 0.05


def test_arm_that_fails_reports_its_error():
    with pytest.raises(RuntimeError, match="(?s)broken:.*no such luck"):
        harness.take_turns([harness.Arm("broken", f"{HERE}:failing", {})], repeats=1)


def test_arm_that_is_killed_is_named():
    with pytest.raises(RuntimeError, match="greedy: its process died"):
        harness.take_turns([harness.Arm("greedy", f"{HERE}:killed", {})], repeats=1)


def test_nan_is_not_the_same_as_any_figure():
    with pytest.raises(SystemExit, match="loss is"):
        harness.same("step", {"a": [{"loss": float("nan")}], "b": [{"loss": 1.0}]}, "loss", 1e9)
    results = {"a": [{"loss": 1.0}], "b": [{"loss": 1.5}]}
    assert harness.same("step", results, "loss", 0.5) == pytest.approx(1 / 3)


def test_table_is_published_to_the_terminal_and_a_file(tmp_path, capsys):
    file = tmp_path / "out.json"
    harness.publish("title", ["arm", "seconds"], [["ours", 1], ["peer", 2]], ["a note"], file)
    printed = capsys.readouterr().out
    assert "| arm | seconds |\n| --- | --- |\n| ours | 1 |\n| peer | 2 |" in printed
    assert "cores" in printed
    assert '"arm": "peer"' in file.read_text()


def test_fresh_process_is_timed_from_its_start():
    figures = fresh.run(f"{HERE}:echo", {"value": 3.5})
    assert figures["value"] == 3.5
    assert figures["gib"] > 0
    assert 0.05 < figures["seconds"] < 600


def test_fresh_process_that_fails_reports_its_error():
    with pytest.raises(RuntimeError, match="(?s)exited with 1.*no such luck"):
        fresh.run(f"{HERE}:raising", {})
