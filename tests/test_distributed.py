"""Processes that fail together: none waits for another that has left."""

import pytest

from gemma_encoder import distributed
from gemma_encoder.inputs.errors import InputError


@pytest.mark.parametrize("others_fail", [False, True])
def test_all_leave_with_an_error_if_one_fails(monkeypatch, others_fail):
    told = []

    def any_process(answer):
        told.append(answer)
        return answer or others_fail

    monkeypatch.setattr(distributed, "any_process", any_process)
    with pytest.raises(KeyError, match="own"), distributed.failing_together():
        raise KeyError("own")
    assert told == [True]
    told.clear()
    if others_fail:
        refused = pytest.raises(InputError, match="another process of this run failed")
        with refused, distributed.failing_together():
            pass
    else:
        with distributed.failing_together():
            pass
    assert told == [False]


def test_an_error_is_not_hidden_by_processes_that_have_ended(monkeypatch):
    def any_process(answer):
        raise RuntimeError("a peer is gone")

    monkeypatch.setattr(distributed, "any_process", any_process)
    with pytest.raises(KeyError, match="own"), distributed.failing_together():
        raise KeyError("own")
