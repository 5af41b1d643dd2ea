"""A layer of the Gemma 2 and Gemma 3 text transformer: attention and feed-forward.

B batch, L length, T = B · L tokens, D embed, F hidden, N query heads, K key-value heads,
H head dim; I, O widths.
"""

from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemma_encoder.model import quantization as int8
from gemma_encoder.model.attention import dot_product_attention
from gemma_encoder.model.config import LoraConfig, TransformerConfig
from gemma_encoder.model.layers import RMSNorm, dropout, flat_tokens, gated_gelu, normal_param
from gemma_encoder.model.lora import INPUT_AXES, A, B, adapter_params
from gemma_encoder.model.products import PRODUCT, product
from gemma_encoder.model.rotary import Rotation, rotate


class ForwardContext(NamedTuple):
    """Inputs and options that all layers of a forward pass share.

    Attributes:
        segment_ids, positions: see `gemma_encoder.inputs.batch.Batch`.
        rotations: rotation of the tokens by kind of layer, as returned by `rotary.rotations`.
        attention: the mask switch, "bidirectional" or "causal".
        attention_dropout, feed_forward_dropout: rates.
        implementation: attention implementation, as returned by `choose_implementation`.
        platform: as returned by `products.platform_of`.
        mesh: the mesh that rows and parameters are sharded over; None on one device.
    """

    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    rotations: dict[str, Rotation]
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
        quantization, weights: see `gemma_encoder.model.config.EncoderConfig`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        kind: str,
        *,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        lora: LoraConfig | None = None,
        quantization: str = "none",
        weights: str = "float32",
    ):
        self.config = config
        self.layer_kind = kind
        self.lora = lora or LoraConfig()
        self.quantization = quantization
        self.weights = weights
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
        axes = {name: int8.matrix_axes(name, bool(stack)) for name in INPUT_AXES}
        int8.store(self, axes, weights)
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
        return self._multiply(gated_gelu(gate, up), "linear", context).reshape(x.shape)

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
        in_axes = x.ndim - 1
        out_shape = getattr(self, name).shape[in_axes + len(part) :]
        if self.weights == "int8":
            weight = self._int8_matrix(name).part(in_axes, part).flat(flat.shape[1])
        else:
            weight = getattr(self, name)[...][(slice(None),) * in_axes + part]
            weight = weight.reshape(flat.shape[1], -1)
        result = self._product(flat, weight, context)
        if self.lora.rank:
            down, up = (getattr(self, name + suffix)[...] for suffix in (A, B))
            inner = product(flat, down.reshape(flat.shape[1], -1), context.platform)
            up = up[(slice(None), *part)]
            up = up.reshape(len(up), -1)
            result += self.lora.scale * product(inner, up, context.platform)
        # Rematerialization saves results by this name: it cannot see a product that has a gradient
        # of its own, and of one that is computed in float32 only the rounded result is needed.
        result = checkpoint_name(result, PRODUCT)
        return result.reshape(len(x), *out_shape)

    def _product(
        self,
        x: Float[Array, "T I"],
        weight: Float[Array, "I O"] | int8.Int8Matrix,
        context: ForwardContext,
    ) -> Float[Array, "T O"]:
        if self.quantization == "int8":
            return int8.int8_product(x, weight, context.platform)
        return product(x, weight, context.platform)

    def _int8_matrix(self, name: str) -> int8.Int8Matrix:
        """Returns a matrix that is stored in int8."""
        parameters = (getattr(self, f"{name}{suffix}") for suffix in ("", int8.SCALE, int8.SUM))
        return int8.Int8Matrix(*(parameter[...] for parameter in parameters))

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
            context: gives the rotations.
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
        rotation = context.rotations[self.layer_kind]
        query = rotate(query, rotation) * config.query_scale
        return query, rotate(keys, rotation), values
