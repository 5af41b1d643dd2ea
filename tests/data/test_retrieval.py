"""Retrieval on the files of ranking tasks: lists, negatives, and the documents of a search."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from gemma_encoder.data import registry
from gemma_encoder.data.retrieval_options import RetrievalOptions
from gemma_encoder.data.stream_options import StreamOptions
from gemma_encoder.inputs.batch import BatchShape
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import ROLES
from tests.data import streams
from tests.data.retrieval_files import (
    DOCUMENTS,
    QUERIES,
    candidates,
    marco,
    options,
    positives,
    taught,
    text_of,
    write_beir,
    write_msmarco,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in MS MARCO's layout, as MSMARCO_DIR."""
    write_msmarco(tmp_path)
    monkeypatch.setenv("MSMARCO_DIR", str(tmp_path))
    return tmp_path


def documents_of(examples):
    return [int(example.document_id[1:]) for example in examples[1:]]


def negatives_of(source, query, epochs=60):
    """Returns the documents without a grade in the lists of a query, over some epochs."""
    return {
        int(example.document_id[1:])
        for epoch in range(epochs)
        for example in source.training_examples(query, 0, epoch)[1:]
        if not example.label
    }


def test_lists_are_a_query_positives_and_negatives(folder):
    source = marco(positives=2, negatives=3)
    assert source.size("train") == QUERIES  # the last query has no positive
    for query in range(QUERIES):
        examples = source.training_examples(query, 3, 0)
        assert examples[0].fields == {"query": f"query train{query}"}
        assert [e.role for e in examples] == ["query"] + ["document"] * (len(examples) - 1)
        documents = documents_of(examples)
        count = len(positives(query))
        assert sorted(documents[:count]) == sorted(positives(query))
        assert [e.label for e in examples[1:]] == [
            *(positives(query)[document] for document in documents[:count]),
            *[0.0] * 3,
        ]
        assert set(documents[count:]) <= set(candidates(query)) - set(positives(query))
        assert examples[1].fields["document"].strip() == text_of(documents[0]).strip()


def test_lists_are_drawn_anew_from_the_seed(folder):
    source = marco(negatives=2)
    lists = [source.training_examples(0, 5, epoch) for epoch in range(10)]
    assert lists == [marco(negatives=2).training_examples(0, 5, epoch) for epoch in range(10)]
    assert len({tuple(documents_of(examples)) for examples in lists}) > 5
    assert lists != [source.training_examples(0, 6, epoch) for epoch in range(10)]
    drawn = Counter(documents_of(source.training_examples(0, 0, epoch))[0] for epoch in range(200))
    assert min(drawn[document] for document in positives(0)) > 70  # one of two, in turn


def test_negatives_are_of_the_range_of_ranks(folder):
    for query in range(QUERIES):
        in_range = set(candidates(query)[1:4]) - set(positives(query))
        source = marco({"negative_ranks": (2, 4)}, negatives=2)
        assert negatives_of(source, query) == in_range
    assert all(not negatives_of(marco(), q) & set(positives(q)) for q in range(QUERIES))


def test_no_run_is_needed_without_negatives(tmp_path, monkeypatch):
    write_msmarco(tmp_path, run=False)
    monkeypatch.setenv("MSMARCO_DIR", str(tmp_path))
    source = marco(negatives=0)
    assert documents_of(source.training_examples(1, 0, 0)) == [1]
    assert [path.name for path in source.files("train")] == [
        "queries.train.tsv",
        "collection.tsv",
        "qrels.train.tsv",
    ]
    assert source.size("validation") == QUERIES + DOCUMENTS
    with pytest.raises(InputError, match="no run.train.tsv"):
        marco(negatives=1).training_examples(1, 0, 0)


def test_a_share_of_the_score_of_the_best_positive(folder):
    """Of the positives 0 and 20 of query 0, the run has the first, at rank 1."""
    write_msmarco(folder, scores=lambda query, rank: [8, 7.7, 7.6, 7.5, 4, 3, 2, 1][rank - 1])
    order = candidates(0)
    assert order[0] in positives(0)
    for share, first in ((0.0, 1), (0.96, 2), (0.95, 2), (0.94, 3), (0.5, 4), (0.49, 5)):
        source = marco(negatives=3, max_negative_share=share)
        assert negatives_of(source, 0) == set(order[first:]) - set(positives(0)), share


def test_the_share_of_a_negative_score_is_its_whole(folder):
    write_msmarco(folder, scores=lambda query, rank: -rank)
    assert negatives_of(marco(negatives=3, max_negative_share=0.5), 0) == set(candidates(0)) - set(
        positives(0)
    )


def test_all_are_negatives_where_the_run_has_no_positive(folder):
    lines = (folder / "run.train.tsv").read_text().splitlines(keepends=True)
    rest = [line for line in lines if not line.startswith("train0 Q0 d0 ")]
    (folder / "run.train.tsv").write_text("".join(rest))
    source = marco(negatives=3, max_negative_share=0.1)
    assert negatives_of(source, 0) == set(candidates(0)) - set(positives(0))


def test_a_share_needs_a_run_with_scores(folder):
    (folder / "run.train.tsv").write_text("train0\td5\t1\n")
    with pytest.raises(InputError, match=r"run.train.tsv has no scores; a run in TREC's format"):
        marco(max_negative_share=0.9).size("train")
    assert marco(negatives=0, max_negative_share=0.9).size("train")  # no run is read
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match="max_negative_share must be from 0 to 1, got"):
            RetrievalOptions(max_negative_share=share)


def test_queries_search_all_documents_or_a_part(folder, caplog):
    source = marco(eval_documents=0)
    examples = [source.examples("validation", i)[0] for i in range(source.size("validation"))]
    assert [e.role for e in examples] == ["query"] * QUERIES + ["document"] * DOCUMENTS
    assert not caplog.records
    part = marco({"max_eval_examples": 4}, eval_documents=9)
    examples = [part.examples("validation", i)[0] for i in range(part.size("validation"))]
    relevant = {f"d{document}" for query in range(4) for document in positives(query)}
    searched = [e.document_id for e in examples[4:]]
    assert len(searched) == len(set(searched)) == 9 and relevant < set(searched)
    assert "4 queries of validation search 9 of 40 documents" in caplog.text
    assert part.qrels("validation").keys() == {f"dev{query}" for query in range(4)}
    again = marco({"max_eval_examples": 4}, eval_documents=9)
    assert searched == [
        e.document_id for (e,) in map(again.examples, ["validation"] * 9, range(4, 13))
    ]


def test_relevant_documents_are_never_left_out(folder):
    source = marco(eval_documents=1)
    relevant = {document for query in range(QUERIES) for document in positives(query)}
    assert set(source.searched("validation").documents.tolist()) == relevant


def test_limits_are_of_queries(folder):
    source = marco({"max_train_examples": 5, "max_eval_examples": 3}, eval_documents=0)
    assert source.size("train") == 5
    assert source.size("validation") == 3 + DOCUMENTS
    assert len(source.qrels("validation")) == 3


def test_keys_are_equal_for_equal_texts(folder):
    """In-batch negatives with the id of a positive are masked by these keys."""
    source = marco(positives=2, negatives=5)
    keys = {}
    for query in range(QUERIES):
        head, *documents = source.training_examples(query, 0, 0)
        assert head.key == query
        for example in documents:
            assert keys.setdefault(example.document_id, example.key) == example.key
    assert len(set(keys.values())) == len(keys)


def test_titles_of_beir_are_part_of_the_text(tmp_path, monkeypatch):
    write_beir(tmp_path)
    monkeypatch.setenv("BEIR_DIR", str(tmp_path))
    source = registry.get("beir_scifact_retrieval", options(negatives=0))
    source.check()
    assert source.examples("test", QUERIES + 3)[0].fields == {
        "document": f"t3 {text_of(3)}".strip()
    }
    assert len(source.qrels("test")) == QUERIES and source.size("train") == QUERIES
    assert source.training_examples(2, 0, 0)[1].document_id == "d2"


SHAPE = BatchShape(rows=8, row_length=64, segments=6, groups=4, list_size=4, targets=1)
OPTIONS = StreamOptions(SHAPE, max_length=24, readers=4, seed=5)


def mixture():
    classes, _, ranking = streams.sources()
    return [classes, marco(negatives=2), taught(), ranking]


def mixed_stream(tokenizer, **arguments):
    rates = np.array([0.25, 0.25, 0.25, 0.25])
    return streams.TrainStream(mixture(), rates, tokenizer, OPTIONS, **arguments)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_resumes_to_the_bit(folder, tokenizer, processes):
    whole = mixed_stream(tokenizer)
    batches = streams.take(whole, 3)
    states = whole.state()
    expected = streams.take(whole, 4)
    whole.close()
    parts = []
    for process in range(processes):
        resumed = mixed_stream(tokenizer, process=process, processes=processes)
        resumed.restore(states)
        parts.append(streams.take(resumed, 4))
        resumed.close()
    for index, batch in enumerate(expected):
        rows = np.concatenate([part[index].tokens for part in parts])
        np.testing.assert_array_equal(rows, batch.tokens)
    tasks = np.concatenate([batch.task_id[batch.weight > 0] for batch in [*batches, *expected]])
    assert set(tasks.tolist()) == {0, 1, 2, 3}


def test_lists_of_a_batch_are_whole(folder, tokenizer):
    stream = mixed_stream(tokenizer)
    sizes = set()
    for batch in streams.take(stream, 6):
        filled = batch.weight > 0
        for group in np.unique(batch.group_id[filled & (batch.group_id >= 0)]):
            members = filled & (batch.group_id == group)
            task = batch.task_id[members][0]
            roles = batch.role[members]
            if task in (1, 2):
                assert (roles == ROLES.index("query")).sum() == 1
                assert (roles == ROLES.index("document")).sum() == len(roles) - 1
                assert batch.label[members].max() > 0
                sizes.add(len(roles))
                if task == 2:
                    assert np.abs(batch.targets[members]).max() > 0
    stream.close()
    assert sizes == {4}


def test_options_are_checked():
    fields = {field.name for field in dataclasses.fields(RetrievalOptions)}
    assert "max_negative_share" in fields
    with pytest.raises(InputError, match=r"query_template must have the field \{query\}, and no"):
        RetrievalOptions(query_template="{document}")
    with pytest.raises(InputError, match="unknown retrieval.representation 'dens'"):
        RetrievalOptions(representation="dens")
    with pytest.raises(InputError, match=r"retrieval.positives must be at least 1"):
        RetrievalOptions(positives=0)
