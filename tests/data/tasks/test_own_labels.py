"""Labels of the user's files: equal as numbers, indices only by decision, unlabeled test files."""

import itertools
import json

import pytest

from gemma_encoder.inputs.class_names import canonical_name, sorted_names
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import everything, source, write

SPELLINGS = {
    "csv": lambda path, labels: write_csv(path, [f"{label}.0" for label in labels]),
    "jsonl": lambda path, labels: write_json(path, labels),
    "jsonl of fractions": lambda path, labels: write_json(path, [float(x) for x in labels]),
    "jsonl of text": lambda path, labels: write_json(path, [f"{label}" for label in labels]),
    "parquet": lambda path, labels: write(
        path.with_suffix(".parquet"),
        [{"text": f"text {i}", "label": float(label)} for i, label in enumerate(labels)],
    ),
}


def write_csv(path, labels):
    path = path.with_suffix(".csv")
    rows = (f"text {i},{label}\n" for i, label in enumerate(labels))
    path.write_text("text,label\n" + "".join(rows))
    return path


def write_json(path, labels):
    path = path.with_suffix(".jsonl")
    rows = ({"text": f"text {i}", "label": label} for i, label in enumerate(labels))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels_of(made, split="validation"):
    return [example.label for (example,) in everything(made, split)]


@pytest.mark.parametrize(("train", "other"), itertools.product(SPELLINGS, SPELLINGS))
@pytest.mark.parametrize("kind", ["classification", "ordinal"])
def test_classes_that_are_equal_as_numbers(tmp_path, kind, train, other):
    made = source(
        SPELLINGS[train](tmp_path / "train", [3, 1, 2] * 4),
        validation=SPELLINGS[other](tmp_path / "validation", [1, 2]),
        kind=kind,
    )
    assert made.task.classes == ("1", "2", "3")
    assert labels_of(made) == [0, 1]


@pytest.mark.parametrize("classes", [(), ("1.0", "2.0", "3.0"), ("1", "2", "3")])
def test_one_class_with_two_spellings(tmp_path, classes):
    train = write_csv(tmp_path / "train", ["1", "1.0", "2", "+2.0", "3.00"] * 4)
    made = source(train, validation=train, classes=classes)
    assert labels_of(made) == [0, 0, 1, 1, 2] * 4
    assert made.task.classes == (classes or ("1", "2", "3"))


def test_truth_values_in_any_case(tmp_path):
    made = source(
        write_csv(tmp_path / "train", ["True", "False"] * 4),
        validation=write_json(tmp_path / "validation", [False, True, True]),
    )
    assert made.task.classes == ("false", "true")
    assert labels_of(made) == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("1.0", "1"),
        ("+1", "1"),
        ("-0.0", "0"),
        ("0.50", "0.5"),
        ("100", "100"),
        ("007", "007"),
        ("1e3", "1e3"),
        ("cafe\u0301", "caf\u00e9"),
        ("٣", "٣"),
        ("Truex", "Truex"),
        ("1.0.0", "1.0.0"),
        ("9" * 40, "9" * 40),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


def test_numbers_are_sorted_by_value():
    assert sorted_names(["10", "9", "-1", "0.5"]) == ("-1", "0.5", "9", "10")
    assert sorted_names(["10", "9", "a"]) == ("10", "9", "a")


def test_indices_are_refused_without_an_order(tmp_path):
    train = write_csv(tmp_path / "train", ["pos", "neg"] * 6)
    other = write_json(tmp_path / "other", [0, 1])
    message = r"other.jsonl:1: unknown class '0'. Valid: neg, pos; labels are indices only if"
    with pytest.raises(InputError, match=message):
        source(train, validation=other)


@pytest.mark.parametrize("train", [["pos", "neg"], [0, 1]])
def test_all_files_have_names_or_all_have_indices(tmp_path, train, caplog):
    """Names in one file and indices in another are refused, whichever comes first."""
    path = write_json(tmp_path / "train", train * 6)
    same = write_json(tmp_path / "same", train)
    classes = ("pos", "neg")
    assert labels_of(source(path, validation=same, classes=classes)) == [0, 1]
    note = "labels are indices of the classes 0 pos, 1 neg in all files"
    assert (note in caplog.text) == (train == [0, 1])
    other = write_json(tmp_path / "other", [0, 1] if train == ["pos", "neg"] else ["pos", "neg"])
    with pytest.raises(InputError, match=r".jsonl:1: unknown class '0'. Valid: neg, pos; labels"):
        source(path, validation=other, classes=classes)


def test_several_classes_are_equal_as_numbers(tmp_path):
    train = write_json(tmp_path / "train", [[1, 2], [3], []] * 4)
    other = write_csv(tmp_path / "other", ['"1.0,3"', "2.0"])
    made = source(train, validation=other, kind="multi_label")
    assert labels_of(made) == [(0, 2), (1,)]
    twice = write_csv(tmp_path / "twice", ['"1.0,1"'])
    with pytest.raises(InputError, match=r"twice.csv:2: .* names a class twice: 1.0, 1"):
        source(train, validation=twice, kind="multi_label")


def test_the_range_is_that_of_the_training_targets(tmp_path, caplog):
    train = write_csv(tmp_path / "train", [0, 5, 2] * 4)
    other = write_csv(tmp_path / "other", [-3, 4, 7])
    made = source(train, validation=other, kind="regression")
    assert made.task.label_range == (0, 5) and made.range_is_inferred
    assert labels_of(made) == [-3, 4, 7]
    assert "other.csv:2: target -3 is out of range; expected 0 to 5: it is" in caplog.text
    with pytest.raises(InputError, match=r"other.csv:2: target -3 is out of range"):
        source(train, validation=other, kind="regression", label_range=(0.0, 5.0))


PLACEHOLDERS = {
    "csv of -1": lambda path: write_csv(path, ["-1"] * 3),
    "csv of -1.0": lambda path: write_csv(path, ["-1.0"] * 3),
    "empty csv": lambda path: write_csv(path, [""] * 3),
    "null": lambda path: write_json(path, [None] * 3),
    "jsonl of -1": lambda path: write_json(path, [-1] * 3),
    "both": lambda path: write_json(path, [-1, None, ""]),
    "parquet": lambda path: write(
        path.with_suffix(".parquet"), [{"text": f"text {i}", "label": -1.0} for i in range(3)]
    ),
}


@pytest.mark.parametrize("kind", ["regression", "classification", "ordinal", "multi_label"])
@pytest.mark.parametrize("form", PLACEHOLDERS)
def test_a_test_file_of_placeholders_is_unlabeled(tmp_path, form, kind, caplog):
    train = write_csv(tmp_path / "train", [0, 5, 2] * 4)
    alone = source(train, kind=kind).task
    made = source(train, test=PLACEHOLDERS[form](tmp_path / "test"), kind=kind)
    assert made.task == alone
    assert labels_of(made, "test") == [-1] * 3
    assert "every label is -1 or empty, that is unlabeled" in caplog.text


def test_a_test_file_with_some_labels_is_labeled(tmp_path):
    train = write_csv(tmp_path / "train", [0, 5, 2] * 4)
    some = write_csv(tmp_path / "some", ["-1", "5"])
    for split in ("test", "validation"):
        with pytest.raises(InputError, match=r"some.csv:2: target -1 marks an unlabeled row"):
            source(train, **{split: some}, kind="regression")
    made = source(train, test=some, kind="regression", label_range=(-1.0, 5.0))
    assert labels_of(made, "test") == [-1, 5]
    with pytest.raises(InputError, match=r"some.csv:2: unknown class '-1'. Valid: 0, 2, 5"):
        source(train, test=some)
    empty = write_csv(tmp_path / "empty", ["5", ""])
    with pytest.raises(InputError, match=r"empty.csv:3: column 'label'"):
        source(train, test=empty, kind="regression")


@pytest.mark.parametrize(
    ("labels", "kind", "count"),
    [
        ([-1, 0, 5, -1], "regression", 2),
        ([-1, -2, 5, 0], "regression", 0),
        ([-1, 0, 1, 2], "classification", 1),
        ([-1, 1, 1, -1], "classification", 0),
    ],
)
def test_placeholders_in_a_training_file_are_noted(tmp_path, caplog, labels, kind, count):
    source(write_csv(tmp_path / "train", labels * 5), kind=kind)
    assert (f"{5 * count} rows of" in caplog.text) == (count > 0)


def test_columns_that_the_template_leaves_out(tmp_path):
    rows = [{"text": f"text {i}", "price": i, "label": "ab"[i % 2]} for i in range(20)]
    path = write(tmp_path / "t.jsonl", rows)
    made = source(path, template="Say: {text}")
    assert everything(made, "validation")[0][0].fields.keys() == {"text"}
    with pytest.raises(
        InputError, match=r"names 'word', which is not among the fields text, price"
    ):
        source(path, template="Say: {word}")


@pytest.mark.parametrize("write_labels", [write_csv, write_json, SPELLINGS["jsonl of fractions"]])
def test_ordered_classes_may_be_fractions(tmp_path, write_labels):
    train = write_csv(tmp_path / "train", [".5", "1.0", "1.50"] * 4)
    other = write_labels(tmp_path / "other", [1.5, 0.5])
    made = source(train, validation=other, kind="ordinal")
    assert made.task.classes == ("0.5", "1", "1.5")
    assert labels_of(made) == [2, 0]


def test_a_class_is_not_divided_at_a_control_character(tmp_path):
    rows = [{"text": f"text {i}", "label": ["b\x1fa", "c"][i % 2]} for i in range(20)]
    for name in ("t.jsonl", "t.parquet"):
        for kind in ("classification", "multi_label"):
            path = write(tmp_path / name, rows)
            with pytest.raises(InputError, match=rf"{name}.*1: .*control character U\+001F"):
                source(path, kind=kind)


def test_classes_that_are_equal_numbers_are_not_distinct(tmp_path):
    train = write_csv(tmp_path / "train", ["1", "2"] * 4)
    with pytest.raises(InputError, match=r"own.classes must be distinct names.*'1', '1.0'"):
        source(train, classes=("1", "1.0", "2"))


@pytest.mark.parametrize("kind", ["classification", "ordinal", "multi_label"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_names_beside_indices_name_their_file(tmp_path, kind, split):
    train = write_csv(tmp_path / "train", ["0", "1"] * 4)
    other = write_csv(tmp_path / "other", ["1", "good"])
    with pytest.raises(
        InputError,
        match=r"train.csv:2: .* labels are indices only if .*, but .*other.csv:3 has 'good'",
    ):
        source(train, kind=kind, classes=("bad", "good"), **{split: other})


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label"])
def test_labels_after_a_first_row_without_one(tmp_path, kind):
    train = write_json(tmp_path / "train", [1, 2] * 4)
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "a"}\n{"text": "b", "label": 2}\n')
    with pytest.raises(InputError, match=r"test.jsonl:1: column 'label' is missing"):
        source(train, validation=train, test=test, kind=kind)
    test.write_text('{"text": "a"}\n{"text": "b", "label": null}\n')
    made = source(train, validation=train, test=test, kind=kind)
    assert labels_of(made, "test") == [-1, -1]
