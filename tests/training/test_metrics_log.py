"""Progress: a bar on a terminal and in a notebook, plain lines elsewhere."""

import sys
import types

import pytest

from gemma_encoder.training.metrics_log import Progress


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
