"""Poolers: reduce the token states of each segment to one vector, in float32.

B rows, L length, S segments, D embed, P probes, N heads, H = D / N, E width after projection.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import POOLERS as POOLER_NAMES
from gemma_encoder.model.config import PoolingConfig
from gemma_encoder.model.layers import Linear, normal_param

MASKED = -1e30  # finite: the softmax of an empty segment stays finite


def segment_membership(segment_ids: Int[Array, "B L"], num_segments: int) -> Bool[Array, "B S L"]:
    """Returns a mask that is True where a token belongs to segment 1 … S."""
    segments = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)
    return segment_ids[:, None, :] == segments[None, :, None]


def _masked_mean(
    hidden: Float[Array, "B L D"], mask: Bool[Array, "B S L"]
) -> Float[Array, "B S D"]:
    """Averages the states where the mask is True; zero if it is False everywhere."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("BSL,BLD->BSD", weights, hidden)
    count = jnp.maximum(weights.sum(axis=-1), 1.0)
    return total / count[:, :, None]


def with_length_one(vectors: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Scales vectors to length 1; those of length 0 stay as they are."""
    squared_norm = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))


class Pooler(nnx.Module):
    """Base class of poolers. To add one, subclass it and call `register_pooler`.

    Args:
        config: config of the pooler; a registered pooler may use any of its fields.
        embed_dim: D, the width of token states and of the pooled vector.
        rngs: random number generators for initial values.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S D"]:
        """Returns one float32 vector per segment, computed from its own tokens only.

        Vectors of empty segments are undefined but must be finite.

        Args:
            hidden: token states; those of padding are arbitrary.
            segment_ids, positions: see `gemma_encoder.inputs.batch.Batch`.
            num_segments: S.
        """
        raise NotImplementedError


class AveragePooler(Pooler):
    """`mean`, `first_k` and `last_k`: average of all, the first k or the last k states.

    In a text shorter than k, all states are averaged. Has no parameters.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        del embed_dim, rngs
        self.config = config

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S D"]:
        """Returns one vector per segment, zero for an empty one."""
        hidden = hidden.astype(jnp.float32)
        return _masked_mean(hidden, self.pooled_tokens(segment_ids, positions, num_segments))

    def pooled_tokens(
        self, segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], num_segments: int
    ) -> Bool[Array, "B S L"]:
        """Returns a mask of the tokens that are averaged for each segment."""
        mask = segment_membership(segment_ids, num_segments)
        if self.config.name == "first_k":
            mask &= positions[:, None, :] < self.config.k
        elif self.config.name == "last_k":
            lengths = mask.sum(axis=-1, dtype=jnp.int32)
            mask &= positions[:, None, :] >= lengths[:, :, None] - self.config.k
        return mask


class QueryProbePooler(Pooler):
    """`attention_query`: learned probes attend over the token states.

    As in Set Transformer's PMA (arXiv 1810.00825, section 3.2), without its norms: for each probe,
    x = probe + attention(probe, states), then x + ReLU(W x + b). The vector is the mean over
    probes.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        N = config.heads
        H = embed_dim // config.heads
        self.probes = normal_param(rngs, (config.probes, N, H), 1)
        self.key = normal_param(rngs, (embed_dim, N, H), embed_dim)
        self.value = normal_param(rngs, (embed_dim, N, H), embed_dim)
        self.mlp = Linear(embed_dim, embed_dim, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S D"]:
        """Returns one vector per segment, undefined for an empty one."""
        del positions
        hidden = hidden.astype(jnp.float32)
        values = jnp.einsum("BLD,DNH->BLNH", hidden, self.value[...])
        weights = self.weights(hidden, segment_ids, num_segments)
        attended = jnp.einsum("BSPNL,BLNH->BSPNH", weights, values) + self.probes[...][None, None]
        x = attended.reshape(*attended.shape[:3], -1)
        return (x + jax.nn.relu(self.mlp(x))).mean(axis=2)

    def weights(
        self, hidden: Float[Array, "B L D"], segment_ids: Int[Array, "B L"], num_segments: int
    ) -> Float[Array, "B S P N L"]:
        """Returns attention weights of each probe over the tokens of each segment."""
        probes = self.probes[...]
        keys = jnp.einsum("BLD,DNH->BLNH", hidden.astype(jnp.float32), self.key[...])
        logits = jnp.einsum("PNH,BLNH->BPNL", probes, keys) * probes.shape[-1] ** -0.5
        members = segment_membership(segment_ids, num_segments)
        masked = jnp.where(members[:, :, None, None, :], logits[:, None], MASKED)
        return jax.nn.softmax(masked, axis=-1)


class KeyValueProbePooler(Pooler):
    """`attention_kv`: token states attend over learned latent keys and values.

    As in NV-Embed (arXiv 2405.17428, section 3.1): for each state h, x = h + attention(h, latents),
    then x + W₂ GELU(W₁ x). The vector is the mean over the tokens of the text.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        N = config.heads
        H = embed_dim // config.heads
        self.query = normal_param(rngs, (embed_dim, N, H), embed_dim)
        self.key = normal_param(rngs, (config.probes, N, H), 1)
        self.value = normal_param(rngs, (config.probes, N, H), 1)
        self.out = normal_param(rngs, (N, H, embed_dim), embed_dim)
        self.up = Linear(embed_dim, embed_dim, rngs=rngs)
        self.down = Linear(embed_dim, embed_dim, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S D"]:
        """Returns one vector per segment, zero for an empty one."""
        del positions
        hidden = hidden.astype(jnp.float32)
        attended = jnp.einsum("BLNP,PNH->BLNH", self.weights(hidden), self.value[...])
        x = hidden + jnp.einsum("BLNH,NHD->BLD", attended, self.out[...])
        x += self.down(jax.nn.gelu(self.up(x)))
        return _masked_mean(x, segment_membership(segment_ids, num_segments))

    def weights(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L N P"]:
        """Returns attention weights of each token over the latents."""
        queries = jnp.einsum("BLD,DNH->BLNH", hidden.astype(jnp.float32), self.query[...])
        logits = jnp.einsum("BLNH,PNH->BLNP", queries, self.key[...]) * queries.shape[-1] ** -0.5
        return jax.nn.softmax(logits, axis=-1)


class Projected(nnx.Module):
    """A pooler followed by linear layers without bias and, optionally, L2 normalization.

    Args:
        pooler: computes the pooled states.
        config: `projection` gives the widths of the layers, `normalize` the normalization.
        embed_dim: D, the width of the pooler's output.
        rngs: random number generators for initial values.
    """

    def __init__(
        self, pooler: nnx.Module, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs
    ):
        self.pooler = pooler
        self.normalize = config.normalize
        widths = (embed_dim, *config.projection)
        self.projection = nnx.List(
            [
                normal_param(rngs, (in_dim, out_dim), in_dim)
                for in_dim, out_dim in itertools.pairwise(widths)
            ]
        )

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S E"]:
        """Returns one vector per segment."""
        pooled = self.pooler(hidden, segment_ids, positions, num_segments)
        for kernel in self.projection:
            pooled = pooled @ kernel[...]
        return with_length_one(pooled) if self.normalize else pooled


POOLERS: dict[str, type[Pooler]] = {
    "first_k": AveragePooler,
    "last_k": AveragePooler,
    "mean": AveragePooler,
    "attention_kv": KeyValueProbePooler,
    "attention_query": QueryProbePooler,
}


def register_pooler(name: str, pooler: type[Pooler]) -> None:
    """Registers a pooler class, which `PoolingConfig.name` can then name.

    Raises:
        InputError: the name is already registered.
    """
    if name in POOLERS:
        raise InputError(f"pooler {name!r} is already registered")
    POOLERS[name] = pooler
    POOLER_NAMES.append(name)


def make_pooler(config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the pooler that `config` names, with its projection and normalization if it has any.

    Args:
        config: config of the pooler.
        embed_dim: D.
        rngs: random number generators for initial values.
    """
    pooler = POOLERS[config.name](config, embed_dim, rngs=rngs)
    if config.projection or config.normalize:
        return Projected(pooler, config, embed_dim, rngs=rngs)
    return pooler
