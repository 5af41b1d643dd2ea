"""The Gemma 2 and Gemma 3 text transformer.

Layers are scanned over the repeating local/global pattern, so compile time does not grow with depth: `blocks[j]` holds the
parameters of layers j, j + P, j + 2P, … stacked along their first axis (P is the pattern's length), and `rest` holds the layers
of the cut-short last group, one by one.

B batch, L length, T = B · L, D embed, F hidden, N query heads, K kv heads, H head dim, V vocab.
"""

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
from gemma_encoder.model.lora import apply_lora, cast_adapters


class ForwardContext(NamedTuple):
    """The inputs and options that all blocks of one forward pass share."""

    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    attention: str
    attention_dropout: float
    feed_forward_dropout: float
    implementation: str = "xla"
    mesh: Mesh | None = None


class Block(nnx.Module):
    """One layer: attention and feed-forward, each normed before and after, the norm after applied before the residual is added.

    Args:
        config: the transformer that it belongs to.
        kind: "local" or "global".
        rngs: for the initial values.
        stack: (n,) when the block holds the parameters of n layers, to be scanned over.
        adapted: whether it gets adapters. qwix finds the matrices to adapt by their shapes, so each is then multiplied with as it is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        kind: str,
        *,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        adapted: bool = False,
    ):
        self.config, self.layer_kind, self.adapted = config, kind, adapted
        D, F, N, K, H = (
            config.embed_dim,
            config.hidden_dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
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

    def __call__(
        self, x: Float[Array, "B L D"], context: ForwardContext, key: Array | None
    ) -> Float[Array, "B L D"]:
        """Applies the layer. `key` draws its dropout; None means none."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        x += self.post_attention_norm(
            self._attend(self.pre_attention_norm(x), context, attention_key)
        )
        gate, up = self._gate_and_up(flat_tokens(self.pre_mlp_norm(x)))
        output = jnp.einsum(
            "TF,FD->TD", jax.nn.gelu(gate, approximate=True) * up, self.linear[...].astype(x.dtype)
        )
        return x + dropout(
            self.post_mlp_norm(output.reshape(x.shape)), context.feed_forward_dropout, mlp_key
        )

    def _gate_and_up(
        self, flat: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
        weight = self.gating[...].astype(flat.dtype)
        if (
            self.adapted
        ):  # split goes backward as a concatenation; indices would as a sum of padded halves
            gate, up = jnp.split(jnp.einsum("TD,DCF->TCF", flat, weight), 2, axis=1)
            return gate[:, 0], up[:, 0]
        # Two products: XLA on a CPU would write the concatenation of their gradients twice, laid out for either product that takes it.
        return flat @ weight[:, 0], flat @ weight[:, 1]

    def _over_heads(
        self, spec: str, x: Float[Array, "T ..."], weight: Float[Array, "..."]
    ) -> Float[Array, "T ..."]:
        """einsum(spec, x, weight). Heads and what is in them are taken as one axis: over two, XLA on a CPU transposes a weight's gradient."""
        weight = weight.astype(x.dtype)
        if self.adapted:
            return jnp.einsum(spec, x, weight)
        flat = x.reshape(len(x), -1)
        return (flat @ weight.reshape(flat.shape[1], -1)).reshape(
            len(x), *weight.shape[x.ndim - 1 :]
        )

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
        return self._over_heads(
            "TNH,NHD->TD", flat_tokens(encoded), self.attention_out[...]
        ).reshape(x.shape)

    def projections(
        self, x: Float[Array, "B L D"], context: ForwardContext
    ) -> tuple[Float[Array, "B L N H"], Float[Array, "B L K H"], Float[Array, "B L K H"]]:
        """Queries (scaled), keys and values of the normed residual stream, as attention takes them: normed and rotated."""
        config, flat, rows = self.config, flat_tokens(x), x.shape[:2]
        query = self._over_heads("TD,DNH->TNH", flat, self.query[...])
        key_value = jnp.einsum("TD,DCKH->TCKH", flat, self.key_value[...].astype(x.dtype))
        query, keys, values = (
            part.reshape(*rows, *part.shape[1:])
            for part in (query, key_value[:, 0], key_value[:, 1])
        )
        if config.use_qk_norm:
            query, keys = self.query_norm(query), self.key_norm(keys)
        is_global = self.layer_kind == "global"
        base, scale = (
            (config.global_rope_base, config.global_rope_scale)
            if is_global
            else (config.local_rope_base, 1.0)
        )
        return (
            rotate(query, context.positions, base=base, scale=scale) * config.query_scale,
            rotate(keys, context.positions, base=base, scale=scale),
            values,
        )


class Transformer(nnx.Module):
    """A Gemma text transformer without its output embedding: tokens to hidden states.

    Args:
        config: its sizes.
        rngs: for the initial values.
        lora: low-rank adapters on its layers; none by default.
    """

    def __init__(
        self, config: TransformerConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None
    ):
        self.config, self.lora = config, lora or LoraConfig()

        def layer(kind: str, stack: tuple[int, ...] = ()) -> nnx.Module:
            def make(stack):
                return Block(config, kind, rngs=rngs, stack=stack, adapted=bool(self.lora.rank))

            if not self.lora.rank:
                return make(stack)
            one = jnp.zeros((1, 1), jnp.int32)
            example = (
                jnp.zeros((1, 1, config.embed_dim)),
                ForwardContext(one + 1, one, "bidirectional", 0.0, 0.0),
                None,
            )
            return apply_lora(make, example, self.lora, rngs, stack)

        self.embedding = normal_param(rngs, (config.vocab_size, config.embed_dim), config.embed_dim)
        repeats = config.num_repeats
        self.blocks = nnx.List(
            [layer(kind, (repeats,)) for kind in config.pattern] if repeats else []
        )
        self.remainder = nnx.List(
            [layer(kind) for kind in config.layer_kinds[repeats * len(config.pattern) :]]
        )
        self.final_norm = RMSNorm(config.embed_dim)

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
        """Hidden states after the final norm.

        Args:
            tokens: ids below the vocabulary's size.
            segment_ids: which text of its row a token belongs to, 0 where padding; by default one
                text a row.
            positions: of each token in its own text; by default counted from the row's start.
            attention: "bidirectional" or "causal".
            compute_dtype: of the activations; parameters are cast as they are used.
            attention_dropout, feed_forward_dropout: rates, used only with a key.
            dropout_key: layer i draws from fold_in(dropout_key, i).
            remat: one of `REMAT_POLICIES`.
            implementation: of attention, as `choose_implementation` knows them.
            mesh: what rows and parameters are spread over, where attention is a kernel of one
                device.
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
            segment_ids,
            positions,
            attention,
            attention_dropout,
            feed_forward_dropout,
            self._implementation(
                implementation,
                compute_dtype,
                dropout_rate=0.0 if dropout_key is None else attention_dropout,
                mesh=mesh,
            ),
            mesh,
        )
        x = spread_rows(self._embed(tokens, compute_dtype), mesh)
        return self.final_norm(self._run_layers(x, context, dropout_key, remat))

    def _implementation(
        self, name: str, compute_dtype: jnp.dtype, *, dropout_rate: float, mesh: Mesh | None
    ) -> str:
        return choose_implementation(
            name,
            platform=jax.default_backend() if mesh is None else mesh.devices.flat[0].platform,
            dtype=compute_dtype,
            head_dim=self.config.head_dim,
            soft_cap=self.config.attention_soft_cap,
            dropout_rate=dropout_rate,
        )

    def _embed(self, tokens: Int[Array, "B L"], compute_dtype: jnp.dtype) -> Float[Array, "B L D"]:
        table = self.embedding[...]
        rows = table[tokens]
        # Gemma scales by √D in the parameters' dtype: in bfloat16 the factor itself is rounded.
        scale = jnp.sqrt(self.config.embed_dim).astype(table.dtype)
        return (rows * scale).astype(compute_dtype)

    def _run_layers(
        self,
        x: Float[Array, "B L D"],
        context: ForwardContext,
        dropout_key: Array | None,
        remat: str,
    ) -> Float[Array, "B L D"]:
        """Scans over the repeated pattern, then applies the layers of the cut-short last one."""
        period, repeats = len(self.config.pattern), self.config.num_repeats

        def layer_key(index) -> Array | None:
            return None if dropout_key is None else jax.random.fold_in(dropout_key, index)

        def apply(graph, state, x, key):
            state = cast_adapters(state, x.dtype) if self.lora.rank else state
            return spread_rows(nnx.merge(graph, state)(x, context, key), context.mesh)

        if repeats:
            graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

            def repeat(x, inputs):
                states, index = inputs
                for offset, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                    x = apply(graph, state, x, layer_key(index * period + offset))
                return x, None

            x, _ = jax.lax.scan(_rematerialized(repeat, remat), x, (states, jnp.arange(repeats)))
        for offset, block in enumerate(self.remainder):
            graph, state = nnx.split(block)

            def one(x, state, key, graph=graph):
                return apply(graph, state, x, key)

            key = layer_key(repeats * period + offset)
            x = _rematerialized(one, remat)(x, state, key)
        return x


def _rematerialized(function, policy: str):
    """`function`, whose first argument is the residual stream, under a remat policy: what backward keeps and what it computes again."""
    if policy == "none":
        return function
    if policy != "offload":
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        return jax.checkpoint(function, policy=policies[policy])
    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(
        lambda x, *rest: function(checkpoint_name(x, "residual"), *rest), policy=to_host
    )


def layer_index(config: TransformerConfig, group: str, position: int) -> range:
    """The layers whose parameters lie under `blocks/<position>` (stacked, in this order) or `remainder/<position>` (a single one)."""
    period, whole = len(config.pattern), config.num_repeats * len(config.pattern)
    return (
        range(position, whole, period)
        if group == "blocks"
        else range(whole + position, whole + position + 1)
    )
