"""Tasks: JSON round trips, label checks, and scores in the task's own units."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_encoder.inputs import kinds
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Example, ExampleTable, Task
from gemma_encoder.inputs.template import Template

TEMPLATE = Template("Query: {query} Document: {document}", truncation=("document",))
NLI = Task(
    "mnli",
    "classification",
    Template("{premise} {hypothesis}"),
    ("accuracy",),
    classes=("entailment", "neutral", "contradiction"),
)
SIMILARITY = Task("stsb", "regression", Template("{a} {b}"), ("pearson",), label_range=(1.0, 5.0))
CHOICE = Task("copa", "choice", Template("{choice} {premise}"), ("accuracy",))
RANKING = Task("msmarco", "ranking", TEMPLATE, ("mrr@10", "ndcg@10"))

names = st.text("abcdefgh_", min_size=1, max_size=8)


@st.composite
def tasks(draw):
    kind = draw(st.sampled_from(kinds.names()))
    low = draw(st.floats(-100, 100))
    fields = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    return Task(
        name=draw(names),
        kind=kind,
        template=Template(
            " ".join(f"{field}: {{{field}}}" for field in fields),
            truncation=tuple(draw(st.permutations(fields))[: draw(st.integers(0, len(fields)))]),
        ),
        metrics=tuple(draw(st.lists(names, min_size=1, max_size=2, unique=True))),
        classes=tuple(draw(st.lists(names, min_size=2, max_size=4, unique=True)))
        if kinds.get(kind).has_classes
        else (),
        label_range=(low, low + draw(st.floats(0.1, 100))),
        head=draw(st.just("") | names),
        chance=draw(st.none() | st.floats(0, 1)),
    )


@given(tasks())
def test_a_task_survives_json(task):
    restored = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert restored == task
    assert hash(restored) == hash(task)  # equal down to tuples: a list would not hash


@given(st.floats(-1000, 1000), st.floats(0.01, 1000), st.floats(0, 1))
def test_scaling_a_regression_target_is_invertible(low, width, fraction):
    task = Task("t", "regression", Template("{a}"), ("pearson",), label_range=(low, low + width))
    target = min(max(low + fraction * width, low), low + width)
    scaled = task.check_label(target, "here")
    assert 0 <= scaled <= 1
    # Python floats: a few rounding errors of values up to 2,000.
    assert abs(task.unscale(scaled) - target) <= 1e-12 * 2000


def test_unscale_takes_arrays():
    np.testing.assert_array_equal(
        SIMILARITY.unscale(np.array([0.0, 0.5, 1.0], np.float32)), [1, 3, 5]
    )


def test_regression_ends_map_to_the_unit_interval():
    assert (
        SIMILARITY.check_label(1, "x"),
        SIMILARITY.check_label(3, "x"),
        SIMILARITY.check_label(5, "x"),
    ) == (0.0, 0.5, 1.0)


def test_class_indices_and_grades_pass_unchanged():
    assert [NLI.check_label(label, "x") for label in (0, 1, 2.0, np.int64(2))] == [
        0.0,
        1.0,
        2.0,
        2.0,
    ]
    assert [RANKING.check_label(grade, "x") for grade in (0, 1, 3)] == [0.0, 1.0, 3.0]


@pytest.mark.parametrize("label", [-1, 3, 0.5, float("nan"), float("inf"), float("-inf")])
def test_a_class_out_of_range_is_refused(label):
    with pytest.raises(
        InputError,
        match=r"task 'mnli', train record 17: label .* a class index from 0 to 2 "
        r"\(entailment, neutral, contradiction\)",
    ):
        NLI.check_label(label, "train record 17")


@pytest.mark.parametrize("label", [0.99, 5.01, float("nan"), float("inf")])
def test_a_target_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=r"task 'stsb', record 3: target .* expected 1 to 5"):
        SIMILARITY.check_label(label, "record 3")


@pytest.mark.parametrize("grade", [-1, 0.5, 1e-9, float("nan"), float("inf")])
def test_a_grade_that_is_not_a_whole_number_is_refused(grade):
    with pytest.raises(InputError, match="task 'msmarco', qrels line 2: relevance grade"):
        RANKING.check_label(grade, "qrels line 2")


@pytest.mark.parametrize("label", [-1, 2, 0.5, float("nan")])
def test_an_option_is_right_or_wrong(label):
    assert (CHOICE.check_label(1, "x"), CHOICE.check_label(0, "x")) == (1.0, 0.0)
    with pytest.raises(
        InputError,
        match=r"task 'copa', record 3: label .* of an option is out of range; "
        r"expected 1 \(right\) or 0 \(wrong\)",
    ):
        CHOICE.check_label(label, "record 3")


@given(tasks(), st.floats(-100, 200))
def test_no_valid_label_counts_as_unlabeled(task, label):
    """Labels that `check_label` accepts are not unlabeled; -1 is either valid or unlabeled."""
    for value in (label, round(label), -1.0):
        try:
            task.check_label(value, "x")
        except InputError:
            assert value != -1 or task.is_unlabeled(value)
        else:
            assert not task.is_unlabeled(value)


def test_minus_one_is_a_target_if_the_range_contains_it():
    signed = Task("signed", "regression", Template("{a}"), ("pearson",), label_range=(-1.0, 1.0))
    assert [task.is_unlabeled(-1) for task in (NLI, SIMILARITY, RANKING, CHOICE, signed)] == [
        True,
        True,
        True,
        True,
        False,
    ]


def test_ranking_and_choice_examples_come_in_lists():
    assert [task.is_list for task in (NLI, SIMILARITY, RANKING, CHOICE)] == [
        False,
        False,
        True,
        True,
    ]


@given(st.lists(st.tuples(names, names, st.integers(0, 1)), max_size=8))
def test_a_table_stores_examples_and_groups_them(rows):
    table = ExampleTable()
    for index, (query, document, label) in enumerate(rows):
        table.add(Example({"x": "y"}, label, query, document, {"idx": index}))
    assert list(zip(table.query_ids, table.document_ids, table.labels, strict=True)) == rows
    assert [info["idx"] for info in table.infos] == list(range(len(rows)))
    groups = table.groups()
    assert sorted(i for group in groups.values() for i in group) == list(range(len(rows)))
    assert all(rows[i][0] == query for query, group in groups.items() for i in group)
    assert all(group == sorted(group) for group in groups.values())


def test_outputs_and_heads_have_defaults():
    assert (NLI.num_outputs, SIMILARITY.num_outputs, RANKING.num_outputs, CHOICE.num_outputs) == (
        3,
        1,
        1,
        1,
    )
    assert NLI.head == "mnli"
    diagnostic = Task(
        "ax", "classification", NLI.template, ("accuracy",), classes=NLI.classes, head="mnli"
    )
    assert diagnostic.head == "mnli"


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="did you mean 'regression'"):
        Task("t", "regresion", Template("{a}"), ("pearson",))


@pytest.mark.parametrize(
    "label_range", [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))]
)
def test_a_label_range_must_be_increasing(label_range):
    with pytest.raises(InputError, match="label_range must be"):
        Task("t", "regression", Template("{a}"), ("m",), label_range=label_range)
