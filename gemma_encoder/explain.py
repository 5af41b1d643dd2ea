"""Interpretability of one text: attention maps, pooling weights and token attributions.

L tokens of the text, bos and eos included; C outputs of a head, D embed, N query heads, P probes
or latents of a pooler.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gemma_encoder.embedding import BARE
from gemma_encoder.evaluation.columns import check_finite
from gemma_encoder.inference import Predictor
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.template import encode
from gemma_encoder.model.attention import attention_mask, probabilities
from gemma_encoder.model.block import Block, ForwardContext
from gemma_encoder.model.config import EncoderConfig, LoraConfig
from gemma_encoder.model.encoder import GemmaEncoder, abstract_encoder
from gemma_encoder.model.lora import merge_backbone_lora
from gemma_encoder.model.pooling import (
    AveragePooler,
    KeyValueProbePooler,
    Projected,
    QueryProbePooler,
)
from gemma_encoder.model.products import platform_of
from gemma_encoder.model.rotary import rotations
from gemma_encoder.model.transformer import layer_index
from gemma_encoder.weights import doors

METHODS = ("gradient_x_input", "occlusion")

Text = str | Mapping[str, str] | Sequence[str]


class AttentionMap(NamedTuple):
    """Attention probabilities of one layer.

    Attributes:
        layer: index, from 0.
        kind: "local" or "global".
        weights: attention from each token (second axis) to each token (third axis); rows sum to 1.
    """

    layer: int
    kind: str
    weights: Float[np.ndarray, "N L L"]


class Attribution(NamedTuple):
    """Contributions of the tokens of a text to a score.

    Attributes:
        pieces: the tokens as text.
        values: contribution of each token to the head's score: of a regression, to the number
            scaled to [0, 1].
        target: the explained class, or the task if it has no classes.
        output: probability of that class, or the prediction.
    """

    pieces: list[str]
    values: Float[np.ndarray, " L"]
    target: str
    output: float


def pieces(predictor: Predictor, text: Text, task: str | None = None) -> list[str]:
    """Returns the text as the model reads it, one string per token.

    Args:
        predictor: gives the tokenizer and the templates.
        text: without a task, a bare text; with one, its fields as `Predictor.predict` takes them.
        task: applies the template of this task.
    """
    return predictor.spec.tokenizer.pieces(_tokens(predictor, text, task))


def attention_maps(
    predictor: Predictor, text: Text, task: str | None = None, *, attention: str | None = None
) -> list[AttentionMap]:
    """Computes the attention probabilities of every layer.

    Args:
        predictor: the model.
        text, task: see `pieces`.
        attention: the mask switch, "bidirectional" or "causal"; by default that of the model.
    """
    tokens = jnp.asarray(_tokens(predictor, text, task))[None]
    encoder, config = _encoder(predictor)
    positions = jnp.arange(tokens.shape[1])[None]
    context = ForwardContext(
        segment_ids=jnp.ones_like(tokens),
        positions=positions,
        rotations=rotations(config.transformer, positions),
        attention=attention or config.attention,
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
        platform=platform_of(None),
    )
    x = _embed(encoder, config, tokens)
    maps = []
    for layer, block in enumerate(_blocks(encoder)):
        weights = _attention_weights(block, x, context)
        maps.append(AttentionMap(layer, block.layer_kind, np.asarray(weights)))
        x = block(x, context, None)
    return maps


def _embed(encoder: GemmaEncoder, config: EncoderConfig, tokens: Array) -> Float[Array, "1 L D"]:
    table = encoder.backbone.embedding[...]
    scale = jnp.sqrt(config.transformer.embed_dim).astype(table.dtype)
    return (table[tokens] * scale).astype(config.compute_dtype)


def _attention_weights(
    block: Block, x: Float[Array, "1 L D"], context: ForwardContext
) -> Float[Array, "N L L"]:
    """Recomputes the attention probabilities of a layer, which its forward pass does not return."""
    query, keys, _ = block.projections(block.pre_attention_norm(x), context)
    spec = block.config.attention_spec(block.layer_kind, context.attention)
    mask = attention_mask(
        context.segment_ids, context.positions, causal=spec.causal, reach=spec.reach
    )
    weights = probabilities(query, keys, mask, spec.soft_cap, context.platform)[0]
    return weights.reshape(-1, *weights.shape[-2:])


def pooler_weights(
    predictor: Predictor, text: Text, task: str | None = None
) -> Float[np.ndarray, "P L"]:
    """Computes the weight of each token in the pooled vector.

    The rows depend on the pooler:

    - averages: one row, the share of each token;
    - `attention_query`: a row per probe, its attention to the tokens, averaged over heads;
    - `attention_kv`: a row per latent, the attention of each token to it, averaged over heads;
      columns sum to 1.

    Args:
        predictor: the model.
        text, task: see `pieces`.

    Raises:
        InputError: the pooler is a registered one, whose weights are not known.
    """
    tokens = jnp.asarray(_tokens(predictor, text, task))[None]
    encoder, config = _encoder(predictor)
    pooler = encoder.pooler.pooler if isinstance(encoder.pooler, Projected) else encoder.pooler
    segment_ids = jnp.ones_like(tokens)
    if isinstance(pooler, AveragePooler):
        positions = jnp.arange(tokens.shape[1])[None]
        mask = np.asarray(pooler.pooled_tokens(segment_ids, positions, 1)[0], np.float32)
        return mask / mask.sum()
    if not isinstance(pooler, KeyValueProbePooler | QueryProbePooler):
        raise InputError(
            f"pooler {config.pooling.name!r} does not expose its weights; only the library's own "
            "poolers do"
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
    """Attributes the score of a class, or a predicted number, to the tokens of the text.

    The score of one of several exclusive classes is its logit minus the mean of the others'.

    Args:
        predictor: the model.
        text: fields of the task, as `Predictor.predict` takes them.
        task: name; optional if the checkpoint has only one task.
        target: class to explain; by default the predicted one.
        method: "gradient_x_input" or "occlusion".

            "gradient_x_input" is the first-order effect of a token's embedding (arXiv 1412.6815),
            in one backward pass. Gemma normalizes its inputs, so the norm of an embedding has
            little effect, and gradients vanish where the model is confident.

            "occlusion" is the drop in the score when the token's embedding is replaced by the mean
            embedding of the vocabulary, in one forward pass per token.
    """
    if method not in METHODS:
        raise unknown("attribution method", method, METHODS)
    task_spec = predictor.task(task)
    tokens = _tokens(predictor, text, task_spec.name)
    encoder, _ = _encoder(predictor)
    table = encoder.backbone.embedding[...]
    logits = _logits_of_embeddings(encoder, task_spec.head)
    rows = table[jnp.asarray(tokens)]
    predicted = jax.jit(logits)(rows)
    scores = np.asarray(predicted, np.float32)[None]
    check_finite(scores, "scores", lambda _: "the text")
    output = task_spec.kind.postprocess(task_spec, scores)[0]
    direction, target, value = task_spec.kind.direction(task_spec, output, target)

    def score(rows: Float[Array, "L D"]) -> Float[Array, ""]:
        return logits(rows) @ direction

    if method == "occlusion":
        mean = table.mean(axis=0)

        def occluded_scores(rows: Float[Array, "L D"]) -> Float[Array, " L"]:
            indices = jnp.arange(len(rows))
            return jax.lax.map(
                lambda index: score(rows.at[index].set(mean)), indices, batch_size=16
            )

        values = predicted @ direction - jax.jit(occluded_scores)(rows)
    else:
        values = (jax.jit(jax.grad(score))(rows) * rows).sum(axis=-1)
    return Attribution(predictor.spec.tokenizer.pieces(tokens), np.asarray(values), target, value)


def _logits_of_embeddings(
    encoder: GemmaEncoder, head: str
) -> Callable[[Float[Array, "L D"]], Float[Array, " C"]]:
    """Returns a function from the embeddings of one text to a head's outputs.

    It replaces the embedding table by the embeddings, and token i reads row i: the gradient of a
    row is then the gradient of a token.
    """
    graph, state = nnx.split(encoder)

    def logits(rows: Float[Array, "L D"]) -> Float[Array, " C"]:
        model = nnx.merge(graph, state)
        model.backbone.embedding = nnx.Param(rows)
        ids = jnp.arange(len(rows))[None]
        return model(ids, jnp.ones_like(ids), ids, 1).scores[head][0, 0]

    return logits


def _tokens(predictor: Predictor, text: Text, task: str | None) -> np.ndarray:
    """Tokenizes one text, bos and eos included: int [L]."""
    if task is None:
        if not isinstance(text, str):
            raise InputError("a text with several fields needs a task, whose template joins them")
        template = BARE
        fields = {"text": text}
    else:
        template = predictor.task(task).template
        example = tuple(text) if isinstance(text, list) else text
        fields = predictor.fields(task, [example])[0]
    tokenizer = predictor.spec.tokenizer
    return encode(tokenizer, template, [fields], predictor.spec.max_length, "the text")[0].tokens


def _encoder(predictor: Predictor) -> tuple[GemmaEncoder, EncoderConfig]:
    """Returns the model with adapters merged into its matrices, and attention in plain XLA."""
    config = predictor.spec.encoder
    doors.check_float32(config, "the predictor")
    parameters = predictor.parameters
    if config.lora.rank:
        merged = merge_backbone_lora(parameters["backbone"], config.lora)
        parameters = {**parameters, "backbone": merged}
        config = dataclasses.replace(config, lora=LoraConfig())
    config = dataclasses.replace(config, attention_implementation="xla", remat="none")
    return abstract_encoder(config).merge(parameters), config


def _blocks(encoder: GemmaEncoder) -> list[Block]:
    """Returns the layers as single blocks, first to last."""
    backbone = encoder.backbone
    layers = {}
    for position, block in enumerate(backbone.blocks):
        graph, state = nnx.split(block)
        for index, layer in enumerate(layer_index(backbone.config, "blocks", position)):
            layers[layer] = nnx.merge(graph, _unstacked(state, index))
    for position, block in enumerate(backbone.remainder):
        (layer,) = layer_index(backbone.config, "remainder", position)
        layers[layer] = block
    return [layers[layer] for layer in sorted(layers)]


def _unstacked(state: nnx.State, index: int) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], state)
