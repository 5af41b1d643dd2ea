"""Attention: who sees whom, rotary positions, and the one function that every implementation stands behind.

A row holds texts one after the other: the tokens of a segment are neighbours, and their positions rise by one. So a distance
between positions is a distance in the row, and local layers need to look at no more of it than their reach.

B batch, L length, T queries of a chunk, S keys that they see, N query heads, K key-value heads, G = N / K, H head dim.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model import fused_attention
from gemma_encoder.model.config import ATTENTION_IMPLEMENTATIONS, AttentionSpec
from gemma_encoder.model.layers import dropout

MASKED = (
    -2.3819763e38
)  # finite, as in the gemma package: a row whose every logit is masked still has a softmax
CHUNK = 512  # queries at a time on rows longer than twice that, so that no L x L array is made


def attention_mask(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    causal: bool,
    reach: tuple[int, int] | None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """What each token (second axis) may see (third axis; by default the same tokens).

    Same segment, and, if causal, not later, and, where `reach` = (left, right) is given, within it. Distances are those of
    `positions`. Padding (segment 0) sees padding only.
    """
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    key_positions = positions if key_positions is None else key_positions
    same = segment_ids[:, :, None] == key_segment_ids[:, None, :]
    ahead = (
        key_positions[:, None, :] - positions[:, :, None]
    )  # how far the seen token lies to the right
    if causal:
        same &= ahead <= 0
    if reach is not None:
        left, right = reach
        same &= (ahead >= -left) & (ahead <= right)
    return same


def rotate(
    x: Float[Array, "B L N H"], positions: Int[Array, "B L"], *, base: float, scale: float = 1.0
) -> Float[Array, "B L N H"]:
    """Rotary positions (RoPE), halves rotated against each other, in float32; positions are divided by `scale`."""
    half = x.shape[-1] // 2
    timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] / timescale[None, None, :] / scale
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def choose_implementation(
    name: str,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    soft_cap: float | None,
    dropout_rate: float,
) -> str:
    """The implementation that `name` means here: itself, or for "auto" the fastest that can do what is asked.

    Args:
        name: one of `ATTENTION_IMPLEMENTATIONS`.
        platform: "cpu", "gpu" or "tpu".
        dtype: of the activations.
        head_dim: H.
        soft_cap: of the logits, or None.
        dropout_rate: on attention probabilities.

    Raises:
        InputError: `name` cannot do what is asked, and why.
    """
    if name not in ATTENTION_IMPLEMENTATIONS:
        raise unknown("attention implementation", name, ATTENTION_IMPLEMENTATIONS)
    unsupported_reason = functools.partial(
        fused_attention.unsupported_reason,
        platform=platform,
        dtype=jnp.dtype(dtype),
        head_dim=head_dim,
        soft_cap=soft_cap,
        dropout_rate=dropout_rate,
    )
    if name == "xla":
        return name
    if name != "auto":
        if (reason := unsupported_reason(name)) is not None:
            raise InputError(
                f"attention implementation {name!r} cannot be used: {reason}; choose 'xla' or 'auto'"
            )
        return name
    reasons = {candidate: unsupported_reason(candidate) for candidate in fused_attention.PLATFORMS}
    chosen = next((candidate for candidate, reason in reasons.items() if reason is None), "xla")
    _say(
        chosen,
        tuple(
            f"not {candidate}: {reason}"
            for candidate, reason in reasons.items()
            if reason is not None
        ),
    )
    return chosen


@functools.cache  # once for each outcome, not once for each trace
def _say(chosen: str, reasons: tuple[str, ...]) -> None:
    logging.getLogger(__name__).info("attention runs on %s (%s)", chosen, "; ".join(reasons))


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
    """softmax(mask(soft_cap(Q Kᵀ))) V, with dropout on the probabilities; queries come scaled. Softmax runs in float32.

    Args:
        query, key, value: after rotation.
        segment_ids, positions: as in `gemma_encoder.inputs.batch.Batch`.
        spec: what is seen, and the soft cap.
        dropout_rate, dropout_key: on probabilities; "xla" only.
        implementation: as `choose_implementation` gives it.
        mesh: what the arrays are spread over, for implementations that are kernels of one device.
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
    chunk: int = CHUNK,
) -> Float[Array, "B L N H"]:
    """Attention in plain XLA, on any device.

    Long rows are taken `chunk` queries at a time and their probabilities computed again in the
    backward pass, so memory is chunk x L on global layers and chunk x (chunk + reach) on local
    ones.
    """
    length = query.shape[1]
    if length <= 2 * chunk:
        mask = attention_mask(segment_ids, positions, causal=spec.causal, reach=spec.reach)
        return _attend(query, key, value, mask, spec.soft_cap, dropout_rate, dropout_key)
    return _attend_in_chunks(
        query,
        key,
        value,
        segment_ids=segment_ids,
        positions=positions,
        spec=spec,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        chunks=_Chunks.of(length, chunk, spec),
    )


class _Chunks(NamedTuple):
    """How a row is cut into chunks of queries, each with the keys that it may see.

    Attributes:
        size: queries of a chunk.
        count: chunks of a row.
        fill: padding after the row's queries, so that the last chunk is full.
        near: whether a chunk gets the keys around it; otherwise every chunk gets the whole row.
        span: keys that a chunk gets.
        before, after: padding of the row's keys, so that every span lies in it.
    """

    size: int
    count: int
    fill: int
    near: bool
    span: int
    before: int
    after: int

    @classmethod
    def of(cls, length: int, size: int, spec: AttentionSpec) -> "_Chunks":
        count = -(-length // size)
        whole = count * size
        fill = whole - length
        left, right = (length, length) if spec.reach is None else spec.reach
        right = 0 if spec.causal else right
        span = size + left + right
        if span < whole:
            return cls(size, count, fill, True, span, left, fill + right)
        return cls(size, count, fill, False, whole, 0, fill)


def _attend_in_chunks(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    spec: AttentionSpec,
    dropout_rate: float,
    dropout_key: Array | None,
    chunks: _Chunks,
) -> Float[Array, "B L N H"]:
    fill, before, after = chunks.fill, chunks.before, chunks.after
    # No text has segment −1, so what pads the row is seen by itself alone.
    queries = _padded(query, 0, fill)
    query_segments = _padded(segment_ids, 0, fill, -1)
    query_positions = _padded(positions, 0, fill)
    keys = _padded(key, before, after)
    values = _padded(value, before, after)
    key_segments = _padded(segment_ids, before, after, -1)
    key_positions = _padded(positions, before, after)

    def one(index: Int[Array, ""]) -> Float[Array, "B T N H"]:
        first = index * chunks.size
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
        cut_queries = functools.partial(cut, start_index=first, slice_size=chunks.size)
        first_key = first if chunks.near else 0
        cut_keys = functools.partial(cut, start_index=first_key, slice_size=chunks.span)
        mask = attention_mask(
            cut_queries(query_segments),
            cut_queries(query_positions),
            causal=spec.causal,
            reach=spec.reach,
            key_segment_ids=cut_keys(key_segments),
            key_positions=cut_keys(key_positions),
        )
        chunk_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return _attend(
            cut_queries(queries),
            cut_keys(keys),
            cut_keys(values),
            mask,
            spec.soft_cap,
            dropout_rate,
            chunk_key,
        )

    encoded = jax.lax.map(jax.checkpoint(one), jnp.arange(chunks.count))
    batch, length, *heads = query.shape
    rows = jnp.moveaxis(encoded, 0, 1).reshape(batch, chunks.count * chunks.size, *heads)
    return rows[:, :length]


def _padded(x: Array, before: int, after: int, value: int = 0) -> Array:
    """`x` with padding along its second axis, the row's length."""
    widths = ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=value)


def _attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    soft_cap: float | None,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Float[Array, "B T N H"]:
    weights = dropout(probabilities(query, key, mask, soft_cap), dropout_rate, dropout_key).astype(
        value.dtype
    )
    batch, kv_heads, group, length, keys = weights.shape
    encoded = jnp.einsum(
        "BKRS,BSKH->BKRH", weights.reshape(batch, kv_heads, group * length, keys), value
    )
    return (
        encoded.reshape(batch, kv_heads, group, length, -1)
        .transpose(0, 3, 1, 2, 4)
        .reshape(query.shape)
    )


def probabilities(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    soft_cap: float | None,
) -> Float[Array, "B K G T S"]:
    """How much each query attends to each key, in float32; queries come scaled.

    The queries of a key's group stand behind each other in one axis (R = G T): with two, XLA on a CPU writes the logits out once more, transposed.
    """
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    grouped = (
        query.reshape(batch, length, kv_heads, group, width)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, group * length, width)
    )
    logits = jnp.einsum("BKRH,BSKH->BKRS", grouped, key, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    logits = logits.reshape(batch, kv_heads, group, length, keys)
    return jax.nn.softmax(jnp.where(mask[:, None, None, :, :], logits, MASKED), axis=-1)
