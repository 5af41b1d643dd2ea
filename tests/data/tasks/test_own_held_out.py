"""The held-out share of a user's file: stratified, and equal texts on one side."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from gemma_encoder.data.table import Table, write_table_rows
from gemma_encoder.data.tasks import own_held_out
from gemma_encoder.data.text_hashes import text_hashes
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import everything, source, write


def sides(made):
    """Returns the (fields, label) of the records of training and of validation."""
    return [
        [(tuple(e.fields.values()), e.label) for record in everything(made, split) for e in record]
        for split in ("train", "validation")
    ]


def texts(side):
    return {" ".join(" ".join(fields).split()) for fields, _ in side}


@pytest.mark.parametrize("rare", [(3, 47), (0, 1), (98, 99), (10, 90)])
def test_a_rare_class_is_on_both_sides(tmp_path, caplog, rare):
    rows = [{"text": f"text {i}", "label": "rare" if i in rare else "usual"} for i in range(100)]
    train, validation = sides(source(write(tmp_path / "t.csv", rows)))
    assert collections.Counter(label for _, label in train) == {1: 89, 0: 1}
    assert collections.Counter(label for _, label in validation) == {1: 9, 0: 1}
    assert (
        "holding out 10 of 100 records (by class, training + validation: rare 1 + 1, usual 89 + 9)"
        in caplog.text
    )


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label", "ordinal"])
def test_equal_texts_are_on_one_side(tmp_path, kind):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        space = rng.choice([" ", "  ", " \t"])
        label = ["1", "2", "3", "1,2"][rng.integers(3 + (kind == "multi_label"))]
        rows += [{"title": f"text{space}{i}", "body": "same", "label": label}] * rng.integers(1, 6)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    train, validation = sides(source(write(tmp_path / "t.jsonl", rows), kind=kind))
    assert not texts(train) & texts(validation) and len(texts(train) | texts(validation)) == 60
    assert len(train) + len(validation) == len(rows)
    assert abs(len(validation) - len(rows) / 10) <= 5


def test_one_text_with_many_rows_does_not_fill_validation(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(50)]
    rows += [{"text": "out of office", "label": "a"}] * 50
    train, validation = sides(source(write(tmp_path / "t.csv", rows)))
    assert len(validation) == 10 and "out of office" in texts(train)


def test_a_class_of_one_text_stays_in_training(tmp_path, caplog):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    rows += [{"text": "the same", "label": "c"}] * 5
    train, validation = sides(source(write(tmp_path / "t.csv", rows)))
    assert {label for _, label in train} == {0, 1, 2} and {label for _, label in validation} == {
        0,
        1,
    }
    assert "c 5 + 0" in caplog.text


def test_few_different_texts_are_split_with_a_warning(tmp_path, caplog):
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}] * 20
    train, validation = sides(source(write(tmp_path / "t.csv", rows)))
    assert len(train) == 36 and len(validation) == 4
    assert "too few texts of" in caplog.text and "are in training, too" in caplog.text


def test_targets_are_held_out_over_their_range(tmp_path):
    rows = [{"text": f"text {i}", "label": 1000 * (i >= 190) + i} for i in range(200)]
    _, validation = sides(source(write(tmp_path / "t.jsonl", rows), kind="regression"))
    values = np.array([label for _, label in validation])
    assert len(values) == 20
    assert (np.histogram(values, [*np.arange(0, 181, 20), 2000])[0] == 2).all()


def test_every_class_of_rows_with_several_is_on_both_sides(tmp_path, caplog):
    rows = [{"text": f"text {i}", "label": ["usual", "rare"][: 1 + (i < 3)]} for i in range(100)]
    rows[50]["label"] = []
    made = source(write(tmp_path / "t.jsonl", rows), kind="multi_label")
    counts = [collections.Counter(c for _, label in side for c in label) for side in sides(made)]
    rare = made.task.classes.index("rare")
    assert counts[1][rare] >= 1 and counts[0][rare] >= 1 and counts[0][rare] + counts[1][rare] == 3
    assert f"rare {counts[0][rare]} + {counts[1][rare]}" in caplog.text


def test_classes_that_share_texts_are_covered():
    # Stratum 0 occurs only with the rarer 1 and 2; stratum 3 has the other records.
    groups = np.repeat(np.arange(20, dtype=np.uint64) * 7919, 2)
    strata = np.full(40, 3)
    strata[:8] = [0, 1, 0, 2, 0, 1, 0, 2]
    is_held_out = own_held_out.select_records(groups, strata, 0.1, cover=True)
    assert (is_held_out[::2] == is_held_out[1::2]).all()
    assert set(strata[is_held_out]) == set(strata[~is_held_out]) == {0, 1, 2, 3}


def test_queries_with_equal_texts_are_on_one_side(tmp_path, caplog):
    rows = [
        {
            "query_id": f"q{q}",
            "query": f"query {q // 2}",
            "document": f"document {d} of {q}",
            "label": int(d == 0 and q != 3),
        }
        for q in range(40)
        for d in range(3)
    ]
    path = write(tmp_path / "t.csv", rows)
    made = source(path, kind="ranking", held_out=0.25)
    queries = [
        {e.fields["query"] for i in range(made.size(split)) for e in made.examples(split, i)}
        for split in ("train", "validation")
    ]
    assert not queries[0] & queries[1] and made.size("validation") == 10
    assert "holding out 10 of 40 queries" in caplog.text
    caplog.clear()
    source(path, kind="ranking", validation=path)
    assert (
        "own: validation split: of 40 queries, 1 have no relevant document and count as 0"
        in caplog.text
    )


def test_the_selection_depends_only_on_the_texts(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(300)]
    made = source(write(tmp_path / "t.csv", rows))
    first = texts(sides(made)[1])
    backwards = source(write(tmp_path / "b.parquet", rows[::-1]))
    assert texts(sides(backwards)[1]) == first
    grown = rows + [{"text": f"more {i}", "label": "ab"[i % 2]} for i in range(100)]
    after = texts(sides(source(write(tmp_path / "g.csv", grown)))[1])
    assert len(after & first) >= 20  # of 30
    # The selection must not change by accident: runs that resume refuse another one.
    assert sorted(first)[:3] == ["text 100", "text 11", "text 113"]


def test_a_run_notices_another_selection(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(100)]
    path = write(tmp_path / "t.csv", rows)
    made = source(path)
    for split in ("train", "validation"):
        assert made.fingerprints(split) == source(path).fingerprints(split)
        assert made.fingerprints(split) != source(path, held_out=0.2).fingerprints(split)
        assert len(source(path, validation=path).fingerprints(split)) == 1  # the file


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_hashes_are_those_of_words(tmp_path, batch):
    rng = np.random.default_rng(0)
    pieces = ["a", "b", " ", "\n", "漢", "word", ""]
    rows = [
        ("x" + "".join(rng.choice(pieces, rng.integers(0, 20))), rng.choice(["", "a", "ab"]))
        for _ in range(500)
    ]
    types = {"one": pa.large_string(), "two": pa.large_string()}
    write_table_rows(tmp_path, types, iter(rows), batch)
    hashes = text_hashes(Table(tmp_path), ["one", "two"])
    by_text = {}
    for row, value in zip(rows, hashes, strict=True):
        key = tuple("".join(text.split()) for text in row)
        assert by_text.setdefault(key, value) == value
    assert len(set(by_text.values())) == len(by_text) > 300
    shares = (np.array(sorted(by_text.values())) >> np.uint64(62)).astype(int)
    assert np.bincount(shares).min() > len(by_text) / 8  # spread over all values


@pytest.mark.parametrize("text", ["text {}", "same"])
def test_classes_of_one_record_are_held_out_anyway(tmp_path, caplog, text):
    rows = [{"text": text.format(i), "label": f"class {i}"} for i in range(20)]
    train, validation = sides(source(write(tmp_path / "t.csv", rows)))
    assert len(train) == 18 and len(validation) == 2
    assert "has two records: those to validate on are of classes that training does" in caplog.text
    assert ("are in training, too" in caplog.text) == (text == "same")


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0.001, "0.1%"), (0.999, "99.9%"), (0.005, "0.5%")]
)
def test_fractions_that_leave_a_side_empty_are_refused(tmp_path, fraction, shown):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(100)]
    with pytest.raises(InputError, match=f"100 records are too few to hold out {shown} for valid"):
        source(write(tmp_path / "t.csv", rows), held_out=fraction)


def test_many_classes_are_listed_in_part(tmp_path, caplog):
    rows = [{"text": f"text {i}", "label": f"c{i % 50}"} for i in range(200)]
    source(write(tmp_path / "t.csv", rows))
    assert ", c25, c26 and 30 more" in caplog.text and "and 30 classes that are more" in caplog.text


@pytest.mark.parametrize("relevant", [{3}, {6}, {3, 5}, {6, 7, 8}])
def test_few_relevant_queries_are_on_both_sides(tmp_path, relevant):
    rows = [
        {"query": f"query {q}", "document": f"document {d}", "label": int(d == 0 and q in relevant)}
        for q in range(60)
        for d in range(3)
    ]
    made = source(write(tmp_path / "t.csv", rows), kind="ranking")
    assert made.size("validation") == 6 and 1 <= made.size("train") <= len(relevant)
    has_relevant = [any(e.label for e in record) for record in everything(made, "validation")]
    assert made.size("train") + sum(has_relevant) == len(relevant)
    assert any(has_relevant) == (len(relevant) > 1)
