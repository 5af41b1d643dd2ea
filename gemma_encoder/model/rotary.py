"""Rotary positions (RoPE, arXiv 2104.09864): queries and keys are rotated by their positions.

The sines and cosines are the same for all layers of a kind, so a forward pass computes them once.
Computed in the layers, XLA on a CPU computes them again for each head, and in the backward pass for
each half of queries and keys.

B batch, L length, N heads, H head dim.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_encoder.model.config import TransformerConfig


class Rotation(NamedTuple):
    """Sines and cosines of the angles that tokens are rotated by, in float32."""

    sin: Float[Array, "B L H/2"]
    cos: Float[Array, "B L H/2"]


def rotations(config: TransformerConfig, positions: Int[Array, "B L"]) -> dict[str, Rotation]:
    """Returns the rotation of the tokens by kind of layer; kinds that rotate alike share arrays.

    Args:
        config: gives base and scale of each kind, and H.
        positions: position of each token in its own text.
    """
    settings = {
        "local": (config.local_rope_base, 1.0),
        "global": (config.global_rope_base, config.global_rope_scale),
    }
    distinct = {
        (base, scale): rotation_at(positions, config.head_dim, base=base, scale=scale)
        for base, scale in set(settings.values())
    }
    return {kind: distinct[setting] for kind, setting in settings.items()}


def rotation_at(
    positions: Int[Array, "B L"], head_dim: int, *, base: float, scale: float = 1.0
) -> Rotation:
    """Returns the rotation of tokens at the given positions.

    Args:
        positions: position of each token in its own text.
        head_dim: H.
        base: base of the geometric series of wavelengths.
        scale: positions are divided by it.
    """
    half = head_dim // 2
    timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None] / timescale[None, None, :] / scale
    return Rotation(jnp.sin(angle), jnp.cos(angle))


def rotate(x: Float[Array, "B L N H"], rotation: Rotation) -> Float[Array, "B L N H"]:
    """Rotates queries or keys in float32; returns the dtype of `x`.

    Dimension i is rotated against dimension i + H / 2, as in Gemma.
    """
    sin, cos = (table[:, :, None, :] for table in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
