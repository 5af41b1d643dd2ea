"""What distinguishes one model from another: sizes, attention, pooling, heads, and how to run them.

Sizes are those of the Gemma 2 and Gemma 3 reports and of the `gemma` package's configurations.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import option

ATTENTION = ("bidirectional", "causal")
POOLERS = ("first_k", "last_k", "mean", "attention_kv", "attention_query")
COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots", "offload")
LAYER_KINDS = ("local", "global")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn", "tokamax")


class AttentionSpec(NamedTuple):
    """What the attention of a layer means, whatever computes it.

    Attributes:
        causal: no token sees a later one.
        reach: (left, right) tokens that a token reaches, or None for no limit.
        soft_cap: cap·tanh(logits / cap) on the logits, or None.
    """

    causal: bool
    reach: tuple[int, int] | None
    soft_cap: float | None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One Gemma text transformer.

    Attributes:
        num_layers: number of blocks.
        vocab_size: rows of the embedding table, V.
        embed_dim: width of the residual stream, D.
        hidden_dim: width of the feed-forward layer, F (gate and up projections have F columns each).
        num_heads: query heads, N.
        num_kv_heads: key and value heads, K.
        head_dim: width of a head, H.
        pattern: the kinds of layer, repeated down the stack; the last repetition may be cut short.
        sliding_window: tokens that a causal local layer sees, itself included.
        query_scale: what queries are multiplied by.
        attention_soft_cap: cap·tanh(logits / cap) on attention logits, or None.
        use_qk_norm: RMSNorm on queries and keys.
        local_rope_base, global_rope_base: base of the rotary frequencies by kind of layer.
        global_rope_scale: what positions are divided by on global layers.
        final_soft_cap: cap·tanh(logits / cap) on a language model's output logits, or None; no other head has any.
        bidirectional_reach: (left, right) tokens that a local layer reaches when attention is bidirectional;
            None means (sliding_window − 1, sliding_window − 1), the `gemma` package's meaning of the window.
    """

    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: tuple[str, ...]
    sliding_window: int
    query_scale: float
    attention_soft_cap: float | None
    use_qk_norm: bool
    local_rope_base: float = 10_000.0
    global_rope_base: float = 10_000.0
    global_rope_scale: float = 1.0
    bidirectional_reach: tuple[int, int] | None = None
    final_soft_cap: float | None = None

    def __post_init__(self):
        for field in (
            "num_layers",
            "vocab_size",
            "embed_dim",
            "hidden_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "sliding_window",
        ):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.pattern:
            raise InputError(
                "pattern must name at least one kind of layer, e.g. ('local', 'global')"
            )
        for field in ("attention_soft_cap", "final_soft_cap"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise InputError(
                    f"{field} must be above 0, or None for none, got {getattr(self, field)}"
                )
        reach = self.bidirectional_reach
        if reach is not None and (len(reach) != 2 or min(reach) < 0):
            raise InputError(
                f"bidirectional_reach must be (left, right), both at least 0, or None, got {reach}"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for kind in self.pattern:
            if kind not in LAYER_KINDS:
                raise unknown("layer kind", kind, LAYER_KINDS)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer, from the first to the last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def num_repeats(self) -> int:
        """How many whole repetitions of the pattern there are; the layers after them are the cut-short last group."""
        return self.num_layers // len(self.pattern)

    def reach(self, kind: str, attention: str) -> tuple[int, int] | None:
        """(left, right) tokens that a layer reaches, or None for no limit but the mask's."""
        if kind == "global":
            return None
        if attention == "causal":
            return (self.sliding_window - 1, 0)
        return self.bidirectional_reach or (self.sliding_window - 1, self.sliding_window - 1)

    def attention_spec(self, kind: str, attention: str) -> AttentionSpec:
        """What attention means on layers of a kind, under a setting of the mask switch."""
        return AttentionSpec(
            attention == "causal", self.reach(kind, attention), self.attention_soft_cap
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """The config that `to_dict` described, also after a trip through JSON."""
        return cls(**_tuples(values))

    @property
    def num_parameters(self) -> int:
        """Parameters of the transformer, embedding included."""
        attention = (
            2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
            + 2 * self.head_dim * self.use_qk_norm
        )
        block = attention + 3 * self.embed_dim * self.hidden_dim + 4 * self.embed_dim
        return self.num_layers * block + self.vocab_size * self.embed_dim + self.embed_dim

    def forward_flops(self, tokens: float, length: float) -> float:
        """Floating-point operations of a forward pass over so many tokens in texts of `length` on average.

        Two for each weight that multiplies a token (looking up an embedding multiplies nothing), and four for each query's element
        and key: scores, and the sum of values. Windows shorter than the texts are not taken off.
        """
        weights = self.num_layers * (
            2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
            + 3 * self.embed_dim * self.hidden_dim
        )
        return tokens * (
            2 * weights + 4 * self.num_layers * self.num_heads * self.head_dim * length
        )


def _gemma2(
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 256,
    **changes,
) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": num_layers,
            "vocab_size": 256_128,
            "embed_dim": embed_dim,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "pattern": ("local", "global"),
            "sliding_window": 4096,
            "query_scale": head_dim**-0.5,
            "attention_soft_cap": 50.0,
            "final_soft_cap": 30.0,
            "use_qk_norm": False,
            **changes,
        }
    )


def _gemma3(
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 256,
    **changes,
) -> TransformerConfig:
    return TransformerConfig(
        **{
            "num_layers": num_layers,
            "vocab_size": 262_144,
            "embed_dim": embed_dim,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "pattern": ("local",) * 5 + ("global",),
            "sliding_window": 1024,
            "query_scale": head_dim**-0.5,
            "attention_soft_cap": None,
            "use_qk_norm": True,
            "global_rope_base": 1_000_000.0,
            "global_rope_scale": 8.0,
            **changes,
        }
    )


_TINY = {
    "num_layers": 4,
    "embed_dim": 128,
    "hidden_dim": 512,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 8192,
    "sliding_window": 32,
}

GEMMA_CONFIGS: Mapping[str, TransformerConfig] = {
    "gemma2_2b": _gemma2(26, 2304, 9216, 8, 4),
    "gemma2_9b": _gemma2(42, 3584, 14336, 16, 8),
    "gemma2_27b": _gemma2(46, 4608, 36864, 32, 16, head_dim=128, query_scale=(4608 / 32) ** -0.5),
    "gemma3_270m": _gemma3(18, 640, 2048, 4, 1, sliding_window=512, global_rope_scale=1.0),
    "gemma3_1b": _gemma3(26, 1152, 6912, 4, 1, sliding_window=512, global_rope_scale=1.0),
    "gemma3_4b": _gemma3(34, 2560, 10240, 8, 4),
    "gemma3_12b": _gemma3(48, 3840, 15360, 16, 8),
    "gemma3_27b": _gemma3(62, 5376, 21504, 32, 16, head_dim=128, query_scale=(5376 / 32) ** -0.5),
    # For tests and for training from random weights on a CPU; the first repetition of gemma3_tiny's pattern is whole, the second cut short.
    "gemma2_tiny": _gemma2(**_TINY),
    "gemma3_tiny": _gemma3(**_TINY, pattern=("local", "local", "global"), global_rope_scale=1.0),
    # For pretraining a decoder on a CPU, see experiments/pretrain_decoder.py.
    "gemma3_mini": _gemma3(
        **_TINY | {"hidden_dim": 640, "sliding_window": 64},
        pattern=("local", "global"),
        global_rope_scale=1.0,
    ),
}
SMALL = (
    "gemma2_tiny",
    "gemma3_tiny",
    "gemma3_mini",
)  # sizes of our own, with the small tokenizer; the others are published


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    """Pooling: how the token states of a text become one vector."""

    name: str = option("mean", '"first_k", "last_k", "mean", "attention_kv" or "attention_query"')
    k: int = option(1, "states that first_k and last_k average (fewer where a text is shorter)")
    probes: int = option(
        1, "learned queries of attention_query, or latent keys and values of attention_kv"
    )
    heads: int = option(4, "attention heads of either")
    projection: tuple[int, ...] = option(
        (), "widths of linear layers without bias behind the pooler, as in EmbeddingGemma"
    )
    normalize: bool = option(False, "scale what comes out to length 1")

    def __post_init__(self):
        if self.name not in POOLERS:
            raise unknown("pooler", self.name, POOLERS)
        for field in ("k", "probes", "heads"):
            if getattr(self, field) < 1:
                raise InputError(f"pooling.{field} must be at least 1, got {getattr(self, field)}")
        if any(width < 1 for width in self.projection):
            raise InputError(
                f"pooling.projection must be widths of at least 1, got {self.projection}"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the layers' matrices."""

    rank: int = option(0, "of the adapters; 0 for none")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")

    def __post_init__(self):
        if self.rank < 0 or self.alpha <= 0:
            raise InputError(
                f"lora.rank must be at least 0 and lora.alpha positive, got {self.rank} and {self.alpha}"
            )


def check_causal(name: str, attention: str) -> None:
    """Raises InputError where a language head would see the tokens that it predicts."""
    if attention != "causal":
        raise InputError(
            f"head {name!r} is a language model's, which predicts each token from those before it: it needs attention='causal', got {attention!r}"
        )


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder: a transformer, a pooler and one head per task (or several tasks).

    Attributes:
        transformer: the backbone.
        heads: outputs of each head by its name.
        language_heads: those heads that have no parameters: they read the next token off the final hidden states by the embedding table, and
            give 2 outputs, see `gemma_encoder.model.language`. They need attention="causal".
        pooling: the pooler.
        head_hidden: widths of the hidden layers of every head's MLP.
        attention: the mask switch, "bidirectional" or "causal"; overridable per call.
        attention_dropout: on attention probabilities.
        feed_forward_dropout: on the feed-forward layer's output, before the residual is added.
        compute_dtype: of the transformer's activations: "float32" or "bfloat16".
        remat: what backward recomputes: "none"; "full" (every group of layers); "dots" (all but matrix products); or "offload"
            (as "full", what each group starts from kept in the host's memory).
        attention_implementation: "auto" (the fastest that can do what is asked), "xla" (everything, everywhere), "splash" (TPU),
            "cudnn" or "tokamax" (NVIDIA GPUs).
        lora: low-rank adapters, none by default.
    """

    transformer: TransformerConfig
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pooling: PoolingConfig = PoolingConfig()
    head_hidden: tuple[int, ...] = ()
    attention: str = "bidirectional"
    attention_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    attention_implementation: str = "auto"
    lora: LoraConfig = LoraConfig()
    language_heads: tuple[str, ...] = ()

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise unknown("attention", self.attention, ATTENTION)
        if self.compute_dtype == "float16":
            raise InputError(
                "float16 is refused: Gemma's activations overflow its range; use bfloat16, or float32 on a CPU"
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise unknown("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.remat not in REMAT_POLICIES:
            raise unknown("remat policy", self.remat, REMAT_POLICIES)
        if self.attention_implementation not in ATTENTION_IMPLEMENTATIONS:
            raise unknown(
                "attention_implementation", self.attention_implementation, ATTENTION_IMPLEMENTATIONS
            )
        for name, outputs in self.heads.items():
            if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
                raise InputError(
                    f"head name {name!r} must start with a letter and hold only letters, digits, '_', '-' and '.'"
                )
            if outputs < 1:
                raise InputError(f"head {name!r} must have at least 1 output, got {outputs}")
        for name in self.language_heads:
            if self.heads.get(name) != 2:
                raise InputError(
                    f"language head {name!r} must be among the heads, with 2 outputs, got {self.heads.get(name)}"
                )
            check_causal(name, self.attention)
        for field in ("attention_dropout", "feed_forward_dropout"):
            if not 0 <= getattr(self, field) < 1 or math.isnan(getattr(self, field)):
                raise InputError(
                    f"{field} must be at least 0 and below 1, got {getattr(self, field)}"
                )
        if self.transformer.embed_dim % self.pooling.heads and self.pooling.name.startswith(
            "attention"
        ):
            raise InputError(
                f"pooling.heads={self.pooling.heads} does not divide the model's width {self.transformer.embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of a pooled state: the model's, or that of the last projection."""
        return (self.transformer.embed_dim, *self.pooling.projection)[-1]

    def __hash__(self) -> int:
        return hash(
            (
                tuple(sorted(self.heads.items())),
                *(
                    getattr(self, field.name)
                    for field in dataclasses.fields(self)
                    if field.name != "heads"
                ),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"heads": dict(self.heads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderConfig":
        """The config that `to_dict` described, also after a trip through JSON."""
        values = _tuples(values)
        parts = {
            "transformer": TransformerConfig.from_dict(values.pop("transformer")),
            "pooling": PoolingConfig(**_tuples(values.pop("pooling"))),
            "lora": LoraConfig(**values.pop("lora", {})),
        }
        return cls(**parts, **values)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
