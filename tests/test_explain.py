"""What is said about a text: attention maps obey the mask, poolers share one text out, attributions are derivatives."""

import dataclasses

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import explain
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import LoraConfig
from gemma_encoder.text_encoder import TextEncoder

TEXT = "the acting was not very dull , they said in the end ."


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_maps_obey_the_mask(predictor, attention):
    maps = explain.attention_maps(predictor, TEXT, attention=attention)
    length, config = len(explain.pieces(predictor, TEXT)), predictor.spec.encoder.transformer
    assert [(found.layer, found.kind) for found in maps] == list(enumerate(config.layer_kinds))
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
    for found in maps:
        assert found.weights.shape == (config.num_heads, length, length)
        np.testing.assert_allclose(found.weights.sum(axis=-1), 1, rtol=1e-5)
        spec = config.attention_spec(found.kind, attention)
        seen = (ahead <= 0) if spec.causal else np.ones_like(ahead, bool)
        if spec.reach is not None:
            seen &= (ahead >= -spec.reach[0]) & (ahead <= spec.reach[1])
        assert ((found.weights > 0) == seen).all()


def test_the_residual_stream_under_the_maps_is_the_models(random_predictor):
    """The last layer's map, computed layer by layer, is that of a model cut off before it whose hidden states are the model's own."""
    predictor = random_predictor()
    encoder, config = explain._encoder(predictor)
    tokens = explain._tokens(predictor, TEXT, None)[None]
    call = explain.ForwardContext(
        np.ones_like(tokens), np.arange(tokens.shape[1])[None], config.attention, 0.0, 0.0
    )
    x = encoder.backbone.embedding[...][tokens] * np.float32(np.sqrt(config.transformer.embed_dim))
    for block in explain._blocks(encoder):
        x = block(x, call, None)
    np.testing.assert_allclose(
        encoder.backbone.final_norm(x), encoder.backbone(tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "pooling", ["mean", "first_k", "last_k", "attention_query", "attention_kv"]
)
def test_pooler_weights_share_one_text_out(random_predictor, pooling):
    predictor = random_predictor(pooling)
    length = len(explain.pieces(predictor, TEXT))
    weights = explain.pooler_weights(predictor, TEXT)
    if pooling == "attention_kv":
        assert weights.shape == (3, length)
        np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
        return
    assert weights.shape == (3 if pooling == "attention_query" else 1, length)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    chosen = {"first_k": [0], "last_k": [length - 1]}.get(pooling, range(length))
    assert set(np.flatnonzero(weights[0])) == set(chosen)


@pytest.mark.parametrize(
    ("task", "text"),
    [("toy_sentiment", TEXT), ("toy_similarity", ("a tall man .", "he sold wool ."))],
)
def test_attributions_are_derivatives(predictor, task, text):
    """Scaling the embedding of a token that stands once in the text changes the score as fast as its attribution says."""
    said = explain.attribute(predictor, text, task)
    altered = TextEncoder(predictor.spec, predictor.parameters, predictor.mesh)
    vocabulary = predictor.spec.tokenizer.pieces(range(predictor.spec.tokenizer.vocab_size))

    def score(piece, factor):
        table = np.array(predictor.parameters["backbone"]["embedding"])
        table[vocabulary.index(piece)] *= factor
        altered.parameters = {
            **predictor.parameters,
            "backbone": {**predictor.parameters["backbone"], "embedding": jax.numpy.asarray(table)},
        }
        fields = predictor.fields(task, [text])
        scores = altered.run(predictor.task(task).template, fields, None, False)[1][task][0]
        return (
            scores[0]
            if len(scores) == 1
            else scores[("negative", "positive").index(said.target)]
            - scores[("negative", "positive").index(said.target) - 1]
        )

    checked = 0
    for piece, value in zip(said.pieces, said.values, strict=True):
        if said.pieces.count(piece) == 1 and checked < 4:
            step = 2e-2  # float32 scores: smaller steps drown in rounding, larger ones in curvature
            np.testing.assert_allclose(
                (score(piece, 1 + step) - score(piece, 1 - step)) / (2 * step),
                value,
                rtol=0.02,
                atol=2e-4,
            )
            checked += 1
    assert checked == 4


def test_occlusion_is_the_difference_that_a_token_makes(predictor):
    """Predicted by a model whose embedding of that token is the mean of all."""
    said = explain.attribute(predictor, TEXT, "toy_sentiment", "positive", method="occlusion")
    altered = TextEncoder(predictor.spec, predictor.parameters, predictor.mesh)
    vocabulary = predictor.spec.tokenizer.pieces(range(predictor.spec.tokenizer.vocab_size))
    fields, template = (
        predictor.fields("toy_sentiment", [TEXT]),
        predictor.task("toy_sentiment").template,
    )

    def score():
        negative, positive = altered.run(template, fields, None, False)[1]["toy_sentiment"][0]
        return positive - negative

    whole = score()
    for piece in said.pieces[1:5]:
        table = np.array(predictor.parameters["backbone"]["embedding"])
        table[vocabulary.index(piece)] = table.mean(axis=0)
        altered.parameters = {
            **predictor.parameters,
            "backbone": {**predictor.parameters["backbone"], "embedding": jax.numpy.asarray(table)},
        }
        np.testing.assert_allclose(
            whole - score(), said.values[said.pieces.index(piece)], rtol=1e-4, atol=1e-5
        )


def test_classes_pull_against_each_other(predictor):
    positive, negative = (
        explain.attribute(predictor, TEXT, "toy_sentiment", target)
        for target in ("positive", "negative")
    )
    np.testing.assert_allclose(positive.values, -negative.values, rtol=1e-4, atol=1e-6)
    assert positive.output + negative.output == pytest.approx(1)
    assert explain.attribute(predictor, TEXT, "toy_sentiment").output >= 0.5


def test_adapters_count(random_predictor):
    predictor = random_predictor(lora=LoraConfig(rank=2))
    plain = ge.Predictor(dataclasses.replace(predictor.spec), predictor.parameters)
    assert np.isfinite(explain.attribute(plain, TEXT, "toy_sentiment").values).all()
    assert len(explain.attention_maps(plain, TEXT)) == predictor.spec.encoder.transformer.num_layers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: explain.attribute(p, "a", "toy_sentiment", "happy"),
            "class of task 'toy_sentiment'.*'happy'",
        ),
        (lambda p: explain.attribute(p, ("a", "b"), "toy_similarity", "x"), "has no classes"),
        (
            lambda p: explain.attribute(p, "a", "toy_sentiment", method="lime"),
            "unknown attribution method 'lime'",
        ),
        (lambda p: explain.pieces(p, {"sentence": "a"}), "needs a task"),
        (lambda p: explain.attention_maps(p, " "), "the text is empty"),
        (lambda p: explain.attribute(p, "a", "toy_similarity"), "needs 2 fields"),
    ],
)
def test_misuse_is_told_in_one_line(predictor, call, message):
    with pytest.raises(InputError, match=message):
        call(predictor)
