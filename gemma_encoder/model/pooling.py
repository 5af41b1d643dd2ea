"""Poolers: the token states of each text become one vector. All are aware of segments and run in float32.

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

MASKED = -1e30


def segment_membership(segment_ids: Int[Array, "B L"], num_segments: int) -> Bool[Array, "B S L"]:
    """Which tokens belong to each segment 1 … S."""
    return (
        segment_ids[:, None, :]
        == jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)[None, :, None]
    )


def _average(hidden: Float[Array, "B L D"], chosen: Bool[Array, "B S L"]) -> Float[Array, "B S D"]:
    """The mean of the chosen states; zero where none is chosen."""
    weights = chosen.astype(jnp.float32)
    return (
        jnp.einsum("BSL,BLD->BSD", weights, hidden)
        / jnp.maximum(weights.sum(axis=-1), 1.0)[:, :, None]
    )


class Pooler(nnx.Module):
    """Base of all poolers. Subclass it and `register_pooler` the class to add one.

    Args:
        config: of the pooler; one that is registered may read any of its fields.
        embed_dim: D, width of a state and of what comes out.
        rngs: for the initial values.
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
        """One vector per segment in float32, of its own tokens alone; finite for an empty one."""
        raise NotImplementedError


class AveragePooler(Pooler):
    """Average of states: `mean` of all, `first_k` and `last_k` of the first or last K.

    Of a text that is shorter than K, all states are averaged. No parameters.
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
        """One vector per segment, zero for an empty one."""
        return _average(
            hidden.astype(jnp.float32), self.chosen(segment_ids, positions, num_segments)
        )

    def chosen(
        self, segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], num_segments: int
    ) -> Bool[Array, "B S L"]:
        """The tokens whose states are averaged."""
        members = segment_membership(segment_ids, num_segments)
        if self.config.name == "first_k":
            members &= positions[:, None, :] < self.config.k
        elif self.config.name == "last_k":
            lengths = members.sum(axis=-1, dtype=jnp.int32)
            members &= positions[:, None, :] >= lengths[:, :, None] - self.config.k
        return members


class QueryProbePooler(Pooler):
    """`attention_query`: learned probes attend over the token states, as in Set Transformer's PMA (arXiv 1810.00825, section 3.2).

    Each probe gives probe + attention(probe, states), then x + ReLU(W x + b); the text's vector is the mean over probes.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        N, H = config.heads, embed_dim // config.heads
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
        """One vector per segment; that of an empty one means nothing."""
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
        """How much each probe attends to each token of a segment."""
        probes = self.probes[...]
        keys = jnp.einsum("BLD,DNH->BLNH", hidden.astype(jnp.float32), self.key[...])
        logits = jnp.einsum("PNH,BLNH->BPNL", probes, keys) * probes.shape[-1] ** -0.5
        members = segment_membership(segment_ids, num_segments)
        return jax.nn.softmax(
            jnp.where(members[:, :, None, None, :], logits[:, None], MASKED), axis=-1
        )


class KeyValueProbePooler(Pooler):
    """`attention_kv`: token states attend over learned latent keys and values, as NV-Embed does (arXiv 2405.17428, section 3.1).

    Each state gives h + attention(h, latents), then x + W₂ GELU(W₁ x); the text's vector is the mean over its tokens.
    """

    def __init__(self, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs):
        N, H = config.heads, embed_dim // config.heads
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
        """One vector per segment, zero for an empty one."""
        del positions
        hidden = hidden.astype(jnp.float32)
        attended = jnp.einsum("BLNP,PNH->BLNH", self.weights(hidden), self.value[...])
        x = hidden + jnp.einsum("BLNH,NHD->BLD", attended, self.out[...])
        x += self.down(jax.nn.gelu(self.up(x)))
        return _average(x, segment_membership(segment_ids, num_segments))

    def weights(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L N P"]:
        """How much each token attends to each latent."""
        queries = jnp.einsum("BLD,DNH->BLNH", hidden.astype(jnp.float32), self.query[...])
        return jax.nn.softmax(
            jnp.einsum("BLNH,PNH->BLNP", queries, self.key[...]) * queries.shape[-1] ** -0.5,
            axis=-1,
        )


class Projected(nnx.Module):
    """A pooler followed by linear layers without bias, and by scaling to length 1 if asked.

    Args:
        pooler: gives the pooled states.
        config: names the widths.
        embed_dim: width of what the pooler gives.
        rngs: for the initial values.
    """

    def __init__(
        self, pooler: nnx.Module, config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs
    ):
        self.pooler, self.normalize = pooler, config.normalize
        self.projection = nnx.List(
            [
                normal_param(rngs, (a, b), a)
                for a, b in itertools.pairwise((embed_dim, *config.projection))
            ]
        )

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        num_segments: int,
    ) -> Float[Array, "B S E"]:
        """One vector per segment."""
        pooled = self.pooler(hidden, segment_ids, positions, num_segments)
        for kernel in self.projection:
            pooled = pooled @ kernel[...]
        if self.normalize:
            pooled *= jax.lax.rsqrt(
                jnp.maximum(jnp.sum(pooled * pooled, axis=-1, keepdims=True), 1e-24)
            )
        return pooled


POOLERS: dict[str, type[Pooler]] = {
    "first_k": AveragePooler,
    "last_k": AveragePooler,
    "mean": AveragePooler,
    "attention_kv": KeyValueProbePooler,
    "attention_query": QueryProbePooler,
}


def register_pooler(name: str, pooler: type[Pooler]) -> None:
    """Adds a pooler, which `PoolingConfig.name` may then name; a name is registered once."""
    if name in POOLERS:
        raise InputError(f"pooler {name!r} is already registered")
    POOLERS[name] = pooler
    POOLER_NAMES.append(name)


def make_pooler(config: PoolingConfig, embed_dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The pooler that `config` names, with its projection."""
    pooler = POOLERS[config.name](config, embed_dim, rngs=rngs)
    return (
        Projected(pooler, config, embed_dim, rngs=rngs)
        if config.projection or config.normalize
        else pooler
    )
