"""Sparse vectors of texts: a weight for each word of the vocabulary, most of which are 0.

The weight of a word is the maximum over a text's tokens of log(1 + max(logit, 0)), with the logits
of tied embeddings, after the final soft cap where there is one (SPLADE-max, arXiv 2109.10086,
section 2.2). Special tokens neither give nor have weights: the state of the first token attends to
nothing in particular, and gives all words a weight.

Logits are computed for a part of the vocabulary at a time, and recomputed in the backward pass, so
that no array [B, L, V] exists.

B rows, L length, S segments, D embed, V vocab, W words of a part, I parts, k words of a text.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.inputs.special_ids import SPECIAL_IDS
from gemma_encoder.model.layers import cap_logits, flat_tokens
from gemma_encoder.model.products import platform_of, product

LOGITS = 1 << 25  # per device and part: 128 MiB of float32


def all_word_weights(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    num_segments: int,
    *,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B S V"]:
    """Returns the weights of all words, for training.

    Args:
        hidden: token states after the final norm.
        embedding: the embedding table.
        tokens, segment_ids: see `gemma_encoder.inputs.batch.Batch`.
        num_segments: S.
        soft_cap: cap · tanh(logits / cap), or None.
        mesh: the mesh that rows are sharded over; None on one device.
    """
    parts = _vocabulary_parts(embedding, hidden, mesh)
    segments = _segments(tokens, segment_ids, num_segments)

    @jax.checkpoint
    def part_weights(rows: Float[Array, "W D"], words: Int[Array, " W"]) -> Array:
        return _weights(hidden, rows, words, segments, num_segments, soft_cap, mesh)

    _, weights = jax.lax.scan(lambda carry, part: (carry, part_weights(*part)), None, parts)
    weights = jnp.moveaxis(weights, 0, 2)  # [B, S, I, W]
    return weights.reshape(*weights.shape[:2], -1)[..., : embedding.shape[0]]


def largest_word_weights(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    num_segments: int,
    count: int,
    *,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B S 2k"]:
    """Returns the largest weights of each text, then the ids of their words; both float32.

    Args:
        hidden, embedding, tokens, segment_ids, num_segments: see `all_word_weights`.
        count: k, the number of weights; fewer positive ones are followed by zeros.
        soft_cap, mesh: see `all_word_weights`.
    """
    parts = _vocabulary_parts(embedding, hidden, mesh)
    segments = _segments(tokens, segment_ids, num_segments)
    shape = (tokens.shape[0], num_segments, count)

    def merge(best, part):
        rows, words = part
        weights = _weights(hidden, rows, words, segments, num_segments, soft_cap, mesh)
        words = jnp.broadcast_to(words, weights.shape)
        weights = jnp.concatenate([best[0], weights], axis=-1)
        words = jnp.concatenate([best[1], words], axis=-1)
        weights, index = jax.lax.top_k(weights, count)
        return (weights, jnp.take_along_axis(words, index, axis=-1)), None

    start = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, parts[1].dtype))
    (weights, words), _ = jax.lax.scan(merge, start, parts)
    words = jnp.where(weights > 0, words, 0)
    return jnp.concatenate([weights, words.astype(jnp.float32)], axis=-1)


def _vocabulary_parts(
    embedding: Float[Array, "V D"], hidden: Float[Array, "B L D"], mesh: Mesh | None
) -> tuple[Float[Array, "I W D"], Int[Array, "I W"]]:
    """Returns the rows of the embedding table in equal parts, and the ids of their words.

    The last part is padded; ids of padding are those of the first special token, without a weight.
    """
    size = embedding.shape[0]
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    width = max(min(LOGITS * shards // (hidden.shape[0] * hidden.shape[1]), size), 1)
    parts = -(-size // width)
    width = -(-size // parts)
    surplus = parts * width - size
    words = jnp.pad(jnp.arange(size), (0, surplus), constant_values=SPECIAL_IDS[0])
    rows = jnp.pad(embedding, ((0, surplus), (0, 0)))
    return rows.reshape(parts, width, -1), words.reshape(parts, width)


def _segments(
    tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"], num_segments: int
) -> Int[Array, "B L"]:
    """Returns the index of each token's text in its row, S for special tokens and padding."""
    is_word = (segment_ids > 0) & ~_is_special(tokens)
    return jnp.where(is_word, segment_ids - 1, num_segments)


def _is_special(ids: Int[Array, "..."]) -> Bool[Array, "..."]:
    return jnp.isin(ids, jnp.array(SPECIAL_IDS))


def _weights(
    hidden: Float[Array, "B L D"],
    rows: Float[Array, "W D"],
    words: Int[Array, " W"],
    segments: Int[Array, "B L"],
    num_segments: int,
    soft_cap: float | None,
    mesh: Mesh | None,
) -> Float[Array, "B S W"]:
    """Returns the weights of some words.

    Soft cap and logarithm are monotonic, so they are applied to the maximum, which is smaller.
    """
    logits = product(
        flat_tokens(hidden), rows, platform_of(mesh), transposed=True, dtype=jnp.float32
    )
    logits = logits.reshape(*hidden.shape[:2], -1)
    # One slot more, for the tokens of no text.
    maximum = jax.vmap(lambda row, of: jax.ops.segment_max(row, of, num_segments + 1))
    highest = maximum(logits, segments)[:, :num_segments]
    weights = jnp.log1p(jax.nn.relu(cap_logits(jnp.maximum(highest, -1.0), soft_cap)))
    return jnp.where(_is_special(words), 0.0, weights)
