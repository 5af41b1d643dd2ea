"""Task heads: an MLP, then linear to the task's outputs, in float32."""

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from gemma_encoder.model.layers import Linear


class Head(nnx.Module):
    """Hidden layers with GELU, then linear to C outputs.

    Args:
        embed_dim: width of the pooled states, D.
        hidden: widths of the hidden layers, none for a linear head.
        num_outputs: C: classes, or 1 for regression and ranking.
    """

    def __init__(
        self, embed_dim: int, hidden: tuple[int, ...], num_outputs: int, *, rngs: nnx.Rngs
    ):
        widths = (embed_dim, *hidden)
        self.hidden = nnx.List([Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.out = Linear(widths[-1], num_outputs, rngs=rngs)

    def __call__(self, pooled: Float[Array, "B S D"]) -> Float[Array, "B S C"]:
        """Logits, or a score."""
        for layer in self.hidden:
            pooled = jax.nn.gelu(
                layer(pooled), approximate=False
            )  # PyTorch's default, so that heads can be exported
        return self.out(pooled)
