"""The batch contract: shapes, dtypes, and concatenation of readers' blocks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs.batch import Batch, BatchShape, concatenate, empty_batch
from gemma_encoder.inputs.errors import InputError

sizes = st.integers(1, 6)


@given(sizes, sizes, sizes)
def test_an_empty_batch_is_padding(rows, length, segments):
    batch = empty_batch(BatchShape(rows=rows, row_length=length, segments=segments))
    for name in ("tokens", "segment_ids", "positions"):
        assert getattr(batch, name).shape == (rows, length)
    for name in ("task_id", "label", "group_id", "list_slot", "example_id", "weight", "role"):
        assert getattr(batch, name).shape == (rows, segments)
    for name, field in batch._asdict().items():
        floats = ("label", "weight", "targets")
        assert field.dtype == (np.float32 if name in floats else np.int32), name
        assert (field == (-1 if name in ("group_id", "example_id") else 0)).all(), name


@given(
    st.lists(
        st.lists(st.lists(st.integers(-1, 2), min_size=2, max_size=2), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_concatenate_keeps_rows_in_order_and_renumbers_groups(group_ids):
    groups_per_block = 3
    blocks = []
    for index, ids in enumerate(group_ids):
        block = empty_batch(
            BatchShape(rows=len(ids), row_length=4, segments=2, groups=groups_per_block)
        )
        blocks.append(
            block._replace(
                group_id=np.array(ids, np.int32),
                tokens=block.tokens + index,
                example_id=block.example_id + index,
            )
        )
    before = [block.group_id.copy() for block in blocks]
    batch = concatenate(blocks, groups_per_block)
    start = 0
    for index, (block, ids) in enumerate(zip(blocks, before, strict=True)):
        rows = slice(start, start + len(ids))
        np.testing.assert_array_equal(batch.tokens[rows], block.tokens)
        np.testing.assert_array_equal(batch.example_id[rows], block.example_id)
        np.testing.assert_array_equal(
            batch.group_id[rows], np.where(ids == -1, -1, ids + index * groups_per_block)
        )
        np.testing.assert_array_equal(block.group_id, ids)  # the blocks themselves are untouched
        start += len(ids)
    assert start == len(batch.tokens)
    for name, dtype in zip(
        Batch._fields, (field.dtype for field in empty_batch(BatchShape(1, 1))), strict=True
    ):
        assert getattr(batch, name).dtype == dtype, name


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_readers_share_rows_and_groups(readers, rows, groups):
    shape = BatchShape(
        rows=rows * readers, row_length=16, segments=3, groups=groups * readers, list_size=5
    )
    part = shape.split(readers)
    assert part == BatchShape(rows=rows, row_length=16, segments=3, groups=groups, list_size=5)


@pytest.mark.parametrize(("rows", "groups"), [(6, 4), (4, 6)])
def test_an_uneven_split_is_refused(rows, groups):
    with pytest.raises(
        InputError,
        match=f"readers x micro-batches = 4 cannot share {rows} rows and {groups} lists evenly",
    ):
        BatchShape(rows=rows, row_length=8, groups=groups).split(4)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BatchShape)])
def test_sizes_below_the_minimum_are_refused(field):
    minimum = 0 if field == "targets" else 1  # there may be no vector labels
    BatchShape(**({"rows": 2, "row_length": 2} | {field: minimum}))
    for value in (minimum - 1, -7):
        with pytest.raises(InputError, match=f"{field} must be at least {minimum}, got {value}"):
            BatchShape(**({"rows": 2, "row_length": 2} | {field: value}))


def test_vector_labels_have_a_width():
    assert empty_batch(BatchShape(3, 8, 2)).targets.shape == (3, 2, 0)
    assert empty_batch(BatchShape(3, 8, 2, targets=5)).targets.shape == (3, 2, 5)
