"""Heads: from the encoder's states to scores, in float32; one registry, keyed by a head's kind.

B rows, L length, S segments, D embed, E width of a pooled state, C outputs of a head, V vocab.
"""

import itertools
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.model.language_model import negative_log_likelihood
from gemma_encoder.model.layers import Linear


class HeadInputs(NamedTuple):
    """Encoder states that a head may read.

    Attributes:
        hidden: after the final norm.
        pooled: one vector per segment.
        tokens, segment_ids: as in `gemma_encoder.inputs.batch.Batch`.
        embedding: the table that tokens were looked up in.
        final_soft_cap: of the transformer's output logits, or None.
        mesh: what rows are spread over; None on one device.
    """

    hidden: Float[Array, "B L D"]
    pooled: Float[Array, "B S E"]
    tokens: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    embedding: Float[Array, "V D"]
    final_soft_cap: float | None
    mesh: Mesh | None


class Head(nnx.Module):
    """Base of all heads. Subclass it and `register_head` the class to add a kind of head.

    Args:
        config: of this head.
        encoder: of the encoder that it belongs to.
        rngs: for the initial values.
    """

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    @classmethod
    def check(cls, name: str, config: HeadConfig, attention: str) -> None:
        """Raises InputError where a head `name` of this config cannot work under a mask."""

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S C"]:
        """Scores of every segment; those of empty ones are undefined."""
        raise NotImplementedError


class MLPHead(Head):
    """Hidden layers with GELU on the pooled state, then linear to C outputs."""

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        widths = (encoder.pooled_dim, *config.hidden_dims)
        layers = [Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        self.hidden = nnx.List(layers)
        self.out = Linear(widths[-1], config.outputs, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S C"]:
        """Logits, or a score."""
        x = inputs.pooled
        for layer in self.hidden:
            # PyTorch's default GELU, so that heads can be exported.
            x = jax.nn.gelu(layer(x), approximate=False)
        return self.out(x)


class LanguageModelHead(Head):
    """Negative log-likelihood of each text by tied embeddings: no parameters of its own.

    The 2 outputs are the sum over a text's predicted tokens, in nats, and their number.
    """

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        del config, encoder, rngs

    @classmethod
    def check(cls, name: str, config: HeadConfig, attention: str) -> None:
        """A language model must not see the tokens that it predicts."""
        if config.outputs != 2:
            raise InputError(f"language head {name!r} has 2 outputs, got {config.outputs}")
        if attention != "causal":
            raise InputError(
                f"head {name!r} is a language model's, which predicts each token from those before "
                f"it: it needs attention='causal', got {attention!r}"
            )

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S 2"]:
        """Sum and number of tokens of every segment."""
        return negative_log_likelihood(
            inputs.hidden,
            inputs.embedding,
            inputs.tokens,
            inputs.segment_ids,
            inputs.pooled.shape[1],
            soft_cap=inputs.final_soft_cap,
            mesh=inputs.mesh,
        )


HEADS: dict[str, type[Head]] = {"mlp": MLPHead, "language_model": LanguageModelHead}


def register_head(kind: str, head: type[Head]) -> None:
    """Adds a kind of head; a name is registered once."""
    if kind in HEADS:
        raise InputError(f"head kind {kind!r} is already registered")
    HEADS[kind] = head


def head_class(config: HeadConfig) -> type[Head]:
    """The class of a head; raises InputError naming the nearest kind."""
    if config.kind not in HEADS:
        raise unknown("head kind", config.kind, HEADS)
    return HEADS[config.kind]


def check_heads(config: EncoderConfig, attention: str | None = None) -> None:
    """Raises InputError where a head cannot work under the mask, by default the config's own."""
    for name, head in config.heads.items():
        head_class(head).check(name, head, attention or config.attention)
