"""Attention: the mask, the window, the soft cap, and implementations.

    attention(Q, K, V) = softmax(mask(soft_cap(Q Kᵀ))) V

The parts that differ between layers and settings are in `AttentionSpec`. Each is applied in one
function here, except by the splash kernel, which takes them as arguments
(`fused_attention.splash_attention`):

- mask and window: `attention_mask`. A token attends within its own text; if causal, not to later
  tokens; on local layers, to at most `left` tokens before it and `right` tokens after it.
- soft cap: `probabilities`, on the logits, before the mask.

`dot_product_attention` dispatches to the implementation: plain XLA in this file, or a kernel in
`fused_attention`. All compute the same function.

Texts are packed: the tokens of a segment are contiguous in a row and their positions rise by one.
A distance between positions is therefore a distance in the row, and a local layer needs only the
keys within its window.

B batch, L length, T queries and S keys (of a chunk, if chunked), N query heads, K key-value heads,
G = N / K query heads per key-value head, R = G T, H head dim.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model import fused_attention
from gemma_encoder.model.config import ATTENTION_IMPLEMENTATIONS, AttentionSpec
from gemma_encoder.model.layers import cap_logits, dropout
from gemma_encoder.model.products import platform_of, product

# Finite, as in the gemma package: the softmax of a row whose logits are all masked stays finite.
MASKED = -2.3819763e38
# Queries per chunk on rows longer than twice that, so that no L x L array is materialized.
CHUNK = 512
# Segment id of the slots that chunking adds around a row; it differs from 0, the batch's padding.
NO_SEGMENT = -1


def attention_mask(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    causal: bool,
    reach: tuple[int, int] | None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Returns the mask: True where the query (second axis) attends to the key (third axis).

    Padding (segment 0) attends to padding only.

    Args:
        segment_ids, positions: segment ids and positions of the queries.
        causal: mask keys after the query.
        reach: the window (left, right): keys up to `left` positions before and `right` positions
            after the query; None for no limit.
        key_segment_ids, key_positions: those of the keys; by default the queries' own.
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    key_positions = positions if key_positions is None else key_positions
    mask = segment_ids[:, :, None] == key_segment_ids[:, None, :]
    offset = key_positions[:, None, :] - positions[:, :, None]  # positive: key after query
    if causal:
        mask &= offset <= 0
    if reach is not None:
        left, right = reach
        mask &= (offset >= -left) & (offset <= right)
    return mask


def choose_implementation(
    name: str,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    soft_cap: float | None,
    dropout_rate: float,
) -> str:
    """Resolves "auto" to the first kernel of `PLATFORMS` that supports the arguments, else "xla".

    Any other name is checked and returned unchanged.

    Args:
        name: one of `ATTENTION_IMPLEMENTATIONS`.
        platform: "cpu", "gpu" or "tpu".
        dtype: dtype of the activations.
        head_dim: H.
        soft_cap: soft cap of the logits, or None.
        dropout_rate: dropout rate of attention probabilities.

    Raises:
        InputError: `name` is unknown, or does not support the arguments, with the reason.
    """
    if name not in ATTENTION_IMPLEMENTATIONS:
        raise unknown("attention implementation", name, ATTENTION_IMPLEMENTATIONS)
    if name == "xla":
        return name
    unsupported_reason = functools.partial(
        fused_attention.unsupported_reason,
        platform=platform,
        dtype=jnp.dtype(dtype),
        head_dim=head_dim,
        soft_cap=soft_cap,
        dropout_rate=dropout_rate,
    )
    if name != "auto":
        reason = unsupported_reason(name)
        if reason is not None:
            raise InputError(
                f"attention implementation {name!r} cannot be used: {reason}; "
                "choose 'xla' or 'auto'"
            )
        return name
    reasons = {kernel: unsupported_reason(kernel) for kernel in fused_attention.PLATFORMS}
    supported = [kernel for kernel, reason in reasons.items() if reason is None]
    implementation = supported[0] if supported else "xla"
    rejected = [
        f"not {kernel}: {reason}" for kernel, reason in reasons.items() if reason is not None
    ]
    _log_implementation(implementation, "; ".join(rejected))
    return implementation


@functools.cache  # logged once per outcome, not once per trace
def _log_implementation(implementation: str, rejected: str) -> None:
    logging.getLogger(__name__).info("attention runs on %s (%s)", implementation, rejected)


def dot_product_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    spec: AttentionSpec,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B L N H"]:
    """Computes softmax(mask(soft_cap(Q Kᵀ))) V, with dropout on the probabilities.

    The softmax runs in float32.

    Args:
        query, key, value: arrays after rotation; queries already scaled.
        segment_ids, positions: see `gemma_encoder.inputs.batch.Batch`.
        spec: causality, window and soft cap.
        dropout_rate, dropout_key: rate and random key of dropout on probabilities; "xla" only.
        implementation: name returned by `choose_implementation`.
        mesh: the mesh of the arrays, for kernels that run per device; None on one device.
    """
    if implementation == "xla":
        return xla_attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            positions=positions,
            spec=spec,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            platform=platform_of(mesh),
        )
    if implementation == "splash":
        return fused_attention.splash_attention(
            query, key, value, segment_ids=segment_ids, spec=spec, mesh=mesh
        )
    mask = attention_mask(segment_ids, positions, causal=spec.causal, reach=spec.reach)
    if implementation == "cudnn":
        return fused_attention.cudnn_attention(query, key, value, mask, spec)
    return fused_attention.tokamax_attention(query, key, value, mask, spec)


def xla_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    spec: AttentionSpec,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    platform: str = "",
    chunk: int = CHUNK,
) -> Float[Array, "B L N H"]:
    """Computes attention in plain XLA, on any device; arguments as in `dot_product_attention`.

    Rows longer than 2 · `chunk` are processed `chunk` queries at a time, and probabilities are
    recomputed in the backward pass: memory is chunk x L on global layers and
    chunk x (chunk + left + right) on local ones.
    """
    length = query.shape[1]
    attend = functools.partial(
        _attend, soft_cap=spec.soft_cap, dropout_rate=dropout_rate, platform=platform
    )
    if length <= 2 * chunk:
        mask = attention_mask(segment_ids, positions, causal=spec.causal, reach=spec.reach)
        return attend(query, key, value, mask, dropout_key)
    return _attend_in_chunks(
        query,
        key,
        value,
        segment_ids=segment_ids,
        positions=positions,
        spec=spec,
        attend=attend,
        dropout_key=dropout_key,
        chunks=_Chunks.plan(length, chunk, spec),
    )


class _Chunks(NamedTuple):
    """Layout of a row split into chunks of queries, each with a span of keys.

    Attributes:
        size: queries per chunk.
        count: chunks per row.
        query_padding: padding after the row's queries, so that the last chunk is full.
        windowed: each chunk gets only the keys within the window; otherwise the whole row.
        span: keys per chunk.
        keys_before, keys_after: padding around the row's keys, so that every span is inside.
    """

    size: int
    count: int
    query_padding: int
    windowed: bool
    span: int
    keys_before: int
    keys_after: int

    @classmethod
    def plan(cls, length: int, size: int, spec: AttentionSpec) -> "_Chunks":
        count = -(-length // size)
        padded_length = count * size
        padding = padded_length - length
        left, right = (length, length) if spec.reach is None else spec.reach
        right = 0 if spec.causal else right
        span = size + left + right
        if span < padded_length:  # else a window saves nothing, and every chunk gets the whole row
            return cls(size, count, padding, True, span, left, padding + right)
        return cls(size, count, padding, False, padded_length, 0, padding)


def _attend_in_chunks(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    spec: AttentionSpec,
    attend: Callable[..., Array],
    dropout_key: Array | None,
    chunks: _Chunks,
) -> Float[Array, "B L N H"]:
    pad_queries = functools.partial(_pad_row, before=0, after=chunks.query_padding)
    queries = pad_queries(query)
    query_segments = pad_queries(segment_ids, value=NO_SEGMENT)
    query_positions = pad_queries(positions)

    pad_keys = functools.partial(_pad_row, before=chunks.keys_before, after=chunks.keys_after)
    keys = pad_keys(key)
    values = pad_keys(value)
    key_segments = pad_keys(segment_ids, value=NO_SEGMENT)
    key_positions = pad_keys(positions)

    def attend_chunk(index: Int[Array, ""]) -> Float[Array, "B T N H"]:
        start = index * chunks.size
        slice_row = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
        slice_queries = functools.partial(slice_row, start_index=start, slice_size=chunks.size)
        key_start = start if chunks.windowed else 0
        slice_keys = functools.partial(slice_row, start_index=key_start, slice_size=chunks.span)
        mask = attention_mask(
            slice_queries(query_segments),
            slice_queries(query_positions),
            causal=spec.causal,
            reach=spec.reach,
            key_segment_ids=slice_keys(key_segments),
            key_positions=slice_keys(key_positions),
        )
        chunk_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return attend(slice_queries(queries), slice_keys(keys), slice_keys(values), mask, chunk_key)

    encoded = jax.lax.map(jax.checkpoint(attend_chunk), jnp.arange(chunks.count))
    batch, length, heads, width = query.shape
    padded_length = chunks.count * chunks.size
    rows = jnp.moveaxis(encoded, 0, 1).reshape(batch, padded_length, heads, width)
    return rows[:, :length]


def _pad_row(x: Array, *, before: int, after: int, value: int = 0) -> Array:
    """Pads the second axis, the length of the row: [B, L, …] to [B, before + L + after, …]."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (before, after)
    return jnp.pad(x, widths, constant_values=value)


def _attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    dropout_key: Array | None,
    *,
    soft_cap: float | None,
    dropout_rate: float,
    platform: str,
) -> Float[Array, "B T N H"]:
    weights = probabilities(query, key, mask, soft_cap, platform)
    weights = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
    batch, kv_heads, group, length, keys = weights.shape
    weights = weights.reshape(batch, kv_heads, group * length, keys)
    encoded = product(weights, value.transpose(0, 2, 1, 3), platform)
    encoded = encoded.reshape(batch, kv_heads, group, length, -1)
    return encoded.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def probabilities(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    soft_cap: float | None,
    platform: str = "",
) -> Float[Array, "B K G T S"]:
    """Computes softmax(mask(soft_cap(Q Kᵀ))) in float32; queries are already scaled.

    The queries of a key-value head are flattened into one axis, R = G T: with two axes, XLA on a
    CPU writes a transposed copy of the logits.
    """
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    grouped = query.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, group * length, width)
    logits = product(
        grouped, key.transpose(0, 2, 1, 3), platform, transposed=True, dtype=jnp.float32
    )
    logits = cap_logits(logits, soft_cap)
    logits = logits.reshape(batch, kv_heads, group, length, keys)
    masked = jnp.where(mask[:, None, None, :, :], logits, MASKED)
    return jax.nn.softmax(masked, axis=-1)
