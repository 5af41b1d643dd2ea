"""Why a model says what it says, for one text at a time: attention maps, what the pooler takes, and token attributions.

L tokens of the text, bos and eos included; D width, N heads, P probes or latents of a pooler.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from gemma_encoder.inference import BARE, Predictor
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.template import encode
from gemma_encoder.model.attention import attention_mask, probabilities
from gemma_encoder.model.config import EncoderConfig, LoraConfig
from gemma_encoder.model.encoder import GemmaEncoder, abstract_encoder
from gemma_encoder.model.lora import merge_backbone_lora
from gemma_encoder.model.pooling import (
    AveragePooler,
    KeyValueProbePooler,
    Projected,
    QueryProbePooler,
)
from gemma_encoder.model.transformer import ForwardContext, layer_index

METHODS = ("gradient_x_input", "occlusion")

Text = str | Mapping[str, str] | Sequence[str]


class AttentionMap(NamedTuple):
    """What one layer's tokens attend to."""

    layer: int
    kind: str  # "local" or "global"
    weights: Float[
        np.ndarray, "N L L"
    ]  # from each token (second axis) to each (third axis); every row sums to 1


class Attribution(NamedTuple):
    """What each token did for a score."""

    pieces: list[str]
    values: Float[np.ndarray, "L"]
    target: str  # what was explained: a class, or the task
    output: float  # that class's probability, or the prediction


def pieces(predictor: Predictor, text: Text, task: str | None = None) -> list[str]:
    """The text as the model reads it, one string per token.

    Args:
        predictor: whose tokenizer and templates.
        text: bare, or, where a task is named, with the task's fields as `Predictor.predict` takes them.
        task: whose template to use.
    """
    return predictor.spec.tokenizer.pieces(_tokens(predictor, text, task))


def attention_maps(
    predictor: Predictor, text: Text, task: str | None = None, *, attention: str | None = None
) -> list[AttentionMap]:
    """The attention probabilities of every layer.

    Args:
        predictor: the model.
        text, task: as in `pieces`.
        attention: "bidirectional" or "causal", the mask switch; by default as the model was trained.
    """
    tokens = jnp.asarray(_tokens(predictor, text, task))[None]
    encoder, config = _encoder(predictor)
    transformer = config.transformer
    # Attention is computed anew beside the block, from the same projections: the block itself keeps no L x L array.
    call = ForwardContext(
        jnp.ones_like(tokens),
        jnp.arange(tokens.shape[1])[None],
        attention or config.attention,
        0.0,
        0.0,
    )
    table = encoder.backbone.embedding[...]
    x = (table[tokens] * jnp.sqrt(transformer.embed_dim).astype(table.dtype)).astype(
        config.compute_dtype
    )
    maps = []
    for number, block in enumerate(_blocks(encoder)):
        query, keys, _ = block.projections(block.pre_attention_norm(x), call)
        spec = transformer.attention_spec(block.layer_kind, call.attention)
        mask = attention_mask(
            call.segment_ids, call.positions, causal=spec.causal, reach=spec.reach
        )
        weights = probabilities(query, keys, mask, spec.soft_cap)[0]
        maps.append(
            AttentionMap(
                number, block.layer_kind, np.asarray(weights.reshape(-1, *weights.shape[-2:]))
            )
        )
        x = block(x, call, None)
    return maps


def pooler_weights(
    predictor: Predictor, text: Text, task: str | None = None
) -> Float[np.ndarray, "P L"]:
    """What the pooler takes from each token.

    For averages one row: each token's share. For learned queries a row per probe: the mean of its heads' attention to the tokens.
    For learned keys and values a row per latent: how much each token attends to it, the mean over heads; every column sums to 1.

    Args:
        predictor: the model.
        text, task: as in `pieces`.

    Raises:
        InputError: the pooler is one of your own.
    """
    tokens = jnp.asarray(_tokens(predictor, text, task))[None]
    encoder, config = _encoder(predictor)
    pooler = encoder.pooler.pooler if isinstance(encoder.pooler, Projected) else encoder.pooler
    segment_ids, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
    if isinstance(pooler, AveragePooler):
        chosen = np.asarray(pooler.chosen(segment_ids, positions, 1)[0], np.float32)
        return chosen / chosen.sum()
    if not isinstance(pooler, KeyValueProbePooler | QueryProbePooler):
        raise InputError(
            f"pooler {config.pooling.name!r} does not tell how much it takes from each token; "
            "the library's own poolers do"
        )
    hidden = encoder.backbone(
        tokens, attention=config.attention, compute_dtype=jnp.dtype(config.compute_dtype)
    )
    if isinstance(pooler, KeyValueProbePooler):
        return np.asarray(pooler.weights(hidden)[0].mean(axis=1).T)
    return np.asarray(pooler.weights(hidden, segment_ids, 1)[0, 0].mean(axis=1))


def attribute(
    predictor: Predictor,
    text: Text,
    task: str | None = None,
    target: str | None = None,
    method: str = "gradient_x_input",
) -> Attribution:
    """What each token did for the score: for a class, how far its score lies above the mean of the others'.

    "gradient_x_input": to first order, what a token's embedding adds (arXiv 1412.6815). It is one backward pass, but Gemma norms what
    it reads, so that the length of an embedding matters little, and where the model is sure the gradient says nothing.
    "occlusion": how far the score falls when the token's embedding is replaced by the vocabulary's mean; one forward pass a token.

    Args:
        predictor: the model.
        text: with the task's fields.
        task: by name; may be left out when the checkpoint knows only one.
        target: the class to explain; by default the predicted one.
        method: one of `METHODS`.
    """
    if method not in METHODS:
        raise unknown("attribution method", method, METHODS)
    chosen = predictor.task(task)
    tokens = _tokens(predictor, text, chosen.name)
    encoder, _ = _encoder(predictor)
    table = encoder.backbone.embedding[...]
    graph, state = nnx.split(encoder)

    def scores(rows):
        # The text's own rows stand in for the embedding table, so that a row's gradient is a token's.
        own = nnx.merge(graph, state)
        own.backbone.embedding = nnx.Param(rows)
        ids = jnp.arange(len(tokens))[None]
        return own(ids, jnp.ones_like(ids), ids, 1).scores[chosen.head][0, 0]

    rows = table[jnp.asarray(tokens)]
    said = jax.jit(scores)(rows)
    output = chosen.kind.postprocess(chosen, np.asarray(said, np.float32)[None])[0]
    direction, target, value = chosen.kind.direction(chosen, output, target)

    def score(rows):
        return scores(rows) @ direction

    if method == "occlusion":
        mean = table.mean(axis=0)
        without = jax.jit(
            lambda rows: jax.lax.map(
                lambda place: score(rows.at[place].set(mean)), jnp.arange(len(rows)), batch_size=16
            )
        )(rows)
        values = said @ direction - without
    else:
        values = (jax.jit(jax.grad(score))(rows) * rows).sum(axis=-1)
    return Attribution(predictor.spec.tokenizer.pieces(tokens), np.asarray(values), target, value)


def _tokens(predictor: Predictor, text: Text, task: str | None) -> np.ndarray:
    """The ids of one text, bos and eos included."""
    if task is None:
        if not isinstance(text, str):
            raise InputError("a text with fields needs a task, whose template puts them together")
        template, fields = BARE, {"text": text}
    else:
        template, fields = (
            predictor.task(task).template,
            predictor.fields(task, [text] if not isinstance(text, list) else [tuple(text)])[0],
        )
    return encode(
        predictor.spec.tokenizer, template, [fields], predictor.spec.max_length, "the text"
    )[0].tokens


def _encoder(predictor: Predictor) -> tuple[GemmaEncoder, EncoderConfig]:
    """The model as one module, its adapters added to their matrices, its attention in plain XLA."""
    config, parameters = predictor.spec.encoder, predictor.parameters
    if config.lora.rank:
        parameters = {
            **parameters,
            "backbone": merge_backbone_lora(parameters["backbone"], config.lora),
        }
        config = dataclasses.replace(config, lora=LoraConfig())
    config = dataclasses.replace(config, attention_implementation="xla", remat="none")
    return abstract_encoder(config).merge(parameters), config


def _blocks(encoder: GemmaEncoder) -> list:
    """The layers one by one, lowest first."""
    backbone = encoder.backbone
    found = {}
    for group, blocks in (("blocks", backbone.blocks), ("remainder", backbone.remainder)):
        for position, block in enumerate(blocks):
            graph, state = nnx.split(block)
            for place, layer in enumerate(layer_index(backbone.config, group, position)):
                found[layer] = (
                    nnx.merge(graph, jax.tree.map(lambda leaf, place=place: leaf[place], state))
                    if group == "blocks"
                    else block
                )
    return [found[layer] for layer in sorted(found)]
