"""The Gemma 2 and Gemma 3 text transformer.

Layers are scanned over the repeating local/global pattern, so compile time does not grow with
depth. With a pattern of P layers, `blocks[j]` holds the parameters of layers j, j + P, j + 2P, …
stacked along their first axis. `remainder` holds the layers of the incomplete last repetition, one
by one.

B batch, L length, T = B · L tokens, D embed, F hidden, N query heads, K key-value heads,
H head dim, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.inputs.errors import unknown
from gemma_encoder.model import quantization as int8
from gemma_encoder.model.attention import choose_implementation
from gemma_encoder.model.block import Block, ForwardContext
from gemma_encoder.model.config import ATTENTION, REMAT_POLICIES, LoraConfig, TransformerConfig
from gemma_encoder.model.layers import RMSNorm, normal_param, spread_rows
from gemma_encoder.model.products import PRODUCT, platform_of
from gemma_encoder.model.rotary import rotations


class Transformer(nnx.Module):
    """A Gemma text transformer from tokens to hidden states, without output logits.

    Args:
        config: the architecture.
        rngs: random number generators for initial values.
        lora: low-rank adapters on the layers; none by default.
        quantization, weights: see `gemma_encoder.model.config.EncoderConfig`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        quantization: str = "none",
        weights: str = "float32",
    ):
        self.config = config
        self.lora = lora or LoraConfig()
        self.quantization = quantization
        self.weights = weights
        self.embedding = normal_param(rngs, (config.vocab_size, config.embed_dim), config.embed_dim)
        int8.store(self, {"embedding": (1,)}, weights)
        repeats = config.num_repeats
        stacked_kinds = config.pattern if repeats else ()
        self.blocks = nnx.List([self._make_layer(kind, rngs, (repeats,)) for kind in stacked_kinds])
        remainder_kinds = config.layer_kinds[repeats * len(config.pattern) :]
        self.remainder = nnx.List([self._make_layer(kind, rngs) for kind in remainder_kinds])
        self.final_norm = RMSNorm(config.embed_dim)

    def _make_layer(self, kind: str, rngs: nnx.Rngs, stack: tuple[int, ...] = ()) -> Block:
        return Block(
            self.config,
            kind,
            rngs=rngs,
            stack=stack,
            lora=self.lora,
            quantization=self.quantization,
            weights=self.weights,
        )

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        *,
        attention: str = "bidirectional",
        compute_dtype: jnp.dtype = jnp.float32,
        attention_dropout: float = 0.0,
        feed_forward_dropout: float = 0.0,
        dropout_key: Array | None = None,
        remat: str = "none",
        implementation: str = "auto",
        mesh: Mesh | None = None,
    ) -> Float[Array, "B L D"]:
        """Computes hidden states after the final norm.

        Args:
            tokens: ids below V.
            segment_ids: text of the row that a token belongs to, from 1, and 0 for padding; by
                default one text per row.
            positions: position of each token in its own text, from 0; by default its column in the
                row.
            attention: "bidirectional" or "causal".
            compute_dtype: dtype of the activations; parameters are cast where they are used.
            attention_dropout, feed_forward_dropout: rates, used only with a key.
            dropout_key: layer i uses fold_in(dropout_key, i); None disables dropout.
            remat: one of `REMAT_POLICIES`.
            implementation: attention implementation, one of `ATTENTION_IMPLEMENTATIONS`.
            mesh: the mesh that rows and parameters are sharded over; None on one device.
        """
        if attention not in ATTENTION:
            raise unknown("attention", attention, ATTENTION)
        if remat not in REMAT_POLICIES:
            raise unknown("remat policy", remat, REMAT_POLICIES)
        if self.quantization == "int8":
            int8.check_platform(platform_of(mesh))
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        context = ForwardContext(
            segment_ids=segment_ids,
            positions=positions,
            rotations=rotations(self.config, positions),
            attention=attention,
            attention_dropout=attention_dropout,
            feed_forward_dropout=feed_forward_dropout,
            implementation=self._implementation(
                implementation,
                compute_dtype,
                dropout_rate=0.0 if dropout_key is None else attention_dropout,
                mesh=mesh,
            ),
            platform=platform_of(mesh),
            mesh=mesh,
        )
        x = spread_rows(self._embed(tokens, compute_dtype), mesh)
        return self.final_norm(self._run_layers(x, context, dropout_key, remat))

    def _implementation(
        self, name: str, compute_dtype: jnp.dtype, *, dropout_rate: float, mesh: Mesh | None
    ) -> str:
        return choose_implementation(
            name,
            platform=platform_of(mesh),
            dtype=compute_dtype,
            head_dim=self.config.head_dim,
            soft_cap=self.config.attention_soft_cap,
            dropout_rate=dropout_rate,
        )

    def _embed(self, tokens: Int[Array, "B L"], compute_dtype: jnp.dtype) -> Float[Array, "B L D"]:
        rows = self.embedding[...][tokens]
        if self.weights == "int8":
            rows = int8.dequantize(int8.Quantized(rows, self.embedding_scale[...][tokens, None]))
        elif self.weights != "float32":
            rows = rows.astype(jnp.float32)  # rounded float32 parameters
        elif self.quantization == "int8":
            rows = int8.rounded_rows(rows)
        # Gemma scales by √D in the dtype of the parameters: in bfloat16 the factor is rounded too.
        scale = jnp.sqrt(self.config.embed_dim).astype(rows.dtype)
        return (rows * scale).astype(compute_dtype)

    def embedding_table(self) -> Float[Array, "V D"]:
        """Returns the embedding table for heads, with the values that tokens are embedded with."""
        table = self.embedding[...]
        if self.weights == "int8":
            return int8.dequantize(int8.Quantized(table, self.embedding_scale[...][:, None]))
        return int8.rounded_rows(table) if self.quantization == "int8" else table

    def _run_layers(
        self,
        x: Float[Array, "B L D"],
        context: ForwardContext,
        dropout_key: Array | None,
        remat: str,
    ) -> Float[Array, "B L D"]:
        """Scans over the repeated pattern, then applies the remainder layers one by one."""
        period = len(self.config.pattern)
        repeats = self.config.num_repeats

        def layer_key(layer) -> Array | None:
            return None if dropout_key is None else jax.random.fold_in(dropout_key, layer)

        def apply_layer(graph, x, state, key):
            return spread_rows(nnx.merge(graph, state)(x, context, key), context.mesh)

        if repeats:
            graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

            def apply_pattern(x, inputs):
                states, repeat = inputs
                for offset, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                    x = apply_layer(graph, x, state, layer_key(repeat * period + offset))
                return x, None

            step = _with_remat(apply_pattern, remat)
            x, _ = jax.lax.scan(step, x, (states, jnp.arange(repeats)))
        for offset, block in enumerate(self.remainder):
            graph, state = nnx.split(block)
            step = _with_remat(functools.partial(apply_layer, graph), remat)
            x = step(x, state, layer_key(repeats * period + offset))
        return x


def _with_remat(function: Callable, policy: str) -> Callable:
    """Applies a rematerialization policy.

    Args:
        function: its first argument is the residual stream.
        policy: one of `REMAT_POLICIES`.
    """
    if policy == "none":
        return function
    if policy == "full":
        return jax.checkpoint(function)
    policies = jax.checkpoint_policies
    if policy == "dots":
        return jax.checkpoint(function, policy=policies.save_only_these_names(PRODUCT))

    def named(x, *inputs):
        return function(checkpoint_name(x, "residual"), *inputs)

    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(named, policy=offload)


def layer_index(config: TransformerConfig, group: str, position: int) -> range:
    """Returns the layers whose parameters are at a position of a group, in stacking order.

    Args:
        config: config of the transformer.
        group: "blocks", where a position stacks several layers, or "remainder", where it is one.
        position: index into the group, as in the path "backbone/blocks/<position>/query".
    """
    period = len(config.pattern)
    num_stacked = config.num_repeats * period
    if group == "blocks":
        return range(position, num_stacked, period)
    return range(num_stacked + position, num_stacked + position + 1)
