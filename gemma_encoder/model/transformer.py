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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.inputs.errors import unknown
from gemma_encoder.model.attention import choose_implementation, dot_product_attention, rotate
from gemma_encoder.model.config import ATTENTION, REMAT_POLICIES, LoraConfig, TransformerConfig
from gemma_encoder.model.layers import RMSNorm, dropout, flat_tokens, normal_param, spread_rows
from gemma_encoder.model.lora import INPUT_AXES, A, B, adapter_params
from gemma_encoder.model.products import platform_of, product


class ForwardContext(NamedTuple):
    """Inputs and options that all layers of a forward pass share.

    Attributes:
        segment_ids, positions: see `gemma_encoder.inputs.batch.Batch`.
        attention: the mask switch, "bidirectional" or "causal".
        attention_dropout, feed_forward_dropout: rates.
        implementation: attention implementation, as returned by `choose_implementation`.
        platform: as returned by `products.platform_of`.
        mesh: the mesh that rows and parameters are sharded over; None on one device.
    """

    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    attention: str
    attention_dropout: float
    feed_forward_dropout: float
    implementation: str = "xla"
    platform: str = ""
    mesh: Mesh | None = None


class Block(nnx.Module):
    """A transformer layer: attention and gated feed-forward, with norms before and after each.

        x = x + norm(attention(norm(x)))
        x = x + norm(feed_forward(norm(x)))

    Args:
        config: config of the transformer.
        kind: "local" or "global".
        rngs: random number generators for initial values.
        stack: (n,) to stack the parameters of n layers for a scan.
        lora: rank and alpha of the adapters of each matrix; none by default.
    """

    def __init__(
        self,
        config: TransformerConfig,
        kind: str,
        *,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        lora: LoraConfig | None = None,
    ):
        self.config = config
        self.layer_kind = kind
        self.lora = lora or LoraConfig()
        D = config.embed_dim
        F = config.hidden_dim
        N = config.num_heads
        K = config.num_kv_heads
        H = config.head_dim
        self.pre_attention_norm = RMSNorm(D, stack)
        self.query = normal_param(rngs, (*stack, D, N, H), D)
        self.key_value = normal_param(rngs, (*stack, D, 2, K, H), D)
        self.attention_out = normal_param(rngs, (*stack, N, H, D), N * H)
        self.query_norm = RMSNorm(H, stack) if config.use_qk_norm else None
        self.key_norm = RMSNorm(H, stack) if config.use_qk_norm else None
        self.post_attention_norm = RMSNorm(D, stack)
        self.pre_mlp_norm = RMSNorm(D, stack)
        self.gating = normal_param(rngs, (*stack, D, 2, F), D)
        self.linear = normal_param(rngs, (*stack, F, D), F)
        self.post_mlp_norm = RMSNorm(D, stack)
        if self.lora.rank:
            for name, inputs in INPUT_AXES.items():
                shape = getattr(self, name).shape[len(stack) :]
                down, up = adapter_params(rngs, shape, inputs, self.lora.rank, stack)
                setattr(self, name + A, down)
                setattr(self, name + B, up)

    def __call__(
        self, x: Float[Array, "B L D"], context: ForwardContext, key: Array | None
    ) -> Float[Array, "B L D"]:
        """Applies the layer to the residual stream; `key` is for dropout, None disables it."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        attended = self._attend(self.pre_attention_norm(x), context, attention_key)
        x += self.post_attention_norm(attended)
        output = self.post_mlp_norm(self._feed_forward(self.pre_mlp_norm(x), context))
        return x + dropout(output, context.feed_forward_dropout, mlp_key)

    def _feed_forward(
        self, x: Float[Array, "B L D"], context: ForwardContext
    ) -> Float[Array, "B L D"]:
        flat = flat_tokens(x)
        # Two products: with one, XLA on a CPU writes the concatenated gradient of gate and up
        # twice, in the layout of each product that uses it.
        gate, up = (self._multiply(flat, "gating", context, part=(half,)) for half in range(2))
        gated = jax.nn.gelu(gate, approximate=True) * up
        return self._multiply(gated, "linear", context).reshape(x.shape)

    def _multiply(
        self,
        x: Float[Array, "T ..."],
        name: str,
        context: ForwardContext,
        part: tuple[int, ...] = (),
    ) -> Float[Array, "T ..."]:
        """Multiplies activations by a matrix and its adapter, contracting all axes but the first.

        Heads and their dimensions are flattened to one axis: with two, XLA on a CPU transposes the
        gradient of the matrix.

        Args:
            x: axes after the first are the first axes of the matrix.
            name: name of the matrix.
            context: see `ForwardContext`.
            part: index of the part of the outputs that is computed; by default all.
        """
        flat = x.reshape(len(x), -1)
        multiply = functools.partial(product, platform=context.platform)
        weight = getattr(self, name)[...]
        weight = weight[(slice(None),) * (x.ndim - 1) + part]
        result = multiply(flat, weight.reshape(flat.shape[1], -1))
        if self.lora.rank:
            down, up = (getattr(self, name + suffix)[...] for suffix in (A, B))
            inner = multiply(flat, down.reshape(flat.shape[1], -1))
            up = up[(slice(None), *part)]
            result += self.lora.scale * multiply(inner, up.reshape(len(up), -1))
        return result.reshape(len(x), *weight.shape[x.ndim - 1 :])

    def _attend(
        self, x: Float[Array, "B L D"], context: ForwardContext, key: Array | None
    ) -> Float[Array, "B L D"]:
        query, keys, values = self.projections(x, context)
        encoded = dot_product_attention(
            query,
            keys,
            values,
            segment_ids=context.segment_ids,
            positions=context.positions,
            spec=self.config.attention_spec(self.layer_kind, context.attention),
            dropout_rate=context.attention_dropout,
            dropout_key=key,
            implementation=context.implementation,
            mesh=context.mesh,
        )
        output = self._multiply(flat_tokens(encoded), "attention_out", context)
        return output.reshape(x.shape)

    def projections(
        self, x: Float[Array, "B L D"], context: ForwardContext
    ) -> tuple[Float[Array, "B L N H"], Float[Array, "B L K H"], Float[Array, "B L K H"]]:
        """Computes queries, keys and values as attention takes them.

        Queries and keys are normalized, if the config asks for it, and rotated; queries are scaled.

        Args:
            x: residual stream after `pre_attention_norm`.
            context: gives the positions.
        """
        config = self.config
        rows, length = x.shape[:2]
        flat = flat_tokens(x)
        query = self._multiply(flat, "query", context)
        key_value = self._multiply(flat, "key_value", context)
        query, keys, values = (
            projected.reshape(rows, length, *projected.shape[1:])
            for projected in (query, key_value[:, 0], key_value[:, 1])
        )
        if config.use_qk_norm:
            query = self.query_norm(query)
            keys = self.key_norm(keys)
        if self.layer_kind == "global":
            rope = {"base": config.global_rope_base, "scale": config.global_rope_scale}
        else:
            rope = {"base": config.local_rope_base, "scale": 1.0}
        query = rotate(query, context.positions, **rope) * config.query_scale
        keys = rotate(keys, context.positions, **rope)
        return query, keys, values


class Transformer(nnx.Module):
    """A Gemma text transformer from tokens to hidden states, without output logits.

    Args:
        config: the architecture.
        rngs: random number generators for initial values.
        lora: low-rank adapters on the layers; none by default.
    """

    def __init__(
        self, config: TransformerConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None
    ):
        self.config = config
        self.lora = lora or LoraConfig()
        self.embedding = normal_param(rngs, (config.vocab_size, config.embed_dim), config.embed_dim)
        repeats = config.num_repeats
        stacked_kinds = config.pattern if repeats else ()
        self.blocks = nnx.List([self._make_layer(kind, rngs, (repeats,)) for kind in stacked_kinds])
        remainder_kinds = config.layer_kinds[repeats * len(config.pattern) :]
        self.remainder = nnx.List([self._make_layer(kind, rngs) for kind in remainder_kinds])
        self.final_norm = RMSNorm(config.embed_dim)

    def _make_layer(self, kind: str, rngs: nnx.Rngs, stack: tuple[int, ...] = ()) -> Block:
        return Block(self.config, kind, rngs=rngs, stack=stack, lora=self.lora)

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
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
            )
        context = ForwardContext(
            segment_ids=segment_ids,
            positions=positions,
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
        table = self.embedding[...]
        rows = table[tokens]
        # Gemma scales by √D in the dtype of the parameters: in bfloat16 the factor is rounded too.
        scale = jnp.sqrt(self.config.embed_dim).astype(table.dtype)
        return (rows * scale).astype(compute_dtype)

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
        return jax.checkpoint(function, policy=policies.dots_with_no_batch_dims_saveable)

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
