"""Heads: map the encoder's states to scores, in float32. `HEADS` is the registry by kind.

B rows, L length, S segments, D embed, E width of a pooled state, C outputs of a head, V vocab.
"""

import itertools
from typing import ClassVar, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.model.config import EncoderConfig, HeadConfig
from gemma_encoder.model.language_model import negative_log_likelihood
from gemma_encoder.model.layers import Linear
from gemma_encoder.model.word_weights import all_word_weights, largest_word_weights


class HeadInputs(NamedTuple):
    """Encoder states and inputs that a head may read.

    Attributes:
        hidden: token states after the final norm.
        pooled: one vector per segment.
        tokens, segment_ids: see `gemma_encoder.inputs.batch.Batch`.
        embedding: the embedding table of the transformer.
        final_soft_cap: soft cap of the transformer's output logits, or None.
        mesh: the mesh that rows are sharded over; None on one device.
        full: sparse heads return the weights of all words, for training.
    """

    hidden: Float[Array, "B L D"]
    pooled: Float[Array, "B S E"]
    tokens: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    embedding: Float[Array, "V D"]
    final_soft_cap: float | None
    mesh: Mesh | None
    full: bool = False


class Head(nnx.Module):
    """Base class of heads. To add a kind, subclass it and call `register_head`.

    Attributes:
        output: path of the `Linear` whose results are the scores, "" for none.

    Args:
        config: config of this head.
        encoder: config of the encoder that the head belongs to.
        rngs: random number generators for initial values.
    """

    output: ClassVar[str] = ""

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    @classmethod
    def check(cls, name: str, config: HeadConfig, attention: str) -> None:
        """Raises InputError if the head does not support the mask or its config is invalid.

        Args:
            name: name of the head, for the message.
            config: config of the head.
            attention: "bidirectional" or "causal".
        """

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S C"]:
        """Returns scores per segment; those of empty segments are undefined."""
        raise NotImplementedError


class MLPHead(Head):
    """MLP with GELU on the pooled state; linear if it has no hidden layers."""

    output = "out"

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        widths = (encoder.pooled_dim, *config.hidden_dims)
        self.hidden = nnx.List(
            [Linear(in_dim, out_dim, rngs=rngs) for in_dim, out_dim in itertools.pairwise(widths)]
        )
        self.out = Linear(widths[-1], config.outputs, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S C"]:
        """Returns class logits, or a score if C = 1."""
        x = inputs.pooled
        for layer in self.hidden:
            # The exact GELU, PyTorch's default, so that heads can be exported.
            x = jax.nn.gelu(layer(x), approximate=False)
        return self.out(x)


class LanguageModelHead(Head):
    """Negative log-likelihood of each text under tied embeddings. Has no parameters.

    The 2 outputs are the sum over the predicted tokens of a text, in nats, and their count.
    """

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        del config, encoder, rngs

    @classmethod
    def check(cls, name: str, config: HeadConfig, attention: str) -> None:
        """Raises InputError unless attention is causal and the head has 2 outputs."""
        if config.outputs != 2:
            raise InputError(
                f"language-model head {name!r} must have 2 outputs, got {config.outputs}"
            )
        if attention != "causal":
            raise InputError(
                f"language-model head {name!r} predicts each token from the tokens before it and "
                f"needs attention='causal', got {attention!r}"
            )

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S 2"]:
        """Returns the negative log-likelihood and the token count per segment."""
        return negative_log_likelihood(
            inputs.hidden,
            inputs.embedding,
            inputs.tokens,
            inputs.segment_ids,
            inputs.pooled.shape[1],
            soft_cap=inputs.final_soft_cap,
            mesh=inputs.mesh,
        )


class EmbeddingHead(Head):
    """The pooled state itself, as a vector to compare with others. Has no parameters."""

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        del rngs
        if config.outputs != encoder.pooled_dim:
            raise InputError(
                f"an embedding head has {encoder.pooled_dim} outputs, the width of a pooled state; "
                f"got {config.outputs}"
            )

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S E"]:
        """Returns the pooled states."""
        return inputs.pooled


class SparseHead(Head):
    """Weights of the words of the vocabulary, see `word_weights`. Has no parameters.

    The outputs are the largest weights of a text, then the ids of their words.
    """

    def __init__(self, config: HeadConfig, encoder: EncoderConfig, *, rngs: nnx.Rngs):
        del rngs
        if config.outputs > 2 * encoder.transformer.vocab_size:
            raise InputError(
                f"a sparse head has a weight and an id for at most {encoder.transformer.vocab_size}"
                f" words, the vocabulary; got {config.outputs} outputs"
            )
        self.words = config.outputs // 2

    @classmethod
    def check(cls, name: str, config: HeadConfig, attention: str) -> None:
        """Raises InputError unless the head has a weight and an id for each word."""
        if config.outputs % 2:
            raise InputError(
                f"sparse head {name!r} must have an even number of outputs, a weight and an id for "
                f"each word, got {config.outputs}"
            )

    def __call__(self, inputs: HeadInputs) -> Float[Array, "B S C"]:
        """Returns the outputs per segment; with `inputs.full`, the weights of all words."""
        arguments = (inputs.hidden, inputs.embedding, inputs.tokens, inputs.segment_ids)
        segments = inputs.pooled.shape[1]
        options = {"soft_cap": inputs.final_soft_cap, "mesh": inputs.mesh}
        if inputs.full:
            return all_word_weights(*arguments, segments, **options)
        return largest_word_weights(*arguments, segments, self.words, **options)


HEADS: dict[str, type[Head]] = {
    "embedding": EmbeddingHead,
    "mlp": MLPHead,
    "language_model": LanguageModelHead,
    "sparse": SparseHead,
}


def register_head(kind: str, head: type[Head]) -> None:
    """Registers a head class, which `HeadConfig.kind` can then name.

    Raises:
        InputError: the kind is already registered.
    """
    if kind in HEADS:
        raise InputError(f"head kind {kind!r} is already registered")
    HEADS[kind] = head


def head_class(config: HeadConfig) -> type[Head]:
    """Returns the class of a head; raises InputError if its kind is not registered."""
    if config.kind not in HEADS:
        raise unknown("head kind", config.kind, HEADS)
    return HEADS[config.kind]


def check_heads(config: EncoderConfig, attention: str | None = None) -> None:
    """Raises InputError if a head does not support the mask.

    Args:
        config: config of the encoder.
        attention: "bidirectional" or "causal"; by default the config's.
    """
    for name, head in config.heads.items():
        head_class(head).check(name, head, attention or config.attention)
