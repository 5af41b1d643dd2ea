"""The encoder: transformer, pooler and heads in one module, and its parameters as a nested dict.

B rows, L length, S segments, D embed, E width of a pooled state, C outputs of a head.
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
    """Encoder outputs for a batch. Pooled states and scores of empty slots are undefined.

    Attributes:
        hidden: token states after the final norm.
        pooled: one vector per segment, float32.
        scores: outputs of each head by its name, float32.
    """

    hidden: Float[Array, "B L D"]
    pooled: Float[Array, "B S E"]
    scores: dict[str, Float[Array, "B S C"]]


class GemmaEncoder(nnx.Module):
    """A Gemma transformer with a mask switch, a pooler and one head per name in `config.heads`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        check_heads(config)
        self.config = config
        self.backbone = Transformer(
            config.transformer,
            rngs=rngs,
            lora=config.lora,
            quantization=config.quantization,
            weights=config.weights,
        )
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
        full: bool = False,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            tokens, segment_ids, positions: see `gemma_encoder.inputs.batch.Batch`.
            num_segments: S.
            attention: overrides the config's mask switch for this call.
            dropout_key: random key for dropout; None disables dropout (evaluation).
            mesh: the mesh that rows and parameters are sharded over; None on one device.
            full: sparse heads return the weights of all words, [B, S, V], for training.

        Raises:
            InputError: a head does not support `attention`; language-model heads need "causal".
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
            self.backbone.embedding_table(),
            config.transformer.final_soft_cap,
            mesh,
            full,
        )
        scores = {name: head(inputs) for name, head in self.heads.items()}
        return EncoderOutput(hidden, pooled, scores)


class AbstractEncoder(NamedTuple):
    """The abstract encoder: its NNX GraphDef and its parameter shapes. Holds no arrays.

    Attributes:
        graph: the structure, with the config.
        shapes: nested dict of `jax.ShapeDtypeStruct`, with string keys.
    """

    graph: nnx.GraphDef
    shapes: dict

    def merge(self, parameters: dict) -> GemmaEncoder:
        """Returns the encoder with these parameters, a nested dict of arrays like `shapes`."""
        return nnx.merge(self.graph, parameter_state(parameters))


@functools.cache  # a run needs it about five times
def abstract_encoder(config: EncoderConfig) -> AbstractEncoder:
    """Returns the abstract encoder of a config; callers share one object per config."""
    graph, state = nnx.split(nnx.eval_shape(lambda: GemmaEncoder(config, rngs=nnx.Rngs(0))))
    return AbstractEncoder(graph, parameter_dict(state))


def initial_parameters(config: EncoderConfig, key: Array) -> dict:
    """Draws float32 parameters as a nested dict.

    To initialize directly on a mesh, jit this function with output shardings.
    """
    return parameter_dict(nnx.state(GemmaEncoder(config, rngs=nnx.Rngs(key))))


def parameter_dict(state: nnx.State) -> dict:
    """Converts a state to a nested dict with string keys.

    Optimizers, checkpoints and rules on parameter paths use this form.
    """

    def with_string_keys(node):
        if not isinstance(node, dict):
            return node
        return {str(key): with_string_keys(child) for key, child in node.items()}

    return with_string_keys(nnx.to_pure_dict(state))


def parameter_state(parameters: dict) -> nnx.State:
    """Converts a nested dict to an nnx.State, the inverse of `parameter_dict`."""

    def variables(node):
        if not isinstance(node, dict):
            return nnx.Param(node)
        return {int(key) if key.isdigit() else key: variables(child) for key, child in node.items()}

    return nnx.State(variables(parameters))


def parameter_paths(parameters: dict) -> dict[str, jax.Array]:
    """Flattens a nested dict to parameters by path, e.g. "backbone/blocks/0/query"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def layer_paths(config: TransformerConfig, path: str) -> list[str]:
    """Returns one path per layer for the parameter at `path`, in stacking order.

    "backbone/blocks/0/query" stacks several layers: "backbone/layers/0/query" and so on. A
    parameter outside the layers has one path, its own.
    """
    match = re.fullmatch(r"backbone/(blocks|remainder)/(\d+)/(.*)", path)
    if match is None:
        return [path]
    group, position, name = match.groups()
    layers = layer_index(config, group, int(position))
    return [f"backbone/layers/{layer}/{name}" for layer in layers]


def select(parameters: dict, predicate: Callable[[str], bool], prefix: str = "") -> dict:
    """Returns the nested dict of the parameters whose path satisfies the predicate.

    Args:
        parameters: nested dict.
        predicate: function of a path such as "backbone/blocks/0/query".
        prefix: prefix of the paths, ending in "/".
    """
    selected = {}
    for name, child in parameters.items():
        if not isinstance(child, dict):
            if predicate(f"{prefix}{name}"):
                selected[name] = child
            continue
        subtree = select(child, predicate, f"{prefix}{name}/")
        if subtree:
            selected[name] = subtree
    return selected


def merge_parameters(first: dict, second: dict) -> dict:
    """Returns the union of two nested dicts that share no parameter."""
    shared = first.keys() & second.keys()
    merged = {name: merge_parameters(first[name], second[name]) for name in shared}
    return {**first, **second, **merged}
