"""Packing: every text once, nothing overlaps, lists stay whole, and an interrupted stream goes on where it stopped."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs.batch import Batch, BatchShape, concatenate
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.packing import Packer, PackingGroup, Segment


def make_unit(number: int, lengths, is_list: bool = False) -> PackingGroup:
    """A unit whose example ids (100 per unit), tokens and labels tell every text apart."""
    return PackingGroup(
        tuple(
            Segment(
                1000 * number + 50 * slot + np.arange(1, length + 1, dtype=np.int32),
                task_id=number % 3,
                label=number + 0.25 + slot / 8,
                example_id=100 * number + slot,
            )
            for slot, length in enumerate(lengths)
        ),
        is_list,
    )


@st.composite
def streams(draw, max_units=25):
    """(shape, units): any mixture of single texts and lists that a block of this shape can hold."""
    segments = draw(st.integers(1, 4))
    shape = BatchShape(
        rows=draw(st.integers(1, 4)),
        row_length=segments * draw(st.integers(1, 6)),
        segments=segments,
        groups=draw(st.integers(1, 3)),
        list_size=draw(st.integers(1, 4)),
    )
    share = shape.row_length // segments  # lists of texts this short always fit into an empty block
    singles = st.integers(1, shape.row_length).map(lambda length: ([length], False))
    lists = st.lists(
        st.integers(1, share), min_size=1, max_size=min(shape.list_size, shape.rows * segments)
    ).map(lambda lengths: (lengths, True))
    return shape, [
        make_unit(number, *unit)
        for number, unit in enumerate(draw(st.lists(singles | lists, max_size=max_units)))
    ]


def check_structure(batch: Batch, shape: BatchShape, padding: str) -> None:
    """Every rule that the arrays of one block keep, whatever they hold."""
    assert batch.tokens.shape == (shape.rows, shape.row_length)
    assert batch.weight.shape == (shape.rows, shape.segments)
    for row in range(shape.rows):
        ids, count = batch.segment_ids[row], int(batch.weight[row].sum())
        used = ids > 0
        edge = used[::-1] if padding == "left" else used
        assert (np.diff(edge.astype(int)) <= 0).all(), "padding lies on one side only"
        assert (np.diff(ids[used]) >= 0).all(), "segments lie one after another"
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
    """(row, example id, task, label, group, list slot, tokens) of every text, row by row."""
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


def filled(shape, units, padding="right") -> Packer:
    packer = Packer(shape, padding)
    for unit in units:
        packer.add(unit)
    return packer


def drain(packer: Packer) -> list[Batch]:
    blocks = []
    while len(packer):
        blocks.append(packer.emit())
    return blocks


def same(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@given(streams(), st.sampled_from(["left", "right"]))
def test_every_text_comes_out_once_and_unchanged(stream, padding):
    shape, units = stream
    blocks = drain(filled(shape, units, padding))
    for block in blocks:
        check_structure(block, shape, padding)
    found = {
        example: (task, label, tokens)
        for block in blocks
        for _, example, task, label, _, _, tokens in contents(block)
    }
    assert sum(len(contents(block)) for block in blocks) == len(found)
    assert found == {
        s.example_id: (s.task_id, s.label, tuple(s.tokens.tolist()))
        for unit in units
        for s in unit.segments
    }


@given(streams())
def test_lists_stay_in_one_block_and_know_their_places(stream):
    shape, units = stream
    lists = {
        unit.segments[0].example_id // 100: len(unit.segments) for unit in units if unit.is_list
    }
    finished = set()
    for block in drain(filled(shape, units)):
        groups = {}
        for _, example, _, _, group, slot, _ in contents(block):
            number, place = divmod(example, 100)
            if number in lists:
                assert slot == place
                groups.setdefault(number, []).append(group)
            else:
                assert (group, slot) == (-1, 0)
        for number, ids in groups.items():
            assert len(set(ids)) == 1
            assert len(ids) == lists[number], "the whole list is in this block"
            assert number not in finished
            finished.add(number)
        assert sorted(ids[0] for ids in groups.values()) == list(range(len(groups)))
        assert len(groups) <= shape.groups
    assert finished == set(lists)


@given(streams())
def test_the_oldest_unit_is_always_in_the_next_block(stream):
    shape, units = stream
    packer, waiting = filled(shape, units), [unit.segments[0].example_id for unit in units]
    while len(packer):
        emitted = {example for _, example, *_ in contents(packer.emit())}
        assert waiting[0] in emitted
        waiting = [example for example in waiting if example not in emitted]
        assert len(packer) == len(waiting)


@given(streams())
def test_left_and_right_padding_hold_the_same_texts_in_the_same_rows(stream):
    shape, units = stream
    lefts, rights = drain(filled(shape, units, "left")), drain(filled(shape, units, "right"))
    assert [contents(block) for block in lefts] == [contents(block) for block in rights]


@given(streams(), st.data())
def test_a_packer_that_gets_what_waited_goes_on_identically(stream, data):
    shape, units = stream
    packer = Packer(shape)
    cut = data.draw(st.integers(0, len(units)))
    emits = data.draw(st.sets(st.integers(0, len(units))))
    other = None
    for number, unit in enumerate(units):
        if number == cut:
            other = Packer(shape)
            for waiting in packer.waiting:
                other.add(waiting)
        packer.add(unit)
        if other is not None:  # an empty packer is false
            other.add(unit)
        if number in emits:
            block = packer.emit()
            assert other is None or same(block, other.emit())
    if other is None:
        other = Packer(shape)
        for waiting in packer.waiting:
            other.add(waiting)
    assert (len(packer), packer.ready) == (len(other), other.ready)
    assert list(packer.waiting) == list(other.waiting)
    rest, again = drain(packer), drain(other)
    assert len(rest) == len(again)
    assert all(same(a, b) for a, b in zip(rest, again, strict=True))


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 5))
def test_one_segment_means_one_text_a_row_in_order(lengths, rows):
    shape = BatchShape(rows=rows, row_length=9, segments=1)
    blocks = drain(
        filled(shape, [make_unit(number, [length]) for number, length in enumerate(lengths)])
    )
    seen = [(row, example) for block in blocks for row, example, *_ in contents(block)]
    assert seen == [(number % rows, 100 * number) for number in range(len(lengths))]


@pytest.mark.parametrize(("rows", "row_length"), [(64, 128), (16, 512)])
def test_rows_are_filled_well(rows, row_length):
    rng = np.random.default_rng(0)
    shape = BatchShape(rows=rows, row_length=row_length, segments=row_length // 8)
    packer, blocks, number = Packer(shape), [], 0
    while len(blocks) < 12:
        while not packer.ready:
            length = int(
                np.clip(rng.lognormal(2.83, 0.6), 3, 66)
            )  # like SST-2: mean about 20 tokens, the longest 66
            packer.add(PackingGroup((Segment(np.ones(length, np.int32), 0, 0.0, number),)))
            number += 1
        blocks.append(packer.emit())
    batch = concatenate(blocks, 1)
    assert 18 < (batch.segment_ids > 0).sum() / batch.weight.sum() < 22
    fill = (batch.segment_ids > 0).mean(axis=1)
    assert fill.mean() >= 0.95
    per_block = fill.reshape(len(blocks), rows).mean(axis=1)
    assert per_block.min() >= 0.95, "no block is sacrificed for the others"


@pytest.mark.parametrize(
    ("segments", "first", "too_much", "later"), [(9, [4], [4, 4], [6]), (2, [4], [3, 3], [6])]
)
def test_a_list_that_does_not_fit_takes_no_room_from_later_texts(segments, first, too_much, later):
    """Neither tokens (nine segments) nor segments (two) of its texts that were placed before one was found too many."""
    shape = BatchShape(rows=1, row_length=10, segments=segments, groups=2, list_size=2)
    blocks = drain(
        filled(shape, [make_unit(0, first), make_unit(1, too_much, True), make_unit(2, later)])
    )
    assert [[example for _, example, *_ in contents(block)] for block in blocks] == [
        [0, 200],
        [100, 101],
    ]


def test_concatenated_blocks_keep_their_lists_apart():
    shape = BatchShape(rows=2, row_length=8, segments=2, groups=3, list_size=2)
    blocks = [
        filled(shape, [make_unit(10 * block + number, [2, 2], True) for number in range(2)]).emit()
        for block in range(3)
    ]
    batch = concatenate(blocks, shape.groups)
    members = {}
    for _, example, _, _, group, slot, _ in contents(batch):
        members.setdefault(group, []).append((example // 100, slot))
    assert sorted(members) == [0, 1, 3, 4, 6, 7]
    assert {group: sorted(places) for group, places in members.items()} == {
        3 * block + number: [(10 * block + number, 0), (10 * block + number, 1)]
        for block in range(3)
        for number in range(2)
    }


def test_an_empty_pool_gives_padding():
    shape = BatchShape(rows=2, row_length=4, segments=2)
    check_structure(block := Packer(shape).emit(), shape, "right")
    assert not block.weight.any()


def test_ready_counts_tokens_texts_and_lists():
    shape = BatchShape(rows=2, row_length=10, segments=5, groups=2, list_size=2)
    for unit, needed in (
        (make_unit(0, [10]), 4),
        (make_unit(0, [1]), 20),
        (make_unit(0, [1], True), 4),
    ):  # 2 blocks: 40 tokens, 20 texts or 4 lists
        packer, added = Packer(shape, lookahead=2), 0
        while not packer.ready:
            packer.add(unit)
            added += 1
        assert added == needed
    blocks = 0
    while packer.ready:
        packer.emit()
        blocks += 1
    assert (blocks, len(packer)) == (1, 2)  # what was emitted no longer counts


def refuse(shape, unit, match):
    packer = filled(shape, [make_unit(7, [1])])
    with pytest.raises(InputError, match=match):
        packer.add(unit)
    assert len(packer) == 1
    assert [example for _, example, *_ in contents(packer.emit())] == [
        700
    ]  # the refused unit left nothing behind


SHAPE = BatchShape(rows=2, row_length=10, segments=2, groups=2, list_size=8)


def test_a_text_longer_than_a_row_is_refused():
    refuse(
        SHAPE,
        make_unit(0, [11]),
        "a text of 11 tokens does not fit in a row of 10; raise batch.row_length or lower max_length",
    )
    refuse(SHAPE, make_unit(0, [3, 12], True), "a text of 12 tokens")


def test_a_list_longer_than_list_size_is_refused():
    refuse(
        dataclasses.replace(SHAPE, list_size=3),
        make_unit(0, [1] * 4, True),
        "a list of 4 documents exceeds the batch's list_size=3",
    )


def test_a_list_with_more_texts_than_a_block_is_refused():
    refuse(
        SHAPE,
        make_unit(0, [1] * 5, True),
        "5 texts of one list, 5 tokens in all, do not fit in 2 rows of 10 tokens and 2 segments",
    )


def test_a_list_with_more_tokens_than_a_block_is_refused():
    refuse(
        SHAPE,
        make_unit(0, [6, 6, 6], True),
        "3 texts of one list, 18 tokens in all, do not fit in 2 rows",
    )


def test_a_unit_without_texts_is_refused():
    refuse(SHAPE, PackingGroup(()), "text")


def test_a_text_without_tokens_is_refused():
    refuse(SHAPE, make_unit(0, [0]), "token")


def test_an_unknown_padding_is_refused():
    with pytest.raises(InputError, match="padding must be 'left' or 'right', got 'center'"):
        Packer(SHAPE, "center")


def test_roles_and_vector_labels_travel_with_their_text_and_survive_a_restart():
    shape = BatchShape(rows=2, row_length=12, segments=3, targets=3)
    units = [
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
    packer = filled(shape, units)
    again = Packer(shape)
    for unit in packer.waiting:
        again.add(unit)
    for batch in (packer.emit(), again.emit()):
        for row, slot in zip(*np.nonzero(batch.weight), strict=True):
            index = int(batch.example_id[row, slot])
            assert batch.role[row, slot] == index % 3
            expected = np.zeros(3)
            expected[index % 3] = 1
            np.testing.assert_array_equal(batch.targets[row, slot], expected)
        assert batch.weight.sum() == 6
