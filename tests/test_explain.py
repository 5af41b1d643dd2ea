"""Interpretability: attention maps obey the mask, pooling weights sum to 1, attributions."""

import dataclasses

import jax
import numpy as np
import pytest

import gemma_encoder as ge
from gemma_encoder import explain
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import LoraConfig
from gemma_encoder.model.rotary import rotations
from gemma_encoder.text_encoder import TextEncoder

TEXT = "the acting was not very dull , they said in the end ."


@pytest.fixture(scope="module")
def predictor(random_predictor):
    return random_predictor()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_maps_obey_the_mask(predictor, attention):
    maps = explain.attention_maps(predictor, TEXT, attention=attention)
    length = len(explain.pieces(predictor, TEXT))
    config = predictor.spec.encoder.transformer
    assert [(layer.layer, layer.kind) for layer in maps] == list(enumerate(config.layer_kinds))
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
    for layer in maps:
        assert layer.weights.shape == (config.num_heads, length, length)
        np.testing.assert_allclose(layer.weights.sum(axis=-1), 1, rtol=1e-5)
        spec = config.attention_spec(layer.kind, attention)
        mask = (ahead <= 0) if spec.causal else np.ones_like(ahead, bool)
        if spec.reach is not None:
            mask &= (ahead >= -spec.reach[0]) & (ahead <= spec.reach[1])
        assert ((layer.weights > 0) == mask).all()


def test_applying_blocks_one_by_one_equals_the_model(random_predictor):
    """The residual stream that the maps are computed from is the model's own."""
    predictor = random_predictor()
    encoder, config = explain._encoder(predictor)
    tokens = explain._tokens(predictor, TEXT, None)[None]
    positions = np.arange(tokens.shape[1])[None]
    context = explain.ForwardContext(
        np.ones_like(tokens),
        positions,
        rotations(config.transformer, positions),
        config.attention,
        0.0,
        0.0,
    )
    x = encoder.backbone.embedding[...][tokens] * np.float32(np.sqrt(config.transformer.embed_dim))
    for block in explain._blocks(encoder):
        x = block(x, context, None)
    np.testing.assert_allclose(
        encoder.backbone.final_norm(x), encoder.backbone(tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "pooling", ["mean", "first_k", "last_k", "attention_query", "attention_kv"]
)
def test_pooler_weights_sum_to_one(random_predictor, pooling):
    predictor = random_predictor(pooling)
    length = len(explain.pieces(predictor, TEXT))
    weights = explain.pooler_weights(predictor, TEXT)
    if pooling == "attention_kv":
        assert weights.shape == (3, length)
        np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
        return
    assert weights.shape == (3 if pooling == "attention_query" else 1, length)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    pooled = {"first_k": [0], "last_k": [length - 1]}.get(pooling, range(length))
    assert set(np.flatnonzero(weights[0])) == set(pooled)


def with_embedding(predictor, table):
    """The predictor's parameters with another embedding table."""
    backbone = {**predictor.parameters["backbone"], "embedding": jax.numpy.asarray(table)}
    return {**predictor.parameters, "backbone": backbone}


@pytest.mark.parametrize(
    ("task", "text"),
    [("toy_sentiment", TEXT), ("toy_similarity", ("a tall man .", "he sold wool ."))],
)
def test_attributions_are_derivatives(predictor, task, text):
    """An attribution is the derivative of the score by a factor on the token's embedding.

    Checked by finite differences, for tokens that occur once in the text.
    """
    attribution = explain.attribute(predictor, text, task)
    altered = TextEncoder(predictor.spec, predictor.parameters, predictor.mesh)
    vocabulary = predictor.spec.tokenizer.pieces(range(predictor.spec.tokenizer.vocab_size))

    def score(piece, factor):
        table = np.array(predictor.parameters["backbone"]["embedding"])
        table[vocabulary.index(piece)] *= factor
        altered.parameters = with_embedding(predictor, table)
        fields = predictor.fields(task, [text])
        scores = altered.run(predictor.task(task).template, fields, None, False)[1][task][0]
        if len(scores) == 1:
            return scores[0]
        target = ("negative", "positive").index(attribution.target)
        return scores[target] - scores[target - 1]

    checked = 0
    for piece, value in zip(attribution.pieces, attribution.values, strict=True):
        if attribution.pieces.count(piece) == 1 and checked < 4:
            # float32 scores: rounding dominates with smaller steps, curvature with larger ones.
            step = 2e-2
            np.testing.assert_allclose(
                (score(piece, 1 + step) - score(piece, 1 - step)) / (2 * step),
                value,
                rtol=0.02,
                atol=2e-4,
            )
            checked += 1
    assert checked == 4


def test_occlusion_is_the_drop_in_the_score(predictor):
    """Compared with a model in which the token has the mean embedding."""
    attribution = explain.attribute(
        predictor, TEXT, "toy_sentiment", "positive", method="occlusion"
    )
    altered = TextEncoder(predictor.spec, predictor.parameters, predictor.mesh)
    vocabulary = predictor.spec.tokenizer.pieces(range(predictor.spec.tokenizer.vocab_size))
    fields = predictor.fields("toy_sentiment", [TEXT])
    template = predictor.task("toy_sentiment").template

    def score():
        negative, positive = altered.run(template, fields, None, False)[1]["toy_sentiment"][0]
        return positive - negative

    whole = score()
    for piece in attribution.pieces[1:5]:
        table = np.array(predictor.parameters["backbone"]["embedding"])
        table[vocabulary.index(piece)] = table.mean(axis=0)
        altered.parameters = with_embedding(predictor, table)
        value = attribution.values[attribution.pieces.index(piece)]
        np.testing.assert_allclose(whole - score(), value, rtol=1e-4, atol=1e-5)


def test_attributions_of_two_classes_are_opposite(predictor):
    positive, negative = (
        explain.attribute(predictor, TEXT, "toy_sentiment", target)
        for target in ("positive", "negative")
    )
    np.testing.assert_allclose(positive.values, -negative.values, rtol=1e-4, atol=1e-6)
    assert positive.output + negative.output == pytest.approx(1)
    assert explain.attribute(predictor, TEXT, "toy_sentiment").output >= 0.5


def test_adapters_are_merged(random_predictor):
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
def test_misuse_is_an_input_error(predictor, call, message):
    with pytest.raises(InputError, match=message):
        call(predictor)
