"""Fused attention kernels: splash attention on TPU, cuDNN and tokamax on NVIDIA GPUs.

Each computes softmax(mask(soft_cap(Q Kᵀ))) V with queries already scaled, or is not used:
`unsupported_reason` reports any argument that a kernel does not support, so none is ignored
silently. No kernel supports dropout on attention probabilities.

B batch, L length, N query heads, K key-value heads, H head dim.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.model.config import AttentionSpec

# The platform of each kernel, in the order in which "auto" tries them.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}
# Lanes of a TPU vector register; splash attention needs block sizes that are multiples of it.
LANES = 128
BLOCKS = (512, 256, 128)


def unsupported_reason(
    name: str,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    soft_cap: float | None,
    dropout_rate: float,
) -> str | None:
    """Returns the reason why a kernel does not support the arguments, or None if it does.

    Args:
        name: key of `PLATFORMS`.
        platform, dtype, head_dim, soft_cap, dropout_rate: see
            `gemma_encoder.model.attention.choose_implementation`.
    """
    if platform != PLATFORMS[name]:
        return f"it needs a {PLATFORMS[name].upper()}, this is a {platform.upper()}"
    if dropout_rate:
        return "it does not support dropout on attention probabilities"
    if name == "splash" and head_dim % LANES:
        return f"it needs a head dim that is a multiple of {LANES}, not {head_dim}"
    if name in ("cudnn", "tokamax") and dtype != jnp.bfloat16:
        return f"it needs bfloat16, not {dtype}"
    if name == "cudnn" and soft_cap is not None:
        return "it does not support a soft cap"
    if name == "cudnn" and (head_dim > 256 or head_dim % 8):
        return f"it needs a head dim of at most 256 that is a multiple of 8, not {head_dim}"
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    return None


def splash_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    *,
    segment_ids: Int[Array, "B L"],
    spec: AttentionSpec,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Computes attention with JAX's splash attention for TPUs, which skips fully masked blocks.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.

    Args:
        query, key, value: queries already scaled; heads may be grouped.
        segment_ids: 0 for padding.
        spec: causality, window and soft cap.
        mesh: rows are sharded over `data` and `fsdp`, and heads over `tensor` if it divides them;
            None on one device.
        interpret: run the kernel in interpret mode on a CPU, slowly, for tests.
    """
    attend = functools.partial(_splash_on_one_device, spec=spec, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return attend(query, key, value, segment_ids)
    tensor_shards = mesh.shape["tensor"]
    heads = query.shape[2]
    kv_heads = key.shape[2]
    kv_heads_divide = kv_heads % tensor_shards == 0 or kv_heads == 1
    head_axis = "tensor" if heads % tensor_shards == 0 and kv_heads_divide else None
    kv_head_axis = head_axis if kv_heads > 1 else None
    rows = ("data", "fsdp")
    query_spec = P(rows, None, head_axis, None)
    key_spec = P(rows, None, kv_head_axis, None)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(query_spec, key_spec, key_spec, P(rows, None)),
        out_specs=query_spec,
        check_vma=False,
    )(query, key, value, segment_ids)


def _splash_on_one_device(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    segment_ids: Int[Array, "B L"],
    *,
    spec: AttentionSpec,
    interpret: bool,
) -> Float[Array, "B L N H"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = query.shape[1:3]
    padding = -length % LANES
    padded_length = length + padding
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_splash_mask(spec, padded_length)] * heads),
        block_sizes=_splash_blocks(padded_length),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=spec.soft_cap,
        interpret=interpret,
    )

    def heads_first(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), 2, 1)

    def attend_row(query, key, value, ids):
        return kernel(query, key, value, segment_ids=splash.SegmentIds(ids, ids))

    encoded = jax.vmap(attend_row)(
        heads_first(query),
        heads_first(key),
        heads_first(value),
        jnp.pad(segment_ids, ((0, 0), (0, padding))),
    )
    return jnp.moveaxis(encoded, 1, 2)[:, :length]


def _splash_mask(spec: AttentionSpec, length: int):
    """Returns the mask and window as a lazy mask; segments are passed to the kernel apart."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if spec.reach is not None:
        left, right = spec.reach
        return splash.LocalMask(shape, (left, 0 if spec.causal else right), 0)
    return splash.CausalMask(shape) if spec.causal else splash.FullMask(shape)


def _splash_blocks(length: int):
    """Returns block sizes, all equal to the largest of `BLOCKS` that divides the row length."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(block for block in BLOCKS if length % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.BlockSizes(**{f"block_{name}": block for name in names})


def cudnn_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    mask: Bool[Array, "B L L"],
    spec: AttentionSpec,
) -> Float[Array, "B L N H"]:
    """Computes attention with cuDNN through `jax.nn`.

    No L x L probabilities are materialized, but the mask is, since cuDNN does not support segments.

    Args:
        query, key, value: queries already scaled.
        mask: the mask returned by `gemma_encoder.model.attention.attention_mask`.
        spec: attention spec without a soft cap, which cuDNN does not support.
    """
    assert spec.soft_cap is None
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=1.0, implementation="cudnn"
    )


def tokamax_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    mask: Bool[Array, "B L L"],
    spec: AttentionSpec,
) -> Float[Array, "B L N H"]:
    """Computes attention with tokamax's Triton flash attention, which supports the soft cap.

    Args:
        query, key, value: queries already scaled.
        mask: the mask returned by `gemma_encoder.model.attention.attention_mask`.
        spec: gives the soft cap.
    """
    import tokamax

    return tokamax.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        scale=1.0,
        logits_soft_cap=spec.soft_cap,
        implementation="triton",
    )
