"""Packing: each text is emitted once, lists stay in one block, and the pool can be restored."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs.batch import Batch, BatchShape, concatenate
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment


def make_group(index: int, lengths, is_list: bool = False) -> PackingGroup:
    """Builds a group whose example ids (100 per group), tokens and labels identify every text."""
    return PackingGroup(
        tuple(
            Segment(
                1000 * index + 50 * slot + np.arange(1, length + 1, dtype=np.int32),
                task_id=index % 3,
                label=index + 0.25 + slot / 8,
                example_id=100 * index + slot,
            )
            for slot, length in enumerate(lengths)
        ),
        is_list,
    )


@st.composite
def streams(draw, max_groups=25):
    """(shape, groups): any mixture of single texts and lists that fit in a block of this shape."""
    segments = draw(st.integers(1, 4))
    shape = BatchShape(
        rows=draw(st.integers(1, 4)),
        row_length=segments * draw(st.integers(1, 6)),
        segments=segments,
        groups=draw(st.integers(1, 3)),
        list_size=draw(st.integers(1, 4)),
    )
    share = shape.row_length // segments  # lists of texts this short always fit in an empty block
    singles = st.integers(1, shape.row_length).map(lambda length: ([length], False))
    lists = st.lists(
        st.integers(1, share), min_size=1, max_size=min(shape.list_size, shape.rows * segments)
    ).map(lambda lengths: (lengths, True))
    return shape, [
        make_group(index, *group)
        for index, group in enumerate(draw(st.lists(singles | lists, max_size=max_groups)))
    ]


def check_structure(batch: Batch, shape: BatchShape, padding: str) -> None:
    """Checks the invariants of a block's arrays."""
    assert batch.tokens.shape == (shape.rows, shape.row_length)
    assert batch.weight.shape == (shape.rows, shape.segments)
    for row in range(shape.rows):
        ids = batch.segment_ids[row]
        count = int(batch.weight[row].sum())
        used = ids > 0
        edge = used[::-1] if padding == "left" else used
        assert (np.diff(edge.astype(int)) <= 0).all(), "padding is on one side only"
        assert (np.diff(ids[used]) >= 0).all(), "segments are contiguous"
        assert sorted(set(ids[used])) == list(range(1, count + 1))
        for segment in range(1, count + 1):
            inside = ids == segment
            np.testing.assert_array_equal(batch.positions[row][inside], np.arange(inside.sum()))
        assert (batch.positions[row][~used] == 0).all()
        assert (batch.tokens[row][~used] == 0).all()
        np.testing.assert_array_equal(
            batch.weight[row], [1] * count + [0] * (shape.segments - count)
        )
        for field, empty in (
            ("group_id", -1),
            ("example_id", -1),
            ("list_slot", 0),
            ("label", 0),
            ("task_id", 0),
        ):
            assert (getattr(batch, field)[row, count:] == empty).all()


def contents(batch: Batch) -> list[tuple]:
    """Returns (row, example id, task, label, group id, list slot, tokens) of every text, by row."""
    return [
        (
            int(row),
            *(
                getattr(batch, field)[row, slot].item()
                for field in ("example_id", "task_id", "label", "group_id", "list_slot")
            ),
            tuple(batch.tokens[row][batch.segment_ids[row] == slot + 1].tolist()),
        )
        for row, slot in zip(*np.nonzero(batch.weight), strict=True)
    ]


def filled(shape, groups, padding="right") -> Packer:
    packer = Packer(shape, padding)
    for group in groups:
        packer.add(group)
    return packer


def drain(packer: Packer) -> list[Batch]:
    blocks = []
    while len(packer):
        blocks.append(packer.emit())
    return blocks


def same(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@given(streams(), st.sampled_from(["left", "right"]))
def test_every_text_is_emitted_once_and_unchanged(stream, padding):
    shape, groups = stream
    blocks = drain(filled(shape, groups, padding))
    for block in blocks:
        check_structure(block, shape, padding)
    emitted = {
        example: (task, label, tokens)
        for block in blocks
        for _, example, task, label, _, _, tokens in contents(block)
    }
    assert sum(len(contents(block)) for block in blocks) == len(emitted)
    assert emitted == {
        s.example_id: (s.task_id, s.label, tuple(s.tokens.tolist()))
        for group in groups
        for s in group.segments
    }


@given(streams())
def test_lists_stay_in_one_block_with_their_slots(stream):
    shape, groups = stream
    list_sizes = {
        group.segments[0].example_id // 100: len(group.segments)
        for group in groups
        if group.is_list
    }
    finished = set()
    for block in drain(filled(shape, groups)):
        group_ids = {}
        for _, example, _, _, group_id, slot, _ in contents(block):
            index, expected_slot = divmod(example, 100)
            if index in list_sizes:
                assert slot == expected_slot
                group_ids.setdefault(index, []).append(group_id)
            else:
                assert (group_id, slot) == (-1, 0)
        for index, ids in group_ids.items():
            assert len(set(ids)) == 1
            assert len(ids) == list_sizes[index], "the whole list is in this block"
            assert index not in finished
            finished.add(index)
        assert sorted(ids[0] for ids in group_ids.values()) == list(range(len(group_ids)))
        assert len(group_ids) <= shape.groups
    assert finished == set(list_sizes)


@given(streams())
def test_the_oldest_group_is_always_in_the_next_block(stream):
    shape, groups = stream
    packer = filled(shape, groups)
    waiting = [group.segments[0].example_id for group in groups]
    while len(packer):
        emitted = {example for _, example, *_ in contents(packer.emit())}
        assert waiting[0] in emitted
        waiting = [example for example in waiting if example not in emitted]
        assert len(packer) == len(waiting)


@given(streams())
def test_rows_have_the_same_texts_with_left_and_right_padding(stream):
    shape, groups = stream
    left = drain(filled(shape, groups, "left"))
    right = drain(filled(shape, groups, "right"))
    assert [contents(block) for block in left] == [contents(block) for block in right]


@given(streams(), st.data())
def test_a_packer_restored_from_its_pool_emits_the_same(stream, data):
    shape, groups = stream
    packer = Packer(shape)
    restart = data.draw(st.integers(0, len(groups)))
    emits = data.draw(st.sets(st.integers(0, len(groups))))
    restored = None
    for index, group in enumerate(groups):
        if index == restart:
            restored = filled(shape, packer.waiting)
        packer.add(group)
        if restored is not None:  # an empty packer is false
            restored.add(group)
        if index in emits:
            block = packer.emit()
            assert restored is None or same(block, restored.emit())
    if restored is None:
        restored = filled(shape, packer.waiting)
    assert (len(packer), packer.ready) == (len(restored), restored.ready)
    assert list(packer.waiting) == list(restored.waiting)
    expected = drain(packer)
    actual = drain(restored)
    assert len(expected) == len(actual)
    assert all(same(a, b) for a, b in zip(expected, actual, strict=True))


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 5))
def test_one_segment_per_row_packs_texts_in_order(lengths, rows):
    shape = BatchShape(rows=rows, row_length=9, segments=1)
    blocks = drain(
        filled(shape, [make_group(index, [length]) for index, length in enumerate(lengths)])
    )
    packed = [(row, example) for block in blocks for row, example, *_ in contents(block)]
    assert packed == [(index % rows, 100 * index) for index in range(len(lengths))]


@pytest.mark.parametrize(("rows", "row_length"), [(64, 128), (16, 512)])
def test_rows_are_filled_well(rows, row_length):
    rng = np.random.default_rng(0)
    shape = BatchShape(rows=rows, row_length=row_length, segments=row_length // 8)
    packer = Packer(shape)
    blocks = []
    example_id = 0
    while len(blocks) < 12:
        while not packer.ready:
            # Lengths like SST-2: mean about 20 tokens, maximum 66.
            length = int(np.clip(rng.lognormal(2.83, 0.6), 3, 66))
            packer.add(PackingGroup((Segment(np.ones(length, np.int32), 0, 0.0, example_id),)))
            example_id += 1
        blocks.append(packer.emit())
    batch = concatenate(blocks, 1)
    assert 18 < (batch.segment_ids > 0).sum() / batch.weight.sum() < 22
    fill = (batch.segment_ids > 0).mean(axis=1)
    assert fill.mean() >= 0.95
    per_block = fill.reshape(len(blocks), rows).mean(axis=1)
    assert per_block.min() >= 0.95, "every block is well filled"


@pytest.mark.parametrize(
    ("segments", "first", "too_much", "later"), [(9, [4], [4, 4], [6]), (2, [4], [3, 3], [6])]
)
def test_a_list_that_does_not_fit_takes_no_space(segments, first, too_much, later):
    """Tokens (nine segments) or segments (two) of its first texts are free for later texts."""
    shape = BatchShape(rows=1, row_length=10, segments=segments, groups=2, list_size=2)
    blocks = drain(
        filled(shape, [make_group(0, first), make_group(1, too_much, True), make_group(2, later)])
    )
    assert [[example for _, example, *_ in contents(block)] for block in blocks] == [
        [0, 200],
        [100, 101],
    ]


def test_concatenated_blocks_have_separate_lists():
    shape = BatchShape(rows=2, row_length=8, segments=2, groups=3, list_size=2)
    blocks = [
        filled(shape, [make_group(10 * block + index, [2, 2], True) for index in range(2)]).emit()
        for block in range(3)
    ]
    batch = concatenate(blocks, shape.groups)
    members = {}
    for _, example, _, _, group_id, slot, _ in contents(batch):
        members.setdefault(group_id, []).append((example // 100, slot))
    assert sorted(members) == [0, 1, 3, 4, 6, 7]
    assert {group_id: sorted(texts) for group_id, texts in members.items()} == {
        3 * block + index: [(10 * block + index, 0), (10 * block + index, 1)]
        for block in range(3)
        for index in range(2)
    }


def test_an_empty_pool_gives_padding():
    shape = BatchShape(rows=2, row_length=4, segments=2)
    block = Packer(shape).emit()
    check_structure(block, shape, "right")
    assert not block.weight.any()


def test_ready_counts_tokens_texts_and_lists():
    shape = BatchShape(rows=2, row_length=10, segments=5, groups=2, list_size=2)
    # Two blocks: 40 tokens, 20 texts or 4 lists.
    for group, needed in (
        (make_group(0, [10]), 4),
        (make_group(0, [1]), 20),
        (make_group(0, [1], True), 4),
    ):
        packer = Packer(shape, lookahead=2)
        added = 0
        while not packer.ready:
            packer.add(group)
            added += 1
        assert added == needed
    blocks = 0
    while packer.ready:
        packer.emit()
        blocks += 1
    assert (blocks, len(packer)) == (1, 2)  # emitted groups no longer count


def refuse(shape, group, match):
    packer = filled(shape, [make_group(7, [1])])
    with pytest.raises(InputError, match=match):
        packer.add(group)
    assert len(packer) == 1
    # The refused group left nothing in the pool.
    assert [example for _, example, *_ in contents(packer.emit())] == [700]


SHAPE = BatchShape(rows=2, row_length=10, segments=2, groups=2, list_size=8)


def test_a_text_longer_than_a_row_is_refused():
    refuse(
        SHAPE,
        make_group(0, [11]),
        "a text of 11 tokens does not fit in a row of 10; "
        "raise batch.row_length or lower max_length",
    )
    refuse(SHAPE, make_group(0, [3, 12], True), "a text of 12 tokens")


def test_a_list_longer_than_list_size_is_refused():
    refuse(
        dataclasses.replace(SHAPE, list_size=3),
        make_group(0, [1] * 4, True),
        "a list of 4 documents exceeds the batch's list_size=3",
    )


def test_a_list_with_more_texts_than_a_block_is_refused():
    refuse(
        SHAPE,
        make_group(0, [1] * 5, True),
        "5 texts of one list, 5 tokens in total, do not fit in 2 rows of 10 tokens and 2 segments",
    )


def test_a_list_with_more_tokens_than_a_block_is_refused():
    refuse(
        SHAPE,
        make_group(0, [6, 6, 6], True),
        "3 texts of one list, 18 tokens in total, do not fit in 2 rows",
    )


def test_a_group_without_texts_is_refused():
    refuse(SHAPE, PackingGroup(()), "text")


def test_a_text_without_tokens_is_refused():
    refuse(SHAPE, make_group(0, [0]), "token")


def test_an_unknown_padding_is_refused():
    with pytest.raises(InputError, match="padding must be 'left' or 'right', got 'center'"):
        Packer(SHAPE, "center")


def test_roles_and_vector_labels_stay_with_their_text():
    shape = BatchShape(rows=2, row_length=12, segments=3, targets=3)
    groups = [
        PackingGroup(
            (
                Segment(
                    np.full(4, index + 5, np.int32),
                    0,
                    float(index),
                    index,
                    role=index % 3,
                    targets=np.eye(3, dtype=np.float32)[index % 3][: 1 + index % 3],
                ),
            )
        )
        for index in range(6)
    ]
    packer = filled(shape, groups)
    restored = filled(shape, packer.waiting)
    for batch in (packer.emit(), restored.emit()):
        for row, slot in zip(*np.nonzero(batch.weight), strict=True):
            index = int(batch.example_id[row, slot])
            assert batch.role[row, slot] == index % 3
            expected = np.zeros(3)
            expected[index % 3] = 1
            np.testing.assert_array_equal(batch.targets[row, slot], expected)
        assert batch.weight.sum() == 6
