"""Low-rank adapters (LoRA, arXiv 2106.09685) on every matrix of a layer.

A matrix W [in, out] becomes W + (alpha / rank) · A B with A [in, rank] and B [rank, out]. B starts
at zero, so the adapted model initially computes the same as the base model.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_encoder.model.config import LoraConfig

# Suffixes of parameter names: the matrix "query" has "query_lora_a" and "query_lora_b".
A = "_lora_a"
B = "_lora_b"
# The matrices of a layer that get adapters: how many of their first axes are contracted.
INPUT_AXES = {"query": 1, "key_value": 1, "attention_out": 2, "gating": 1, "linear": 1}


def is_adapter(path: str) -> bool:
    """Returns True if the parameter at `path` belongs to an adapter."""
    return path.endswith((A, B))


def adapter_params(
    rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int, rank: int, stack: tuple[int, ...]
) -> tuple[nnx.Param, nnx.Param]:
    """Draws the two matrices of an adapter, as qwix does: A He-uniform, B zero.

    Args:
        rngs: random number generators.
        shape: shape of the adapted matrix of one layer.
        inputs: how many of its first axes are contracted.
        rank: the adapter's rank.
        stack: (n,) to stack the adapters of n layers, () for one layer.

    Returns:
        A, [*stack, *shape[:inputs], rank], and B, [*stack, rank, *shape[inputs:]].
    """
    draw = functools.partial(jax.nn.initializers.he_uniform(), shape=(*shape[:inputs], rank))
    key = rngs.params()
    a = jax.vmap(draw)(jax.random.split(key, stack[0])) if stack else draw(key)
    return nnx.Param(a), nnx.Param(jnp.zeros((*stack, rank, *shape[inputs:])))


def merge_lora(layer: dict, lora: LoraConfig, stacked: bool) -> dict:
    """Adds the adapters of a layer to its matrices and returns the parameters without adapters.

    Args:
        layer: parameters by name.
        lora: rank and alpha.
        stacked: the parameters have a leading axis of layers.
    """

    def product(a, b):
        return jnp.tensordot(a, b, 1)

    if stacked:
        product = jax.vmap(product)
    merged = {}
    for name, leaf in layer.items():
        if is_adapter(name):
            continue
        if f"{name}{A}" in layer:
            delta = product(layer[f"{name}{A}"], layer[f"{name}{B}"])
            leaf = leaf + lora.scale * delta
        merged[name] = leaf
    return merged


def merge_backbone_lora(backbone: dict, lora: LoraConfig) -> dict:
    """Merges the adapters of a transformer into its matrices.

    The returned parameters have no adapters and compute the same function.
    """
    merged = dict(backbone)
    for group in ("blocks", "remainder"):
        if group in backbone:
            merged[group] = {
                position: merge_lora(layer, lora, stacked=group == "blocks")
                for position, layer in backbone[group].items()
            }
    return merged
