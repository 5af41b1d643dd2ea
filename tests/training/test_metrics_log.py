"""The log of metrics as JSON, and progress: a bar on a terminal and in a notebook, else lines."""

import json
import math
import sys
import types

import pytest
from etils import epath

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
