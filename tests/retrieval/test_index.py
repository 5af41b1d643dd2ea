"""Index: equals a naive search, for every kind, width and precision; misuse is one line."""

import dataclasses
import functools
import gzip
import json

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.embedding import SparseVectors
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.retrieval import build
from gemma_encoder.retrieval import dense as dense_search
from gemma_encoder.retrieval.description import IndexDescription
from gemma_encoder.retrieval.top import largest
from tests.retrieval.conftest import roles, texts

QUERIES = ["river stone cloud", "violet marble 7", "a lantern"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(build, "IndexOptions", functools.partial(build.IndexOptions, block=16))


def naive(scores, k):
    """Ids and scores of the k best, ties in the documents' order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [(f"p{i}", float(row[i])) for i in best] for row, best in zip(scores, order, strict=True)
    ]


def same(results, expected, atol=1e-6):
    """Asserts equal ids in equal order, and scores up to rounding."""
    assert [[i for i, _ in query] for query in results] == [[i for i, _ in q] for q in expected]
    for mine, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose([x for _, x in mine], [x for _, x in theirs], atol=atol)


def test_dense_search_equals_a_naive_one(dense, collection, tmp_path):
    index = ge.Index.build(dense, collection(50), tmp_path / "INDEX")
    queries = dense.embed(QUERIES, role="query")
    documents = dense.embed(texts(50), role="document")
    expected = naive(queries @ documents.T, 10)
    same(index.search(QUERIES), expected)
    same(ge.Index.load(tmp_path / "INDEX").search(queries), expected)
    assert len(index) == 50 and index.description.similarity == "cosine"
    assert len(index.search(QUERIES[:1], k=80)[0]) == 50


def test_prompts_of_a_folder_stand_for_roles(searcher, collection, tmp_path):
    model = searcher(tasks=())
    prompts = {"query": "ask: ", "document": "text: ", "topic": "topic: "}
    spec = dataclasses.replace(model.spec, prompts=prompts, default_prompt="topic")
    model = ge.Predictor(spec, model.parameters)
    index = ge.Index.build(model, collection(20), tmp_path / "INDEX")
    queries = model.embed([f"ask: {text}" for text in QUERIES], prompt="")
    documents = model.embed([f"text: {text}" for text in texts(20)], prompt="")
    same(index.search(QUERIES), naive(queries @ documents.T, 10))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_ties_are_in_order_on_any_mesh(shape, tmp_path):
    """Small whole numbers, whose products are exact."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, (70, 4)).astype(np.float32)
    queries = rng.integers(-1, 2, (9, 4)).astype(np.float32)
    about = IndexDescription("dense", "c", "f", 70, "pid", 32, full_width=4, width=4)
    (tmp_path / "blocks").mkdir()
    for block in range(about.blocks):
        part = vectors[block * 32 : (block + 1) * 32]
        build.write_block(tmp_path, block, dense_search.dense_arrays(part, about))
    devices = int(np.prod(shape))
    mesh = sharding.make_mesh(shape, jax.devices()[:devices])
    calls = []
    best = dense_search.search_dense(tmp_path, about, queries, 20, mesh, calls.append)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(best.indices, expected)
    assert len(calls) == 3


def test_the_largest_scores_are_in_order_with_ties():
    scores = np.array([0, 3, 1, 3, 2, 3, 0, 1], np.float32)
    assert largest(scores, 2).tolist() == [1, 3]
    assert largest(scores, 5).tolist() == [1, 3, 5, 4, 2]
    assert largest(scores, 20).tolist() == [1, 3, 5, 4, 2, 7]  # without those of 0


def test_a_width_keeps_the_first_dimensions(searcher, collection, tmp_path):
    for normalize in (True, False):
        model = searcher(normalize=normalize)
        index = ge.Index.build(model, collection(40), tmp_path / f"INDEX{normalize}", width=8)
        queries = model.embed(QUERIES, role="query")[:, :8]
        documents = model.embed(texts(40), role="document")[:, :8]
        if normalize:
            queries, documents = (
                x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents)
            )
        same(index.search(QUERIES, k=5), naive(queries @ documents.T, 5))
        assert index.description.similarity == ("cosine" if normalize else "dot")


def test_int8_finds_nearly_the_same(dense, collection, tmp_path):
    path = collection(200)
    exact = ge.Index.build(dense, path, tmp_path / "EXACT").search(QUERIES, k=20)
    index = ge.Index.build(dense, path, tmp_path / "INT8", precision="int8")
    small = index.search(QUERIES, k=20)
    for mine, theirs in zip(small, exact, strict=True):
        # A rounding of 1 / 254 of the largest value in each of 32 dimensions moves a cosine by
        # about 0.002 at most, and so only documents at the border of the ranking.
        assert len(dict(mine).keys() & dict(theirs).keys()) >= 18
        shared = dict(theirs)
        errors = [abs(score - shared[name]) for name, score in mine if name in shared]
        assert max(errors) < 0.005
    block = index.folder / "blocks" / "000000.safetensors"
    assert block.stat().st_size < 16 * 32 * 4 / 2


def test_sparse_search_equals_products_of_whole_vectors(sparse, collection, tmp_path):
    index = ge.Index.build(sparse, collection(50), tmp_path / "INDEX")
    assert index.description.kind == "sparse"

    def expanded(role, items):
        vectors = SparseVectors(*sparse.embed_sparse(items, role=role))
        whole = np.zeros((len(items), sparse.spec.encoder.transformer.vocab_size), np.float32)
        np.put_along_axis(whole, vectors.ids, vectors.weights, axis=1)
        return whole

    scores = expanded("query", QUERIES) @ expanded("document", texts(50)).T
    expected = [[result for result in query if result[1] > 0] for query in naive(scores, 10)]
    same(index.search(QUERIES), expected, atol=1e-5)


def test_bm25_finds_documents_with_the_words(collection, tmp_path):
    index = ge.Index.build(None, collection(50), tmp_path / "INDEX", kind="bm25")
    (first, second, third) = index.search(["Lantern 7", "unheard", "copper"], k=50)
    assert first[0][0] in (
        "p7",
        *[f"p{i}" for i, text in enumerate(texts(50)) if "lantern" in text],
    )
    assert "p7" in dict(first)
    assert second == []
    assert sorted(dict(third)) == sorted(
        f"p{i}" for i, text in enumerate(texts(50)) if "copper" in text
    )
    again = ge.Index.load(tmp_path / "INDEX").search(["Lantern 7"], k=50)
    assert again == [first]


@pytest.mark.parametrize("approximate", ["hnsw", "ivf"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_approximate_search_finds_most(dense, collection, tmp_path, approximate, precision):
    path = collection(200)
    exact = ge.Index.build(dense, path, tmp_path / "EXACT").search(QUERIES)
    options = {"approximate": approximate, "precision": precision}
    index = ge.Index.build(dense, path, tmp_path / "INDEX", **options)
    for mine, theirs in zip(index.search(QUERIES), exact, strict=True):
        # All of the few clusters, or a graph searched to a depth of 128 of 200 documents: what
        # differs is the border of the ranking, by 8 bits.
        assert len(dict(mine).keys() & dict(theirs).keys()) >= 8
        assert mine[0][1] == pytest.approx(theirs[0][1], abs=0.01)


def test_titles_fill_a_field_of_their_own(searcher, tmp_path):
    model = searcher(tasks=(roles("{title} | {text}"),))
    rows = [{"_id": "a b", "title": "moon", "text": "a stone"}, {"_id": "c", "text": "river"}]
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    index = ge.Index.build(model, path, tmp_path / "INDEX")
    documents = model.embed([("moon", "a stone"), ("", "river")], role="document")
    queries = model.embed(QUERIES, role="query")
    (result, *_) = index.search(QUERIES)
    assert dict(result)["a b"] == pytest.approx(float(queries[0] @ documents[0]), abs=1e-6)
    assert dict(result)["c"] == pytest.approx(float(queries[0] @ documents[1]), abs=1e-6)


def test_texts_are_embedded_as_they_are_without_roles(random_predictor, collection, tmp_path):
    model = random_predictor()
    index = ge.Index.build(model, collection(20), tmp_path / "INDEX")
    scores = model.embed(QUERIES) @ model.embed(texts(20)).T
    same(index.search(QUERIES, k=3), naive(scores, 3), atol=1e-4)
    assert index.description.similarity == "dot" and index.description.task == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p9\t \n", r"collection.tsv:3: expected 2 tab-separated columns, none empty"),
        ("p1\tagain\n", "collection.tsv:3: pid 'p1' appears a second time"),
    ],
)
def test_bad_collections_are_refused_in_one_line(dense, collection, tmp_path, line, message):
    path = collection(2)
    path.write_text(path.read_text() + line)
    with pytest.raises(InputError, match=message):
        ge.Index.build(dense, path, tmp_path / "INDEX")
    assert not (tmp_path / "INDEX").exists() and not (tmp_path / "INDEX.part").exists()


def test_an_empty_document_of_beir_is_refused(dense, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "a", "text": "x"}\n{"_id": "b", "title": "", "text": " "}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl:2: the text of 'b' is empty"):
        ge.Index.build(dense, path, tmp_path / "INDEX")


def test_another_model_is_refused_in_one_line(dense, searcher, collection, tmp_path):
    ge.Index.build(dense, collection(5), tmp_path / "INDEX")
    load = ge.Index.load
    cases = [
        (searcher(seed=1), r"made by another model \(step 0, \w+\) than this one \(step 0, "),
        (searcher(tasks=(roles(name="seek"),)), "with the task 'find', which the model does not"),
        (None, "does not name its model"),
    ]
    for model, message in cases:
        with pytest.raises(InputError, match=message):
            load(tmp_path / "INDEX", model).search(QUERIES)
    with pytest.raises(InputError, match=r"width 32 \(of 32\), the queries' shape is \[2, 31\]"):
        load(tmp_path / "INDEX").search(np.zeros((2, 31), np.float32))
    assert load(tmp_path / "INDEX", searcher()).search(QUERIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tree"}, "unknown kind of an index 'tree'"),
        ({"precision": "int4"}, "unknown precision of an index 'int4'"),
        ({"width": 33}, "--width=33: the model's vectors have 32 dimensions"),
        ({"kind": "sparse"}, "the model has no sparse head"),
        ({"kind": "bm25", "width": 3}, "a bm25 index has no task, width"),
        ({"kind": "bm25", "b": 2.0}, "b from 0 to 1; got 0.9 and 2.0"),
        ({"task": "other"}, "task for this checkpoint.*'other'"),
    ],
)
def test_options_that_do_not_fit_are_refused(dense, collection, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        ge.Index.build(dense, collection(5), tmp_path / "INDEX", **options)


def test_misuse_of_a_search_is_refused_in_one_line(dense, collection, tmp_path):
    path = collection(5)
    index = ge.Index.build(dense, path, tmp_path / "INDEX")
    words = ge.Index.build(None, path, tmp_path / "BM25", kind="bm25")
    other = ge.Index.build(dense, collection(6, "other.tsv"), tmp_path / "OTHER")
    cases = [
        (lambda: index.search(QUERIES, k=0), "k must be at least 1"),
        (lambda: index.search([" "]), "text 0: the text is empty"),
        (lambda: words.search(["x", " "]), "text 1: the text is empty"),
        (lambda: words.search(np.zeros((1, 32))), "a bm25 index searches for texts"),
        (lambda: ge.Index.fuse([words, other], ["x"]), "is of collection.tsv, .*another other.tsv"),
        (lambda: ge.Index.load(tmp_path), "is no index: it has no index.json"),
        (lambda: ge.Index.build(dense, path, tmp_path / "INDEX"), "exists and is not empty"),
        (lambda: ge.Index.build(dense, tmp_path / "x.tsv", tmp_path / "X"), "there is no such"),
        (lambda: ge.Index.build(dense, tmp_path / "INDEX", tmp_path / "X"), "there is no such"),
        (lambda: ge.Index.build(None, path, tmp_path / "X"), "--model is missing"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_damage_is_noticed(dense, collection, tmp_path):
    index = ge.Index.build(dense, collection(50), tmp_path / "INDEX")
    block = index.folder / "blocks" / "000001.safetensors"
    content = bytearray(block.read_bytes())
    content[-3] ^= 1
    block.write_bytes(content)
    with pytest.raises(InputError, match="000001.safetensors is damaged"):
        index.search(QUERIES)
    block.unlink()
    with pytest.raises(InputError, match="000001.safetensors is missing"):
        index.search(QUERIES)
    (index.folder / "index.json").write_text("{}")
    with pytest.raises(InputError, match="index.json: .*lacks the field 'kind'"):
        ge.Index.load(index.folder)


def test_blocks_of_other_arrays_are_refused(dense, sparse, collection, tmp_path):
    """Without digests, as where they were deleted on purpose."""
    for model, arrays, message in (
        (dense, {"vectors": np.zeros((3, 32), np.float32)}, r"shape \[5, 32\], and holds float32"),
        (dense, {"vectors": np.zeros((5, 32))}, "and holds float64 of shape"),
        (sparse, {}, "should hold starts as int32"),
        (sparse, _inverted(9, 0), "names documents that the block does not have"),
        (sparse, _inverted(0, -1), "names documents that the block does not have"),
    ):
        name = f"INDEX{len(list(tmp_path.iterdir()))}"
        index = ge.Index.build(model, collection(5), tmp_path / name)
        (index.folder / "digests.json").unlink()
        build.write_block(index.folder, 0, arrays)
        with pytest.raises(InputError, match=message):
            index.search(QUERIES)


def _inverted(document, first):
    """An inverted index of one weight, which names a document, and begins somewhere."""
    starts = np.ones(ge.Tokenizer.load("small").vocab_size + 1, np.int32)
    starts[0] = first
    return {
        "starts": starts,
        "documents": np.array([document], np.int32),
        "weights": np.ones(1, np.float32),
    }


def test_hybrid_results_are_fused_by_rank(dense, collection, tmp_path):
    path = collection(30)
    first = ge.Index.build(dense, path, tmp_path / "INDEX")
    second = ge.Index.build(None, path, tmp_path / "BM25", kind="bm25")
    fused = ge.Index.fuse([first, second], QUERIES, k=5)
    a, b = first.search(QUERIES, k=5), second.search(QUERIES, k=5)
    for results, *both in zip(fused, a, b, strict=True):
        expected = {}
        for ranking in both:
            for rank, (name, _) in enumerate(ranking, 1):
                expected[name] = expected.get(name, 0) + 1 / (60 + rank)
        assert dict(results) == pytest.approx({name: expected[name] for name, _ in results})
        assert [x for _, x in results] == sorted(expected.values(), reverse=True)[:5]


@pytest.mark.parametrize("width", [None, 8])
def test_vectors_are_compared_as_a_loaded_folder_states(searcher, collection, tmp_path, width):
    """A folder may state cosines although its vectors have any length."""
    path = collection(30)
    for similarity in ("cosine", "dot"):
        predictor = searcher(normalize=False)
        spec = dataclasses.replace(predictor.spec, tasks=(), similarity=similarity)
        predictor = ge.Predictor(spec, predictor.parameters)
        index = ge.Index.build(predictor, path, tmp_path / similarity, width=width)
        documents = [line.split("\t")[1] for line in path.read_text().splitlines()]
        vectors = [predictor.embed(texts)[:, :width] for texts in (QUERIES, documents)]
        assert np.linalg.norm(vectors[1], axis=1).std() > 0.01
        if similarity == "cosine":
            vectors = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in vectors]
        same(index.search(QUERIES, k=10), naive(vectors[0] @ vectors[1].T, 10), atol=1e-4)
        assert index.description.similarity == similarity


def test_other_similarities_than_an_index_has_are_refused(searcher, collection, tmp_path):
    predictor = searcher(normalize=False)
    spec = dataclasses.replace(predictor.spec, tasks=(), similarity="euclidean")
    with pytest.raises(InputError, match="similarity 'euclidean'; an index has cosine or dot"):
        ge.Index.build(ge.Predictor(spec, predictor.parameters), collection(5), tmp_path / "INDEX")
