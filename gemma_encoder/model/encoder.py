"""The encoder: transformer, pooler and heads behind one call.

B rows, L length, S segments, D embed, C outputs of a head.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.model.config import EncoderConfig, TransformerConfig
from gemma_encoder.model.heads import HeadInputs, check_heads, head_class
from gemma_encoder.model.pooling import make_pooler
from gemma_encoder.model.transformer import Transformer, layer_index


class EncoderOutput(NamedTuple):
    """Encoder outputs for a batch. Pooled states and scores of empty slots are undefined."""

    hidden: Float[Array, "B L D"]
    pooled: Float[Array, "B S D"]
    scores: dict[str, Float[Array, "B S C"]]


class GemmaEncoder(nnx.Module):
    """A Gemma transformer with a mask switch, a pooler and one head per name in `config.heads`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        check_heads(config)
        self.config = config
        self.backbone = Transformer(config.transformer, rngs=rngs, lora=config.lora)
        self.pooler = make_pooler(config.pooling, config.transformer.embed_dim, rngs=rngs)
        self.heads = nnx.Dict(
            {
                name: head_class(head)(head, config, rngs=rngs)
                for name, head in sorted(config.heads.items())
            }
        )

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
        *,
        attention: str | None = None,
        dropout_key: Array | None = None,
        mesh: Mesh | None = None,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            tokens, segment_ids, positions: as in `gemma_encoder.inputs.batch.Batch`.
            num_segments: S.
            attention: overrides the config's mask switch for this call; with a language model's
                head it stays causal.
            dropout_key: draws dropout; None means none (evaluation).
            mesh: what rows and parameters are spread over; None on one device.
        """
        config = self.config
        attention = config.attention if attention is None else attention
        check_heads(config, attention)
        hidden = self.backbone(
            tokens,
            segment_ids,
            positions,
            attention=attention,
            compute_dtype=jnp.dtype(config.compute_dtype),
            attention_dropout=config.attention_dropout,
            feed_forward_dropout=config.feed_forward_dropout,
            dropout_key=dropout_key,
            remat=config.remat,
            implementation=config.attention_implementation,
            mesh=mesh,
        )
        pooled = self.pooler(hidden, segment_ids, positions, num_segments)
        inputs = HeadInputs(
            hidden,
            pooled,
            tokens,
            segment_ids,
            self.backbone.embedding[...],
            config.transformer.final_soft_cap,
            mesh,
        )
        scores = {name: head(inputs) for name, head in self.heads.items()}
        return EncoderOutput(hidden, pooled, scores)


class AbstractEncoder(NamedTuple):
    """An encoder taken apart: its structure, and the shapes of its parameters as a nested dict (no memory is used)."""

    graph: nnx.GraphDef
    shapes: dict

    def merge(self, parameters: dict) -> GemmaEncoder:
        """The encoder with these parameters (a nested dict of arrays, as in `shapes`)."""
        return nnx.merge(self.graph, parameter_state(parameters))


@functools.cache  # a run asks for it some five times, and taking an encoder with adapters apart is tracing
def abstract_encoder(config: EncoderConfig) -> AbstractEncoder:
    """The structure of the encoder that `config` describes; all who ask share it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: GemmaEncoder(config, rngs=nnx.Rngs(0))))
    return AbstractEncoder(graph, parameter_dict(state))


def initial_parameters(config: EncoderConfig, key: Array) -> dict:
    """Random parameters, float32, as a nested dict. Jit it with output shardings to fill a mesh."""
    return parameter_dict(nnx.state(GemmaEncoder(config, rngs=nnx.Rngs(key))))


def parameter_dict(state: nnx.State) -> dict:
    """A nested dict with string keys, for optimisers, checkpoints and rules on paths."""

    def plain(node):
        return (
            {str(key): plain(child) for key, child in node.items()}
            if isinstance(node, dict)
            else node
        )

    return plain(nnx.to_pure_dict(state))


def parameter_state(parameters: dict) -> nnx.State:
    """The nnx.State that `parameter_dict` took apart."""

    def variables(node):
        if isinstance(node, dict):
            return {
                int(key) if key.isdigit() else key: variables(child) for key, child in node.items()
            }
        return nnx.Param(node)

    return nnx.State(variables(parameters))


def parameter_paths(parameters: dict) -> dict[str, jax.Array]:
    """Each parameter by its path, e.g. "backbone/blocks/0/query"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def layer_paths(config: TransformerConfig, path: str) -> list[str]:
    """The paths of the single layers that the parameter at `path` holds, "backbone/layers/17/query", in the order in which they are stacked.

    A parameter outside the layers has one: its own.
    """
    found = re.fullmatch(r"backbone/(blocks|remainder)/(\d+)/(.*)", path)
    return (
        [
            f"backbone/layers/{layer}/{found[3]}"
            for layer in layer_index(config, found[1], int(found[2]))
        ]
        if found
        else [path]
    )


def select(parameters: dict, wanted: Callable[[str], bool], prefix: str = "") -> dict:
    """The nested dict of those parameters whose path is wanted."""
    result = {}
    for name, child in parameters.items():
        if isinstance(child, dict):
            if part := select(child, wanted, f"{prefix}{name}/"):
                result[name] = part
        elif wanted(f"{prefix}{name}"):
            result[name] = child
    return result


def merge_parameters(one: dict, other: dict) -> dict:
    """The union of two nested dicts that share no parameter."""
    both = {name: merge_parameters(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}
