"""Retrieval on lists in memory: the different documents of a split, grades, keys."""

from gemma_encoder.data import registry
from gemma_encoder.data.list_retrieval import ListRetrievalSource
from gemma_encoder.data.memory import MemorySource
from gemma_encoder.data.retrieval import retrieval_task
from gemma_encoder.inputs.task import Example
from tests.data.retrieval_files import options, taught, taught_lists


def test_training_lists_have_grades_and_scores(tokenizer):
    source = taught(negatives=4)
    assert source.has_teacher
    expected = {e.document_id: e.label for e in taught_lists("train")[2]}
    query, *documents = source.training_examples(2, 0, 0)
    assert query.fields == {"query": "query 2"} and query.label == 0
    assert {e.document_id: e.label for e in documents} == expected
    assert documents[0].label[0] == 1 and all(e.label[0] == 0 for e in documents[1:])


def test_queries_search_each_document_once():
    source = taught()
    size = source.size("validation")
    examples = [source.examples("validation", index)[0] for index in range(size)]
    lists = taught_lists("validation")
    texts = [e.fields["document"] for e in examples[len(lists) :]]
    assert len(texts) == len(set(texts))
    assert set(texts) == {e.fields["document"] for members in lists for e in members}
    assert source.qrels("validation") == {
        members[0].query_id: {e.document_id: e.label[0] for e in members} for members in lists
    }
    assert all(isinstance(e.label, float) for e in examples)


def test_keys_tell_texts_apart():
    source = taught(negatives=4)
    keys = {}
    for index in range(source.size("train")):
        for example in source.training_examples(index, 0, 0):
            text = next(iter(example.fields.values()))
            assert 0 <= example.key < 1 << 31
            assert keys.setdefault(text, example.key) == example.key
    assert len(set(keys.values())) == len(keys)


def test_a_part_of_the_documents_is_searched(caplog):
    whole, part = taught(), taught(eval_documents=10)
    queries = len(taught_lists("validation"))
    relevant = {e.document_id for m in taught_lists("validation") for e in m if e.label[0]}
    searched = [
        part.examples("validation", index)[0].document_id
        for index in range(queries, part.size("validation"))
    ]
    assert len(searched) == 10 < whole.size("validation") - queries
    assert relevant <= set(searched)
    assert "search 10 of" in caplog.text and "retrieval.eval_documents" in caplog.text
    assert part.qrels("validation") == whole.qrels("validation")


def test_lists_without_labels_have_no_judgments():
    data = options()
    task = retrieval_task("unknown", data)
    lists = [[Example({"query": "a", "document": "b"}, -1.0, "q", "d")]]
    source = ListRetrievalSource(task, data, MemorySource(task, data, lambda split: lists))
    assert source.qrels("test") == {} and source.size("test") == 2


def test_toy_retrieval_has_the_lists_of_toy_ranking():
    source = registry.get("toy_retrieval", options())
    ranking = registry.get("toy_ranking", options())
    assert source.size("train") == ranking.size("train")
    assert len(source.record("train", 0, training=True).labels) == 11
