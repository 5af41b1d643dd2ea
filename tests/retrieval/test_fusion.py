"""Reciprocal rank fusion, by hand."""

import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.retrieval.fusion import fuse_rankings


def test_scores_are_sums_of_reciprocal_ranks():
    first = [[("a", 9.0), ("b", 8.0), ("c", 7.0)], []]
    second = [[("b", 0.2), ("d", 0.1)], [("x", 1.0)]]
    fused = fuse_rankings([first, second], k=3)
    assert [name for name, _ in fused[0]] == ["b", "a", "d"]
    assert fused[0][0][1] == pytest.approx(1 / 62 + 1 / 61)
    assert fused[0][1][1] == pytest.approx(1 / 61)
    assert fused[1] == [("x", pytest.approx(1 / 61))]
    assert fuse_rankings([first, second], k=1, constant=0)[0] == [("b", 1.5)]


def test_ties_are_in_the_order_of_the_systems():
    fused = fuse_rankings([[[("a", 1.0)]], [[("b", 1.0)]]], k=2)
    assert [name for name, _ in fused[0]] == ["a", "b"]


def test_misuse_of_a_fusion_is_refused():
    with pytest.raises(InputError, match="at least 0, got -1"):
        fuse_rankings([[[("a", 1.0)]]], 1, -1)
    with pytest.raises(InputError, match="of the same queries"):
        fuse_rankings([[[]], [[], []]], 1)
