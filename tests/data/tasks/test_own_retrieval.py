"""The user's own files for retrieval: layouts, teachers, held-out queries, refusals."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.retrieval_options import RetrievalOptions
from gemma_encoder.data.source import DataOptions, StoredTask
from gemma_encoder.inputs.errors import InputError
from tests.data.tasks.own_files import write

SUFFIXES = ("jsonl", "csv", "tsv", "parquet", "jsonl.gz")


def source(path, retrieval=None, stored=None, limits=None, **own):
    own = {"train": str(path), "kind": "retrieval", "validation": str(path)} | own
    options = RetrievalOptions(**{"positives": 9, "negatives": 9} | (retrieval or {}))
    return registry.get(
        "own", DataOptions(own=own, retrieval=options, stored=stored or {}, **(limits or {}))
    )


def lists(made):
    """Returns (query, labels by document) of each training list."""
    result = {}
    for index in range(made.size("train")):
        query, *documents = made.training_examples(index, 0, 0)
        assert query.role == "query" and {e.role for e in documents} == {"document"}
        result[query.fields["query"]] = {e.fields["document"]: e.label for e in documents}
    return result


PAIRS = [{"query": f"query {i // 2}", "document": f"document {i}"} for i in range(8)]
PAIR_LISTS = {
    f"query {i}": {f"document {2 * i}": 1.0, f"document {2 * i + 1}": 1.0} for i in range(4)
}
TRIPLES = [
    {"query": f"query {i}", "positive": f"answer {i}", "negative": f"[{j}] no answer to {i}"}
    for i in range(4)
    for j in range(2)
]
TRIPLE_LISTS = {
    f"query {i}": {
        f"answer {i}": 1.0,
        f"[0] no answer to {i}": 0.0,
        f"[1] no answer to {i}": 0.0,
    }
    for i in range(4)
}
LISTS = [
    {
        "query": f"query {i}",
        "positives": [f"best {i}", f"good {i}"],
        "negatives": [f"bad {i} {j}" for j in range(3)],
        "scores": [0.1 + i, 7, -1.5, 1e-30, 3],
    }
    for i in range(4)
]
SCORED_LISTS = {
    f"query {i}": {
        f"best {i}": (1.0, 0.1 + i),
        f"good {i}": (1.0, 7.0),
        f"bad {i} 0": (0.0, -1.5),
        f"bad {i} 1": (0.0, 1e-30),
        f"bad {i} 2": (0.0, 3.0),
    }
    for i in range(4)
}
GRADED = [
    {
        "query_id": f"q{i}",
        "query": f"query {i}",
        "document_id": f"d{i}{j}",
        "document": f"document {i} {j}",
        "label": j,
        "score": j + 0.25,
    }
    for j in range(3)
    for i in range(4)
]
GRADED_LISTS = {
    f"query {i}": {f"document {i} {j}": (float(j), j + 0.25) for j in range(3)} for i in range(4)
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (PAIRS, PAIR_LISTS),
        (TRIPLES, TRIPLE_LISTS),
        (LISTS, SCORED_LISTS),
        (GRADED, GRADED_LISTS),
    ],
    ids=["pairs", "triples", "lists", "graded"],
)
def test_layouts_give_the_lists_of_a_query(tmp_path, rows, expected, suffix):
    made = source(write(tmp_path / f"x.{suffix}", rows))
    assert lists(made) == expected
    assert made.has_teacher == isinstance(next(iter(expected["query 0"].values())), tuple)


def test_ids_come_from_the_file_or_its_rows(tmp_path):
    for rows, query, documents in (
        (GRADED, "q1", {"d11", "d12", "d10"}),
        (LISTS, "query2", {f"row2.{i}" for i in range(1, 6)}),
        (PAIRS, "query2", {"row3", "row4"}),
    ):
        path = write(tmp_path / f"{len(rows)}.jsonl", rows)
        made = source(path)
        examples = made.training_examples(1, 0, 0)
        assert examples[0].query_id == query
        assert {example.document_id for example in examples[1:]} == documents


def test_a_repeated_document_is_one_document(tmp_path):
    """A triple for each negative repeats the positive, which must not be drawn twice."""
    made = source(write(tmp_path / "x.jsonl", TRIPLES))
    labels = [example.label for example in made.training_examples(0, 0, 0)]
    assert labels == [0.0, 1.0, 0.0, 0.0]


def test_documents_of_several_fields(tmp_path):
    rows = [
        {"question": f"query {i}", "title": "" if i % 2 else f"title {i}", "body": f"body {i}"}
        for i in range(4)
    ]
    own = {"fields": ("question", "title", "body")}
    for suffix in ("jsonl", "parquet"):
        made = source(write(tmp_path / f"x.{suffix}", rows), **own)
        assert made.task.template.text == "Document: {title} {body}"
        assert made.task.template.truncation == ("body", "title")
        assert made.record("train", 1, training=True).example(1).fields == {
            "title": "",
            "body": "body 1",
        }
        template = {"document_template": "{body} by {title}"}
        made = source(tmp_path / f"x.{suffix}", template, truncation=("title",), **own)
        assert made.task.template.text == "{body} by {title}"
        assert made.task.template.truncation == ("title",)
        only = source(tmp_path / f"x.{suffix}", {"document_template": "{body}"}, **own)
        assert only.training_examples(0, 0, 0)[1].fields == {"body": "body 0"}


def test_lists_of_documents_with_several_fields(tmp_path):
    def document(name):
        return {"title": f"title {name}", "body": name}

    rows = [
        {"query": f"query {i}", "positive": document(f"a {i}"), "negatives": [document(f"b {i}")]}
        for i in range(20)
    ]
    made = source(write(tmp_path / "x.jsonl", rows), {"document_template": "{title}: {body}"})
    query, positive, negative = made.record("train", 0, training=True).labels
    assert (query, positive, negative) == (0.0, 1.0, 0.0)
    example = made.record("train", 0, training=True).example(2)
    assert example.fields["title"] == f"title {example.fields['body']}"


def test_negatives_may_begin_in_a_later_object(tmp_path):
    rows = [{"query": "one", "positives": ["a"]}, TRIPLES[0], LISTS[0] | {"query": "two"}]
    rows[1] = {"query": "three", "positives": ["b"], "negatives": ["c"]}
    made = source(write(tmp_path / "x.jsonl", rows))
    assert [len(labels) for labels in lists(made).values()] == [1, 2, 5]


def test_held_out_records_are_queries(tmp_path):
    rows = [{"query": f"query {i % 30}", "document": f"document {i}"} for i in range(90)]
    made = source(write(tmp_path / "x.csv", rows), validation="")
    assert (made.size("train"), len(made.qrels("validation"))) == (27, 3)
    held_out = {
        example.fields["query"]
        for index in range(made.size("validation"))
        for example in made.examples("validation", index)
        if example.role == "query"
    }
    assert len(held_out) == 3 and not held_out & lists(made).keys()
    assert made.size("validation") == 3 + 9  # queries, then all of their documents


def test_queries_search_the_different_documents(tmp_path):
    rows = [
        {"query": "a", "document": "x", "label": 1},
        {"query": "b", "document": "x", "label": 2},
        {"query": "b", "document": "y", "label": 0},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    made = source(path)
    examples = [made.examples("validation", i)[0] for i in range(made.size("validation"))]
    assert [example.query_id or example.document_id for example in examples] == [
        "query1",
        "query2",
        "row1",
        "row3",
    ]
    assert made.qrels("validation") == {"query1": {"row1": 1.0}, "query2": {"row1": 2, "row3": 0}}
    assert made.where("validation", 3) == f"{path}, validation record 2"


def test_a_test_file_needs_no_labels(tmp_path):
    path = write(tmp_path / "x.jsonl", GRADED)
    rows = [{"query_id": "q", "query": "new", "document_id": "d", "document": "text"}]
    made = source(path, test=str(write(tmp_path / "test.jsonl", rows)))
    assert made.qrels("test") == {} and made.size("test") == 2


def test_a_checkpoint_keeps_the_columns_and_the_template(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIRS)
    made = source(path, {"document_template": "text: {document}"})
    stored = {"own": StoredTask(made.task, made.inferred, "the checkpoint")}
    again = source(path, stored=stored)
    assert again.task == made.task and again.inferred == made.inferred
    with pytest.raises(InputError, match=r"document_template is 'D \{document\}', but the check"):
        source(path, {"document_template": "D {document}"}, stored=stored)
    with pytest.raises(InputError, match="of kind retrieval, not sparse_retrieval; train again"):
        source(path, {"representation": "sparse"}, stored=stored)


def test_few_positives_and_negatives_are_drawn_anew(tmp_path):
    made = source(write(tmp_path / "x.jsonl", LISTS), {"positives": 1, "negatives": 1})
    drawn = {
        tuple(e.fields["document"] for e in made.training_examples(0, 0, epoch)[1:])
        for epoch in range(40)
    }
    assert len(drawn) == 6
    assert made.training_examples(0, 0, 3) == made.training_examples(0, 0, 3)


REFUSALS = [
    ({"positives": []}, "1: the query has no positive: column 'positives' is empty"),
    ({"positives": None}, "1: the query has no positive: column 'positives' is empty"),
    ({"query": " "}, "1: column 'query' is empty"),
    ({"positives": ["a", "\t"]}, "1: a document in column 'positives' is empty"),
    ({"negatives": ["a", ""]}, "1: a document in column 'negatives' is empty"),
    ({"negatives": ["a", 3]}, "1: column 'negatives' should contain texts, got 3"),
    ({"negatives": 7}, "1: column 'negatives' should contain texts, got 7"),
    ({"negatives": [{"document": 7}]}, "1: column 'negatives' should contain documents of text"),
    (
        {"negatives": ["a", "b", "good  0"]},
        "1: a document is a positive and a negative of the query",
    ),
    ({"scores": [1, 2]}, "1: column 'scores' has 2 scores for 2 positives and 3 negatives; it"),
    ({"scores": [1, 2, 3, 4, "x"]}, "1: column 'scores' should contain finite numbers, got 'x'"),
    ({"scores": [1, 2, 3, 4, "nan"]}, "1: column 'scores' should contain finite numbers, got"),
    ({"scores": None}, "1: column 'scores' has 1 scores for 2 positives and 3 negatives; it"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_bad_lists_are_refused_in_a_line(tmp_path, change, message):
    path = write(tmp_path / "x.jsonl", [LISTS[0] | change, *LISTS[1:]])
    with pytest.raises(InputError) as error:
        source(path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}:1")
    assert "\n" not in str(error.value)


def test_bad_pairs_are_refused_in_a_line(tmp_path):
    def refused(rows, **own):
        path = write(tmp_path / "x.jsonl", rows)
        with pytest.raises(InputError) as error:
            source(path, **own)
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(str(path))

    row = {"query": "q", "document": "d", "label": 1}
    contradiction = refused([row, row | {"label": 0}])
    assert contradiction.startswith(":2: a document is a positive and a negative of the query 'q'")
    assert refused([row, row | {"document": " "}]) == ":2: column 'document' is empty"
    assert ":1: column 'score' should contain a number" in refused([row | {"score": "x"}])
    blank = {"query": "q", "title": "", "body": " "}
    assert ":2: the document is empty: the columns 'title', 'body'" in refused(
        [blank | {"title": "t"}, blank]
    )
    assert ": no query has a positive" in refused([row | {"label": 0}] * 2)
    assert " has no column 'query'; it has 'a'" in refused([{"a": "b"}])
    assert "a row needs a query and a document" in refused([{"query": "b"}])
    assert "which own.positive names" in refused([row], positive="best")
    assert "name the query alone" in refused([TRIPLES[0]], fields=("query", "negative"))
    assert "own.template is not for retrieval" in refused([row], template="{query}")
    with pytest.raises(InputError, match="own.positive is for own.kind=retrieval, got ranking"):
        registry.get("own", DataOptions(own={"train": "x", "kind": "ranking", "positive": "a"}))


def test_a_template_names_fields_of_the_documents(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIRS)
    with pytest.raises(InputError, match="names 'title', which is not among the fields of a docu"):
        source(path, {"document_template": "{title} {document}"})
    with pytest.raises(InputError, match=r"document_template must have the field \{document\}"):
        registry.get(
            "toy_retrieval",
            DataOptions(retrieval=RetrievalOptions(document_template="{title} {document}")),
        )


def test_an_id_names_one_text(tmp_path):
    rows = [{"query": f"q{i}", "document_id": "d", "document": f"text {i}"} for i in range(2)]
    path = write(tmp_path / "x.jsonl", rows)
    made = source(path)
    with pytest.raises(InputError, match="record 2: document 'd' has another text than before"):
        made.size("validation")


def test_evaluation_searches_a_part_of_many_documents(tmp_path, caplog):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(30)]
    path = write(tmp_path / "x.jsonl", rows)
    made = source(
        path, {"eval_documents": 12}, limits={"max_eval_examples": 10}, validation=str(path)
    )
    examples = [made.examples("validation", i)[0] for i in range(made.size("validation"))]
    texts = [e.fields["document"] for e in examples if e.role == "document"]
    assert len(examples) == 10 + 12 and {f"p{i}" for i in range(10)} < set(texts)
    assert [r.message for r in caplog.records if "search 12 of 20 documents" in r.message]


def test_structs_and_lists_of_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(LISTS), path)
    made = source(path)
    assert lists(made) == SCORED_LISTS


def test_lists_as_text_in_the_cells_of_a_csv(tmp_path):
    rows = [{name: json.dumps(v) for name, v in row.items() if name != "query"} for row in LISTS]
    rows = [{"query": f"query {i}"} | row for i, row in enumerate(rows)]
    made = source(write(tmp_path / "x.csv", rows))
    assert lists(made) == SCORED_LISTS


def test_draws_follow_the_seed(tmp_path):
    made = source(write(tmp_path / "x.jsonl", LISTS), {"negatives": 2})
    first = [made.training_examples(0, 1, epoch) for epoch in range(8)]
    assert first == [made.training_examples(0, 1, epoch) for epoch in range(8)]
    assert first != [made.training_examples(0, 2, epoch) for epoch in range(8)]
    assert all(np.isfinite(e.label[1]) for e in first[0][1:])
