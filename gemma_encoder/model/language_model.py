"""What a language model's head says: how likely each text's tokens are, each after those before it, by tied embeddings.

B rows, L length, S segments, D embed, V vocab, T tokens of a chunk of columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.model.layers import flat_tokens
from gemma_encoder.model.pooling import segment_membership

LOGITS = 1 << 25  # that a device holds at a time: 128 MiB of float32


def next_tokens(
    tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """The token after each one, and whether it belongs to the same text: of n tokens, the last has none to predict."""

    def shifted(array):
        return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))

    return shifted(tokens), (segment_ids > 0) & (segment_ids == shifted(segment_ids))


def token_negative_log_likelihood(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    *,
    soft_cap: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B L"]:
    """−log p(the next token | this one and those before it), in nats; 0 where a text, or the row, has no next token.

    Logits are hidden · embeddingᵀ, in float32 as their softmax is, and exist for a few columns at a time, forward and backward: an array
    [B, L, V] of a large vocabulary would be larger than the model.

    Args:
        hidden: after the final norm, of causal attention.
        embedding: the table that the tokens were looked up in.
        tokens, segment_ids: as in `gemma_encoder.inputs.batch.Batch`.
        soft_cap: cap·tanh(logits / cap), or None.
        mesh: what rows are spread over; None on one device.
    """
    rows, length, _ = hidden.shape
    targets, predicted = next_tokens(tokens, segment_ids)
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    most = max(LOGITS * shards // (rows * embedding.shape[0]), 1)
    chunks = -(-length // most)
    width = -(-length // chunks)

    def columns(array):
        """[chunks, B, T, …]: a scan's steps, rows left where they are."""
        padded = jnp.pad(
            array, ((0, 0), (0, chunks * width - length), *(((0, 0),) * (array.ndim - 2)))
        )
        return jnp.moveaxis(padded.reshape(rows, chunks, width, *array.shape[2:]), 1, 0)

    def of_chunk(hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        flat = jnp.einsum(
            "TD,VD->TV",
            flat_tokens(hidden),
            embedding.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = flat.reshape(*hidden.shape[:2], -1)
        if soft_cap is not None:
            logits = jnp.tanh(logits / soft_cap) * soft_cap
        said = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits, axis=-1) - said

    # The only chunk's logits may be kept for the backward pass; those of many are made again.
    step = of_chunk if chunks == 1 else jax.checkpoint(of_chunk)
    _, values = jax.lax.scan(
        lambda carry, chunk: (carry, step(*chunk)), None, (columns(hidden), columns(targets))
    )
    return jnp.where(
        predicted, jnp.moveaxis(values, 0, 1).reshape(rows, chunks * width)[:, :length], 0.0
    )


def negative_log_likelihood(
    hidden: Float[Array, "B L D"],
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    num_segments: int,
    **options: Any,
) -> Float[Array, "B S 2"]:
    """For each text the sum of `token_negative_log_likelihood`, and how many tokens were predicted: eos is, bos is not.

    Args:
        hidden, embedding, tokens, segment_ids, options: as there.
        num_segments: S.
    """
    values = token_negative_log_likelihood(hidden, embedding, tokens, segment_ids, **options)
    _, predicted = next_tokens(tokens, segment_ids)
    members = segment_membership(segment_ids, num_segments).astype(jnp.float32)
    return jnp.stack(
        [
            jnp.einsum("BSL,BL->BS", members, values),
            jnp.einsum("BSL,BL->BS", members, predicted.astype(jnp.float32)),
        ],
        axis=-1,
    )
