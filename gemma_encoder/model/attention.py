"""Attention: who sees whom, rotary positions, and the one function that every implementation stands behind.

B batch, L length, N query heads, K key-value heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.model.layers import dropout

MASKED = -2.3819763e38  # finite, as in the gemma package: a row whose every logit is masked still has a softmax


def visible(segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], *, causal: bool, reach: tuple[int, int] | None) -> Bool[Array, "B L L"]:
    """What each token (second axis) may see (third axis).

    Same segment, and, if causal, not later, and, where `reach` = (left, right) is given, within it. Distances are those of
    `positions`. Padding (segment 0) sees padding only.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    ahead = positions[:, None, :] - positions[:, :, None]  # how far the seen token lies to the right
    if causal:
        same &= ahead <= 0
    if reach is not None:
        left, right = reach
        same &= (ahead >= -left) & (ahead <= right)
    return same


def rotate(x: Float[Array, "B L N H"], positions: Int[Array, "B L"], *, base: float, scale: float = 1.0) -> Float[Array, "B L N H"]:
    """Rotary positions (RoPE), halves rotated against each other, in float32; positions are divided by `scale`."""
    half = x.shape[-1] // 2
    timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] / timescale[None, None, :] / scale
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    causal: bool,
    reach: tuple[int, int] | None,
    soft_cap: float | None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "B L N H"]:
    """softmax(mask(soft_cap(Q Kᵀ))) V, with dropout on the probabilities; queries come scaled. Softmax runs in float32."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    mask = visible(segment_ids, positions, causal=causal, reach=reach)
    probabilities = jax.nn.softmax(jnp.where(mask[:, None, None, :, :], logits, MASKED), axis=-1)
    probabilities = dropout(probabilities, dropout_rate, dropout_key).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, value).reshape(batch, length, heads, width)
