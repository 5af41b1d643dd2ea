"""Low-rank adapters (LoRA, arXiv 2106.09685) on every matrix of a layer, made by qwix.

A matrix W [in, out] becomes W + (alpha / rank) · A B with A [in, rank] and B [rank, out]. B starts
at zero, so the adapted model initially computes the same as the base model. qwix adapts a single
layer; for layers that are stacked and scanned, `apply_lora` stacks the adapters likewise.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_encoder.model.config import LoraConfig

# Suffixes of parameter names: the matrix "query" has "query_lora_a" and "query_lora_b".
A = "_lora_a"
B = "_lora_b"


def is_adapter(path: str) -> bool:
    """Returns True if the parameter at `path` belongs to an adapter."""
    return path.endswith((A, B))


def apply_lora(
    make: Callable[[tuple[int, ...]], nnx.Module],
    inputs: tuple[Any, ...],
    lora: LoraConfig,
    rngs: nnx.Rngs,
    stack: tuple[int, ...],
) -> nnx.Module:
    """Builds a layer, or a stack of layers, with adapters.

    Args:
        make: builds the layer without adapters; called with () for one layer and with `stack`.
        inputs: example arguments for calling a single layer, which qwix traces.
        lora: rank and alpha.
        rngs: random number generators for initial values.
        stack: (n,) to stack the parameters of n layers, () for one layer.
    """
    import qwix

    provider = _provider_class()(module_path=".*", rank=lora.rank, alpha=lora.alpha)
    single = qwix.apply_lora_to_model(make(()), provider, *inputs, rngs=rngs)
    if not stack:
        return single
    graph, state = nnx.split(single)
    values = nnx.to_pure_dict(nnx.state(make(stack)))
    for name, leaf in nnx.to_pure_dict(state).items():
        if name.endswith(A):
            values[name] = _draw_stacked(rngs, leaf.shape, stack[0])
        elif name.endswith(B):
            values[name] = jnp.zeros((*stack, *leaf.shape), leaf.dtype)
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


def _draw_stacked(rngs: nnx.Rngs, shape: tuple[int, ...], num_layers: int) -> jax.Array:
    """Draws He-uniform values for each layer, [num_layers, *shape]."""
    draw = functools.partial(jax.nn.initializers.he_uniform(), shape=shape)
    return jax.vmap(draw)(jax.random.split(rngs.params(), num_layers))


@functools.cache
def _provider_class() -> type:
    """Returns qwix's provider, fixed so that it does not adapt products of two activations.

    Where qwix loses track of an array, such as inside a scan, it recognizes weights by shape, and a
    batch of keys or values may have the shape of a weight. A product of activations has a batch
    axis, one that is in both operands and in the result; a product with a weight has none.
    """
    import qwix

    class Provider(qwix.LoraProvider):
        def einsum(self, spec: str, *operands: jax.Array, **options: Any) -> jax.Array:
            """Computes einsum(spec, …), with an adapter if the second operand is a weight."""
            first, second, result = re.split(",|->", spec.replace(" ", ""))
            if set(first) & set(second) & set(result):
                return jnp.einsum(spec, *operands, **options)
            return super().einsum(spec, *operands, **options)

    return Provider


def cast_adapters(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Casts adapters to the dtype of the activations; layers cast their other parameters."""

    def cast(path, leaf):
        return leaf.astype(dtype) if is_adapter(str(path[0].key)) else leaf

    return jax.tree_util.tree_map_with_path(cast, state)


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
            leaf = leaf + (lora.alpha / lora.rank) * delta
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
