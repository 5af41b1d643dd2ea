"""Log-likelihoods of a causal language model with tied embeddings, computed in chunks.

B rows, L length, S segments, D embed, V vocab, T columns of a chunk, I chunks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.model.layers import cap_logits, flat_tokens
from gemma_encoder.model.pooling import segment_membership
from gemma_encoder.model.products import platform_of, product

# Logits per device and chunk: 128 MiB of float32.
LOGITS = 1 << 25


def next_tokens(
    tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns the next token at each position, and True where it belongs to the same text.

    The last token of a text has no target, so n tokens give n − 1 targets.
    """

    def shift_left(array: Int[Array, "B L"]) -> Int[Array, "B L"]:
        return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))

    targets = shift_left(tokens)
    has_target = (segment_ids > 0) & (segment_ids == shift_left(segment_ids))
    return targets, has_target


def token_negative_log_likelihood(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    *,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B L"]:
    """Computes −log p(next token | this token and those before it), in nats.

    Positions without a next token in their text are 0.

    Logits are hidden · embeddingᵀ in float32. They are computed for a few columns of the rows at a
    time and recomputed in the backward pass: for a large vocabulary, an array [B, L, V] would be
    larger than the model.

    Args:
        hidden: hidden states after the final norm, under causal attention.
        embedding: the embedding table of the transformer.
        tokens, segment_ids: see `gemma_encoder.inputs.batch.Batch`.
        soft_cap: cap · tanh(logits / cap), or None.
        mesh: the mesh that rows are sharded over; None on one device.
    """
    rows, length, _ = hidden.shape
    targets, has_target = next_tokens(tokens, segment_ids)
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    max_columns = max(LOGITS * shards // (rows * embedding.shape[0]), 1)
    num_chunks = -(-length // max_columns)

    def chunk_loss(
        hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        logits = _output_logits(hidden, embedding, soft_cap, platform_of(mesh))
        target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits

    # With one chunk, its logits are stored for the backward pass; with more, they are recomputed.
    chunk_loss = chunk_loss if num_chunks == 1 else jax.checkpoint(chunk_loss)
    _, losses = jax.lax.scan(
        lambda carry, chunk: (carry, chunk_loss(*chunk)),
        None,
        (_split_columns(hidden, num_chunks), _split_columns(targets, num_chunks)),
    )
    losses = jnp.moveaxis(losses, 0, 1).reshape(rows, -1)[:, :length]
    return jnp.where(has_target, losses, 0.0)


def _split_columns(array: Array, num_chunks: int) -> Array:
    """Splits [B, L, …] into chunks of columns, [I, B, T, …]; a scan then runs over chunks.

    Rows stay whole, and with them their sharding. The last chunk is padded with zeros.
    """
    rows, length = array.shape[:2]
    width = -(-length // num_chunks)
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, num_chunks * width - length)
    padded = jnp.pad(array, padding)
    return jnp.moveaxis(padded.reshape(rows, num_chunks, width, *array.shape[2:]), 1, 0)


def _output_logits(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    soft_cap: float | None,
    platform: str,
) -> Float[Array, "B T V"]:
    """Computes float32 logits over the vocabulary."""
    logits = product(flat_tokens(hidden), embedding, platform, transposed=True, dtype=jnp.float32)
    return cap_logits(logits.reshape(*hidden.shape[:2], -1), soft_cap)


def negative_log_likelihood(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    num_segments: int,
    **options: Any,
) -> Float[Array, "B S 2"]:
    """Sums `token_negative_log_likelihood` per text, and counts the predicted tokens.

    The end-of-sequence token is predicted, the beginning-of-sequence token is not.

    Args:
        hidden, embedding, tokens, segment_ids: see `token_negative_log_likelihood`.
        num_segments: S.
        **options: `soft_cap` and `mesh`, likewise.
    """
    losses = token_negative_log_likelihood(hidden, embedding, tokens, segment_ids, **options)
    _, has_target = next_tokens(tokens, segment_ids)
    members = segment_membership(segment_ids, num_segments).astype(jnp.float32)
    total = jnp.einsum("BSL,BL->BS", members, losses)
    count = jnp.einsum("BSL,BL->BS", members, has_target.astype(jnp.float32))
    return jnp.stack([total, count], axis=-1)
