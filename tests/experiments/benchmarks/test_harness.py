"""The benchmarks' harness: arms take turns, figures are medians, and an arm that fails says why."""

import os
import signal
import time

import pytest

from gemma_encoder.experiments.benchmarks import harness

HERE = "tests.experiments.test_harness"


def counting(step):
    """An arm that says its process and what turn it was asked for."""
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
    """An arm that the system kills, as it does for memory."""
    return lambda turn: os.kill(os.getpid(), signal.SIGKILL)


def test_arms_take_turns_in_processes_of_their_own():
    arms = [
        harness.Arm("one", f"{HERE}:counting", {"step": 1.0}),
        harness.Arm("two", f"{HERE}:counting", {"step": 4.0}),
    ]
    seen = harness.take_turns(arms, repeats=3, warmup=2)
    assert (
        [turn["turn"] for turn in seen["one"]]
        == [2, 3, 4]
        == [turn["turn"] for turn in seen["two"]]
    )
    processes = {turn["process"] for turns in seen.values() for turn in turns}
    assert len(processes) == 2 and os.getpid() not in processes
    found = harness.medians(seen)
    assert (
        found["one"]["seconds"] == 4.0
        and found["one"]["spread"] == pytest.approx(0.5)
        and found["two"]["gib"] > 0
    )
    assert harness.ratio(seen, "one", "two") == 4.0 and harness.ratio(seen, "two", "one") == 0.25


def test_what_an_arm_does_not_time_is_timed():
    seen = harness.take_turns(
        [harness.Arm("one", f"{HERE}:timed", {"pause": 0.05})], repeats=1, warmup=0
    )
    assert seen["one"][0]["seconds"] >= 0.05


def test_an_arm_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)broken:.*no such luck"):
        harness.take_turns([harness.Arm("broken", f"{HERE}:failing", {})], repeats=1)


def test_an_arm_that_is_killed_is_named():
    with pytest.raises(RuntimeError, match="greedy: its process died"):
        harness.take_turns([harness.Arm("greedy", f"{HERE}:killed", {})], repeats=1)


def test_what_is_published(tmp_path, capsys):
    harness.publish(
        "title", ["arm", "seconds"], [["ours", 1], ["peer", 2]], ["a note"], tmp_path / "out.json"
    )
    printed = capsys.readouterr().out
    assert (
        "| arm | seconds |\n| --- | --- |\n| ours | 1 |\n| peer | 2 |" in printed
        and "cores" in printed
    )
    assert '"arm": "peer"' in (tmp_path / "out.json").read_text()
