"""Prompts of sentence-transformers folders: written from templates, kept when loaded, applied."""

import dataclasses
import json

import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.retrieval.build import role_of
from gemma_encoder.weights import card
from gemma_encoder.weights.sentence_prompts import prefix_of, task_prompts

SETTINGS = "config_sentence_transformers.json"
TEXTS = ["a red box", "two cups of tea"]


def retrieval_task(
    name="find", query="ask: {query}", document="text: {document}", kind="retrieval"
):
    roles = (("query", Template(query)), ("document", Template(document)))
    return Task(name, kind, Template(document), head=kind, role_templates=roles)


@pytest.fixture(scope="module")
def retriever(random_predictor):
    """An untrained retriever beside a classifier's task without a prefix."""
    import jax

    from gemma_encoder.model.config import HeadConfig
    from gemma_encoder.model.encoder import initial_parameters

    spec = random_predictor().spec
    encoder = dataclasses.replace(
        spec.encoder,
        heads={"retrieval": HeadConfig(spec.encoder.pooled_dim, "embedding")},
        pooling=PoolingConfig(normalize=True),
    )
    spec = dataclasses.replace(spec, encoder=encoder, tasks=(retrieval_task(),))
    return ge.Predictor(spec, initial_parameters(encoder, jax.random.key(0)))


def settings_of(folder):
    return json.loads((folder / SETTINGS).read_text())


def test_a_template_is_a_prompt_if_it_is_a_prefix_and_a_field():
    assert prefix_of(Template("a {{b}} {text}")) == "a {b} "
    assert prefix_of(Template("{text}")) == ""
    assert prefix_of(Template("{text}.")) is None
    assert prefix_of(Template("{a} {b}")) is None


def test_prompts_are_named_by_role_or_task():
    plain = Task("plain", "regression", Template("{text}"))
    pair = Task("pair", "regression", Template("{a} {b}"))
    prompts = task_prompts([retrieval_task(), plain, pair])
    assert prompts == {"query": "ask: ", "document": "text: ", "plain": ""}
    several = task_prompts([retrieval_task("one"), retrieval_task("two", query="{query}")])
    assert several == {
        "one_query": "ask: ",
        "one_document": "text: ",
        "two_query": "",
        "two_document": "text: ",
    }
    with pytest.raises(InputError, match="which cannot express the template"):
        task_prompts([retrieval_task(query="{query}?")])


def test_a_retriever_is_exported_with_prompts_and_loads_again(retriever, tmp_path):
    folder = ge.export_huggingface(retriever, tmp_path / "export")
    settings = settings_of(tmp_path / "export")
    assert settings["prompts"] == {"query": "ask: ", "document": "text: "}
    assert settings["similarity_fn_name"] == "cosine"
    modules = json.loads((tmp_path / "export" / "modules.json").read_text())
    assert [entry["type"].split(".")[-1] for entry in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    again = ge.Predictor.load(folder)
    for role in ("query", "document"):
        vectors = retriever.embed(TEXTS, role=role)
        np.testing.assert_array_equal(again.embed(TEXTS, role=role), vectors)
        prompted = retriever.embed(TEXTS, prompt=settings["prompts"][role])
        np.testing.assert_array_equal(prompted, vectors)


@pytest.fixture
def foreign(retriever, tmp_path):
    """A folder as another program writes it: with prompts, and without our description."""
    folder = tmp_path / "foreign"
    ge.export_huggingface(retriever, folder, heads=False)
    for name in ("gemma_encoder.json", "digests.json"):
        (folder / name).unlink()
    settings = settings_of(folder)
    settings["prompts"] = {"query": "q: ", "document": "d: ", "topic": "t: "}
    settings["default_prompt_name"] = "topic"
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def test_a_loaded_folder_keeps_its_prompts(foreign, tmp_path):
    predictor = ge.Predictor.load(foreign)
    for given, prompt in (
        ({"role": "query"}, "q: "),
        ({"role": "document"}, "d: "),
        ({"prompt_name": "document"}, "d: "),
        ({}, "t: "),
        ({"prompt": "other "}, "other "),
    ):
        expected = predictor.embed([prompt + text for text in TEXTS], prompt="")
        np.testing.assert_array_equal(predictor.embed(TEXTS, **given), expected, err_msg=prompt)
    ge.export_huggingface(predictor, tmp_path / "again")
    assert settings_of(tmp_path / "again")["prompts"] == settings_of(foreign)["prompts"]
    assert settings_of(tmp_path / "again")["default_prompt_name"] == "topic"
    again = ge.Predictor.load(tmp_path / "again")
    np.testing.assert_array_equal(again.embed(TEXTS), predictor.embed(TEXTS))


def test_unknown_prompts_are_refused(foreign):
    predictor = ge.Predictor.load(foreign)
    with pytest.raises(InputError, match="prompt_name 'quary'.*did you mean 'query'"):
        predictor.embed(TEXTS, prompt_name="quary")
    for other in ({"prompt": "x"}, {"role": "document"}):
        with pytest.raises(InputError, match="stands alone"):
            predictor.embed(TEXTS, prompt_name="query", **other)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean"])
def test_a_loaded_folder_keeps_its_similarity(foreign, tmp_path, name):
    """Compares vectors as the folder says, or refuses to."""
    (foreign / SETTINGS).write_text(json.dumps(settings_of(foreign) | {"similarity_fn_name": name}))
    predictor = ge.Predictor.load(foreign)
    vectors = np.float32([[3, 4], [0, 2]]) @ np.eye(2, predictor.spec.encoder.pooled_dim)
    if name == "euclidean":
        with pytest.raises(InputError, match="similarity 'euclidean'; expected cosine or dot"):
            predictor.similarity(vectors)
    else:
        expected = {"cosine": [[1, 0.8], [0.8, 1]], "dot": [[25, 8], [8, 4]]}[name]
        np.testing.assert_allclose(predictor.similarity(vectors), expected, rtol=1e-6)
    ge.export_huggingface(predictor, tmp_path / "again")
    ge.export_huggingface(ge.Predictor.load(tmp_path / "again"), tmp_path / "third")
    assert settings_of(tmp_path / "third")["similarity_fn_name"] == name


def test_documents_have_the_prompt_of_passages(foreign):
    """Looks for the names that `encode_document` looks for, in the same order."""
    changes = {"prompts": {"corpus": "c: ", "passage": "p: "}, "default_prompt_name": None}
    (foreign / SETTINGS).write_text(json.dumps(settings_of(foreign) | changes))
    predictor = ge.Predictor.load(foreign)
    expected = predictor.embed(TEXTS, prompt="p: ")
    np.testing.assert_array_equal(predictor.embed(TEXTS, role="document"), expected)
    assert role_of(predictor, None, "document") == "document"
    assert role_of(predictor, None, "query") == ""
    with pytest.raises(InputError, match="role 'query' needs a task"):
        predictor.embed(TEXTS, role="query")


def test_a_retriever_of_products_stays_one_without_its_head(retriever, tmp_path):
    encoder = dataclasses.replace(retriever.spec.encoder, pooling=PoolingConfig())
    spec = dataclasses.replace(retriever.spec, encoder=encoder)
    for heads in (True, False):
        folder = tmp_path / str(heads)
        ge.export_huggingface(ge.Predictor(spec, retriever.parameters), folder, heads=heads)
        assert settings_of(folder)["similarity_fn_name"] == "dot"
        again = ge.Predictor.load(folder)
        vectors = again.embed(TEXTS, role="query")
        np.testing.assert_array_equal(again.similarity(vectors), vectors @ vectors.T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["q"]}, "prompts must be texts by name"),
        ({"prompts": {"a": 1}}, "prompts must be texts by name"),
        ({"default_prompt_name": "absent"}, "prompts must be texts by name"),
        ({"similarity_fn_name": 3}, "similarity_fn_name must be a text"),
    ],
)
def test_damaged_prompts_are_refused(foreign, changes, message):
    (foreign / SETTINGS).write_text(json.dumps(settings_of(foreign) | changes))
    with pytest.raises(InputError, match=message):
        ge.Predictor.load(foreign)


def test_the_card_shows_how_prompts_are_used(retriever):
    pair = Task("pair", "regression", Template("{a} {b}"))
    widths = {"config": {"loss_options": {"retrieval": {"widths": [8, 4]}}}}
    spec = dataclasses.replace(retriever.spec, tasks=(*retriever.spec.tasks, pair), record=widths)
    text = card.markdown(spec)
    assert "model.encode_query(queries)\nmodel.encode_document(documents)\n" in text
    assert "model.similarity(query_vectors, document_vectors)  # cosines\n" in text
    assert "encode_query(queries, truncate_dim=4)  # widths: 4, 8" in text
    assert "No prompt expresses the templates of `pair`" in text
    several = (retrieval_task("one"), retrieval_task("two"))
    text = card.markdown(dataclasses.replace(retriever.spec, tasks=several))
    assert "prompt_name='two_document'" in text and "truncate_dim" not in text
    without = dataclasses.replace(retriever.spec, tasks=(), prompts={"query": "", "document": ""})
    assert "encode_query" in card.markdown(without)
