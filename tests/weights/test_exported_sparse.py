"""Sparse retrievers are exported as sentence-transformers' SparseEncoder, and load again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import gemma_encoder as ge
from gemma_encoder import digests
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.special_ids import SPECIAL_IDS
from gemma_encoder.inputs.task import Task
from gemma_encoder.inputs.template import Template
from gemma_encoder.model.config import HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import initial_parameters
from gemma_encoder.weights import export

TEXTS = ["a red box", "two cups of tea"]
WORDS = 6


@pytest.fixture(scope="module")
def sparse(random_predictor):
    """An untrained sparse retriever whose logits are capped."""
    roles = (("query", Template("ask: {query}")), ("document", Template("{document}")))
    task = Task("find", "sparse_retrieval", Template("{document}"), head="w", role_templates=roles)
    spec = random_predictor().spec
    encoder = dataclasses.replace(
        spec.encoder,
        transformer=dataclasses.replace(spec.encoder.transformer, final_soft_cap=3.0),
        heads={"w": HeadConfig(2 * WORDS, "sparse")},
    )
    spec = dataclasses.replace(spec, encoder=encoder, tasks=(task,))
    return ge.Predictor(spec, initial_parameters(encoder, jax.random.key(0)))


@pytest.fixture(scope="module")
def folder(sparse, tmp_path_factory):
    return ge.export_huggingface(sparse, tmp_path_factory.mktemp("sparse") / "export")


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_the_modules_compute_weights_of_words(sparse, folder):
    """Computes them as the library's modules do, from logits of the stored output layer."""
    kinds = [entry["type"].rpartition(".")[2] for entry in read(folder, "modules.json")]
    assert kinds == ["Transformer", "WordWeights", "SpladePooling"]
    config = read(folder, "config.json")
    model = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
    assert config["architectures"] == [model[config["model_type"]]]
    assert config["final_logit_softcapping"] == 3.0 and config["tie_word_embeddings"] is False
    size = sparse.spec.encoder.transformer.vocab_size
    factors = read(folder, "1_WordWeights/config.json")
    by_id = [
        factors["word_weights"].get(word, factors["unknown_word_weight"])
        for word in factors["vocab"]
    ]
    expected = np.ones(size)
    expected[list(SPECIAL_IDS)] = 0
    np.testing.assert_array_equal(by_id, expected)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensors["lm_head.weight"], table * expected[:, None])
    assert np.abs(table[list(SPECIAL_IDS)]).min(axis=1).max() > 0


def test_all_logits_are_computed_and_the_largest_are_returned(folder):
    transformer = read(folder, "sentence_bert_config.json")
    assert transformer["transformer_task"] == "text-generation"
    assert transformer["module_output_name"] == "token_embeddings"
    assert transformer["processing_kwargs"] == {"text": {"logits_to_keep": 0}}
    model = read(folder, "config_sentence_transformers.json")
    assert model["model_type"] == "SparseEncoder" and model["similarity_fn_name"] == "dot"
    assert model["max_active_dims"] == WORDS
    assert model["prompts"] == {"query": "ask: ", "document": ""}


def test_an_export_loads_as_the_same_model(sparse, folder):
    again = ge.Predictor.load(folder)
    for role in ("query", "document"):
        for ours, theirs in zip(
            sparse.embed_sparse(TEXTS, role=role), again.embed_sparse(TEXTS, role=role), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_an_export_in_several_files_is_the_same(sparse, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_FILE", 1_000_000)
    again = ge.export_huggingface(sparse, tmp_path / "parts")
    names = read(again, "model.safetensors.index.json")["weight_map"]
    assert len(set(names.values())) > 1
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert names.keys() == tensors.keys()
    last = safetensors.numpy.load_file(again / names["lm_head.weight"])["lm_head.weight"]
    np.testing.assert_array_equal(last, tensors["lm_head.weight"])


def test_the_card_names_the_class(folder):
    text = (folder / "README.md").read_text()
    assert "import SparseEncoder\n" in text and "model = SparseEncoder(FOLDER)" in text
    assert "model.encode_query(queries)" in text and "SentenceTransformer" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": {"w": HeadConfig(4, "sparse"), "t": HeadConfig(2)}},
            "no head beside 'w' of kind sparse, the encoder has t; heads=False leaves them out",
        ),
        ({"pooling": PoolingConfig(projection=(8,))}, r"mean, projection \(8,\)"),
        ({"pooling": PoolingConfig("attention_query", heads=2)}, "has attention_query, projection"),
    ],
)
def test_what_a_sparse_encoder_does_not_have_is_refused(sparse, tmp_path, changes, message):
    encoder = dataclasses.replace(sparse.spec.encoder, **changes)
    predictor = ge.Predictor(sparse.spec, sparse.parameters)
    predictor.spec = dataclasses.replace(sparse.spec, encoder=encoder)
    with pytest.raises(InputError, match=f"cannot be exported: a SparseEncoder .*{message}"):
        ge.export_huggingface(predictor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_head_it_is_an_encoder_of_embeddings(sparse, tmp_path):
    bare = ge.export_huggingface(sparse, tmp_path / "bare", heads=False)
    kinds = [entry["type"].rpartition(".")[2] for entry in read(bare, "modules.json")]
    assert kinds == ["Transformer", "Pooling"]
    assert read(bare, "config_sentence_transformers.json")["model_type"] == "SentenceTransformer"
    vectors = ge.Predictor.load(bare).embed(TEXTS, role="query")
    np.testing.assert_array_equal(vectors, sparse.embed(TEXTS, role="query"))


def test_sparse_folders_of_others_are_refused_in_one_line(sparse, tmp_path):
    folder = ge.export_huggingface(sparse, tmp_path / "export")
    for name in ("gemma_encoder.json", digests.NAME):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"SparseEncoder's modules but no gemma_encoder\.json"):
        ge.Predictor.load(folder)
    modules = read(folder, "modules.json")
    (folder / "modules.json").write_text(json.dumps([modules[0], modules[2]]))
    with pytest.raises(InputError, match="unsupported sparse modules; expected"):
        ge.Predictor.load(folder)
