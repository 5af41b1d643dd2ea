"""Low-rank adapters (LoRA, arXiv 2106.09685) on every matrix of a layer, made by qwix.

A matrix W [in, out] becomes W + (alpha / rank) · A B with A [in, rank] and B [rank, out]; B starts at zero, so that the adapted model
starts as the model. qwix works on a single layer; what it makes is stacked here, as layers are.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_encoder.model.config import LoraConfig

A, B = "_lora_a", "_lora_b"


def is_adapter(path: str) -> bool:
    """Whether the parameter at that path is one of an adapter."""
    return path.endswith((A, B))


def apply_lora(
    make: Callable[[tuple[int, ...]], nnx.Module],
    inputs: tuple[Any, ...],
    lora: LoraConfig,
    rngs: nnx.Rngs,
    stack: tuple[int, ...],
) -> nnx.Module:
    """A layer with adapters.

    Args:
        make: the layer without them, given () or `stack`.
        inputs: arguments that a single layer can be called with.
        lora: rank and alpha.
        rngs: for the initial values.
        stack: (n,) when the layer holds the parameters of n layers.
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
            draw = jax.nn.initializers.he_uniform()
            values[name] = jax.vmap(lambda key, shape=leaf.shape, draw=draw: draw(key, shape))(
                jax.random.split(rngs.params(), stack[0])
            )
        elif name.endswith(B):
            values[name] = jnp.zeros((*stack, *leaf.shape), leaf.dtype)
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


@functools.cache
def _provider_class() -> type:
    """qwix's provider, without its taking an activation for a weight.

    Where it loses track of an array, such as inside a scan, it goes by the shape, and a batch of
    keys or values may have that of a weight. They differ in that a product of activations has an
    axis of its own in both operands and the result, which a product with a weight never has.
    """
    import qwix

    class Provider(qwix.LoraProvider):
        def einsum(self, spec: str, *operands: jax.Array, **options: Any) -> jax.Array:
            """einsum(spec, …), with an adapter where the second operand is a weight."""
            first, second, result = re.split(",|->", spec.replace(" ", ""))
            if set(first) & set(second) & set(result):
                return jnp.einsum(spec, *operands, **options)
            return super().einsum(spec, *operands, **options)

    return Provider


def cast_adapters(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Adapters in the dtype of the activations; a layer casts its other parameters itself."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if is_adapter(str(path[0].key)) else leaf, state
    )


def merge_lora(layer: dict, lora: LoraConfig, stacked: bool) -> dict:
    """The parameters of a layer, or of a stack of layers, with the adapters added to their matrices and gone."""

    def product(a, b):
        return jnp.tensordot(a, b, 1)

    folded = {}
    for name, leaf in layer.items():
        if is_adapter(name):
            continue
        if f"{name}{A}" in layer:
            delta = (jax.vmap(product) if stacked else product)(
                layer[f"{name}{A}"], layer[f"{name}{B}"]
            )
            leaf = leaf + (lora.alpha / lora.rank) * delta
        folded[name] = leaf
    return folded


def merge_backbone_lora(backbone: dict, lora: LoraConfig) -> dict:
    """The parameters of a transformer without adapters, which computes the same."""
    groups = {
        group: {
            number: merge_lora(layer, lora, group == "blocks")
            for number, layer in backbone[group].items()
        }
        for group in ("blocks", "remainder")
        if group in backbone
    }
    return {**backbone, **groups}
