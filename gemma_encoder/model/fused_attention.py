"""Attention kernels of well-kept libraries: splash attention on TPU, cuDNN and tokamax on NVIDIA GPUs.

None of them drops out probabilities. Each says what stands in its way, so nothing that was asked is dropped in silence.

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

PLATFORMS = {
    "splash": "tpu",
    "cudnn": "gpu",
    "tokamax": "gpu",
}  # in the order in which "auto" asks them
LANES = 128  # of a TPU's vector registers: splash attention's blocks are multiples of it
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
    """Why an implementation cannot do what is asked, or None."""
    if platform != PLATFORMS[name]:
        return f"it needs a {PLATFORMS[name].upper()}, this is a {platform.upper()}"
    if dropout_rate:
        return "it has no dropout on attention probabilities"
    if name == "splash":
        return (
            f"it needs a head dim that is a multiple of {LANES}, not {head_dim}"
            if head_dim % LANES
            else None
        )
    if dtype != jnp.bfloat16:
        return f"it needs bfloat16, not {dtype}"
    if name == "cudnn":
        if soft_cap is not None:
            return "it has no soft cap"
        return (
            f"it needs a head dim of at most 256 that is a multiple of 8, not {head_dim}"
            if head_dim > 256 or head_dim % 8
            else None
        )
    return None if importlib.util.find_spec("tokamax") else "tokamax is not installed"


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
    """JAX's splash attention for TPUs: blocks that are masked as a whole are never touched.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.

    Args:
        query, key, value: queries scaled; heads may be grouped.
        segment_ids: 0 where padding.
        spec: what is seen, and the soft cap.
        mesh: rows are sharded over `data` and `fsdp`, heads over `tensor` where it divides them;
            None on one device.
        interpret: run the kernel's semantics on a CPU, slowly, for tests.
    """
    on_one_device = functools.partial(_splash_on_one_device, spec=spec, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return on_one_device(query, key, value, segment_ids)
    shards = mesh.shape["tensor"]
    heads, kv_heads = query.shape[2], key.shape[2]
    divides = heads % shards == 0 and (kv_heads % shards == 0 or kv_heads == 1)
    query_axis = "tensor" if divides else None
    rows = ("data", "fsdp")
    of_query = P(rows, None, query_axis, None)
    of_key = P(rows, None, query_axis if kv_heads > 1 else None, None)
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(of_query, of_key, of_key, P(rows, None)),
        out_specs=of_query,
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
    fill = -length % LANES
    size = length + fill
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_splash_mask(spec, size)] * heads),
        block_sizes=_splash_blocks(size),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=spec.soft_cap,
        interpret=interpret,
    )
    heads_first = [
        jnp.moveaxis(jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))), 2, 1)
        for x in (query, key, value)
    ]
    ids = jnp.pad(segment_ids, ((0, 0), (0, fill)))
    encoded = jax.vmap(
        lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))
    )(*heads_first, ids)
    return jnp.moveaxis(encoded, 1, 2)[:, :length]


def _splash_mask(spec: AttentionSpec, size: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if spec.reach is not None:
        left, right = spec.reach
        return splash.LocalMask((size, size), (left, 0 if spec.causal else right), 0)
    return splash.CausalMask((size, size)) if spec.causal else splash.FullMask((size, size))


def _splash_blocks(size: int):
    """Blocks of one size everywhere: the largest that divides the row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(block for block in BLOCKS if size % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.BlockSizes(**{f"block_{name}": block for name in names})


def cudnn_attention(
    query: Float[Array, "B L N H"],
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K H"],
    mask: Bool[Array, "B L L"],
    spec: AttentionSpec,
) -> Float[Array, "B L N H"]:
    """cuDNN's fused attention through `jax.nn`: no L x L probabilities, but a mask of that size, since it knows no segments."""
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
    """tokamax's Triton flash attention, which has a soft cap; the mask is given whole."""
    import tokamax

    attention = functools.partial(tokamax.dot_product_attention, scale=1.0, implementation="triton")
    return attention(query, key, value, mask=mask[:, None], logits_soft_cap=spec.soft_cap)
