"""The log of metrics as JSON, and progress: a bar on a terminal and in a notebook, else lines."""

import json
import math
import sys
import types

import pytest
from etils import epath

from gemma_encoder import activity
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.training.metrics_log import MetricsLog, Progress, read_metrics


@pytest.mark.parametrize(
    ("is_terminal", "is_notebook"), [(False, False), (True, False), (False, True)]
)
def test_a_bar_or_plain_lines(monkeypatch, capsys, is_terminal, is_notebook):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    progress = Progress(total=4, done=1)
    progress.advance(0.25)
    progress.report(2, "loss 0.2500")
    progress.say("step 2: evaluated")
    progress.close()
    shown = capsys.readouterr().err
    has_bar = is_terminal or is_notebook
    assert ("training:" in shown and "/4" in shown) == has_bar
    assert ("step 2/4  loss 0.2500  0:0" in shown) == (not has_bar)
    assert "step 2: evaluated" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_metric_is_null_in_the_file(tmp_path, value):
    for step in (1, 2):  # the second start reads and rewrites the lines of the first
        log = MetricsLog(epath.Path(tmp_path), step)
        log.write(step, "validation", {"spearman": value, "pearson": 0.5}, "t")
        log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["spearman"] for line in lines] == [None, None]
    assert all(math.isnan(line["spearman"]) for line in read_metrics(tmp_path))


DAMAGED = [
    b"{}",
    b"[1]",
    b"\xff\xfe",
    b'{"step": 1, "split": "train", "loss": 0.',
    b'{"step": "1", "split": "train"}',
    b'{"step": true, "split": "train"}',
    b'{"step": 1, "split": ["train"]}',
    b'{"step": 1, "split": "train", "task": {}}',
    b"[" * 100_000,
    b"1" * 5_000,
]


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: repr(damage[:40]))
def test_damaged_lines_are_skipped_alone(tmp_path, damage):
    lines = [b'{"step": %d, "split": "train", "loss": 1.0}' % step for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[1]]) + b"\n")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    MetricsLog(epath.Path(tmp_path), 2).close()  # a resumed run
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(lines) + b"\n"


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_time_left_does_not_count_compiling(capsys, monkeypatch):
    """Ten steps of two seconds are done, after compiling for a minute; ninety remain."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    clock = Clock()
    with activity.compiling("another program", clock):  # before the run
        clock.now += 500
    progress = Progress(total=100, done=0, clock=clock)
    with activity.compiling("the training step", clock):
        clock.now += 60
    for _ in range(10):
        clock.now += 2
        progress.advance(0.5)
    progress.report(10, "loss 0.5000")
    assert "step 10/100  loss 0.5000  3:00 left" in capsys.readouterr().err
    with activity.compiling("the evaluation", clock):
        clock.now += 30
    clock.now += 20  # an evaluation, which is part of the run's pace
    progress.report(20, "loss 0.4000")
    assert "2:40 left" in capsys.readouterr().err  # 40 s for 20 steps, 80 remain


@pytest.mark.parametrize("is_terminal", [False, True])
def test_time_left_does_not_count_a_late_evaluation(capsys, monkeypatch, is_terminal):
    """A run resumes at step 50 with the evaluation that its last start missed."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    clock = Clock()
    progress = Progress(total=100, done=50, clock=clock)
    began = progress._bar.start_t if is_terminal else None
    with activity.compiling("the evaluation", clock):
        clock.now += 30
    clock.now += 600
    progress.start_training()
    if is_terminal:
        assert progress._bar.start_t == began + 630
    else:
        clock.now += 2
        progress.report(51, "loss 0.5000")
        clock.now += 98
        progress.report(52, "loss 0.4000")
        shown = capsys.readouterr().err
        assert "1:38 left" in shown and "40:00 left" in shown
    progress.close()


def test_hours_left_are_shown(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    clock = Clock()
    progress = Progress(total=1000, done=0, clock=clock)
    clock.now += 62
    progress.report(1, "loss 0.5000")
    assert "17:12:18 left" in capsys.readouterr().err


@pytest.mark.parametrize("done", [0, 50])
def test_the_bar_does_not_count_compiling(monkeypatch, done):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = Clock()
    progress = Progress(total=100, done=done, clock=clock)
    bar = progress._bar
    start = bar.start_t
    with activity.compiling("the training step", clock):
        clock.now += 60
    progress.advance(0.5)
    assert bar.start_t == start + 60 and bar.smoothing == 0
    progress.advance(0.5)
    assert bar.start_t == start + 60
    progress.close()


def test_the_bar_names_activities(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with activity.reporting() as reporter:
        progress = Progress(total=4, done=0)
        bar = progress._bar
        with activity.during(progress.__str__):
            with activity.compiling("the training step"):
                assert bar.desc == "compiling the training step …"
            assert bar.desc == "training"
        progress.close()
        assert reporter.show is activity.print_line


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be read: Is a .*; move it away"):
        read_metrics(tmp_path)
