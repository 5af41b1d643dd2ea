"""Model configuration: transformer, attention, pooling, adapters and heads.

Importing this module does not import JAX.

C outputs of a head, D embed, F hidden, H head dim, K key-value heads, N query heads, V vocab.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_encoder.inputs.descriptions import check_mapping, from_fields
from gemma_encoder.inputs.errors import InputError, unknown
from gemma_encoder.inputs.options import check_at_least, option

ATTENTION = ("bidirectional", "causal")
# Names of poolers; `pooling.register_pooler` appends to the list. The classes are in
# `pooling.POOLERS`; the names are here so that a config can be read without JAX.
POOLERS = ["first_k", "last_k", "mean", "attention_kv", "attention_query"]
PROBE_POOLERS = ("attention_kv", "attention_query")  # split the model's width into `heads`
COMPUTE_DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # the dtype that is faster on the device, where an encoder is built or loaded
REMAT_POLICIES = ("none", "full", "dots", "offload")
MAX_TOKENS = 1 << 20  # of a row; Gemma 3 reads texts of 131,072
MAX_WINDOW = 1 << 30  # in tokens; positions are 32-bit integers
QUANTIZATIONS = ("none", "int8")
WEIGHTS = ("float32", "bfloat16", "int8")
LAYER_KINDS = ("local", "global")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn", "tokamax")


class AttentionSpec(NamedTuple):
    """Attention semantics of a layer, independent of the kernel that computes it.

    Attributes:
        causal: tokens do not attend to later tokens.
        reach: the window (left, right): tokens attended to before and after a token, itself
            excluded; None for no limit.
        soft_cap: cap · tanh(logits / cap) on the logits, or None.
    """

    causal: bool
    reach: tuple[int, int] | None
    soft_cap: float | None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a Gemma text transformer.

    Attributes:
        num_layers: number of blocks.
        vocab_size: rows of the embedding table, V.
        embed_dim: width of the residual stream, D.
        hidden_dim: width of the feed-forward layer, F; gate and up projections have F columns each.
        num_heads: query heads, N.
        num_kv_heads: key and value heads, K.
        head_dim: width of a head, H.
        pattern: kinds of layer, "local" or "global", repeated down the stack; the last repetition
            may be partial.
        sliding_window: tokens that a causal local layer attends to, the token itself included.
        query_scale: factor on queries.
        attention_soft_cap: cap · tanh(logits / cap) on attention logits, or None.
        use_qk_norm: apply RMSNorm to queries and keys.
        local_rope_base, global_rope_base: base of the rotary wavelengths, by kind of layer.
        global_rope_scale: divisor of positions on global layers.
        bidirectional_reach: window (left, right) of local layers when attention is bidirectional;
            None means (sliding_window − 1, sliding_window − 1), as in the `gemma` package.
        final_soft_cap: cap · tanh(logits / cap) on the output logits of a language-model head, or
            None; other heads have no cap.
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
        sizes = ("num_layers", "vocab_size", "embed_dim", "hidden_dim", "num_heads")
        sizes += ("num_kv_heads", "head_dim", "sliding_window")
        check_at_least("", self, sizes, 1)
        check_at_least("", self, ("sliding_window",), 1, below=MAX_WINDOW)
        if not self.pattern:
            raise InputError(
                "pattern must name at least one kind of layer, e.g. ('local', 'global')"
            )
        for field in ("attention_soft_cap", "final_soft_cap"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise InputError(
                    f"{field} must be above 0, or None for none, got {getattr(self, field)}"
                )
        scales = ("local_rope_base", "global_rope_base", "global_rope_scale", "query_scale")
        for field in scales:
            if not 0 < getattr(self, field) < math.inf:
                raise InputError(f"{field} must be above 0 and finite, got {getattr(self, field)}")
        reach = self.bidirectional_reach
        if reach is not None and not (
            len(reach) == 2 and min(reach) >= 0 and max(reach) < MAX_WINDOW
        ):
            raise InputError(
                f"bidirectional_reach must be (left, right), both at least 0 and below {MAX_WINDOW}"
                f", or None, got {reach}"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads "
                "evenly"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for kind in self.pattern:
            if kind not in LAYER_KINDS:
                raise unknown("layer kind", kind, LAYER_KINDS)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def num_repeats(self) -> int:
        """The number of complete repetitions of the pattern, without the remainder layers."""
        return self.num_layers // len(self.pattern)

    def reach(self, kind: str, attention: str) -> tuple[int, int] | None:
        """Returns the window (left, right) of a layer, or None for no limit.

        Args:
            kind: "local" or "global".
            attention: "bidirectional" or "causal".
        """
        if kind == "global":
            return None
        if attention == "causal":
            return (self.sliding_window - 1, 0)
        return self.bidirectional_reach or (self.sliding_window - 1, self.sliding_window - 1)

    def attention_spec(self, kind: str, attention: str) -> AttentionSpec:
        """Returns the attention semantics of layers of a kind; arguments as in `reach`."""
        return AttentionSpec(
            causal=attention == "causal",
            reach=self.reach(kind, attention),
            soft_cap=self.attention_soft_cap,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable description; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Restores a config from `to_dict`, also after a round trip through JSON."""
        return from_fields(cls, values, "a transformer")

    @property
    def num_parameters(self) -> int:
        """The number of parameters, embedding included."""
        attention = (
            2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
            + 2 * self.head_dim * self.use_qk_norm
        )
        block = attention + 3 * self.embed_dim * self.hidden_dim + 4 * self.embed_dim
        return self.num_layers * block + self.vocab_size * self.embed_dim + self.embed_dim

    def forward_flops(self, tokens: float, length: float) -> float:
        """Estimates the floating-point operations of a forward pass.

        Counts two per token and weight of a matrix product (an embedding lookup is none), and four
        per key and element of a query: logits and weighted values. Windows shorter than the texts
        are ignored.

        Args:
            tokens: number of tokens.
            length: mean length of a text, in tokens.
        """
        weights = self.num_layers * (
            2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
            + 3 * self.embed_dim * self.hidden_dim
        )
        return tokens * (
            2 * weights + 4 * self.num_layers * self.num_heads * self.head_dim * length
        )


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    """Pooling of the token states of a text into one vector."""

    name: str = option("mean", f"one of {', '.join(POOLERS)}, or a registered pooler of your own")
    k: int = option(1, "token states that first_k and last_k average (fewer for shorter texts)")
    probes: int = option(
        1, "learned queries of attention_query, or latent keys and values of attention_kv"
    )
    heads: int = option(4, "attention heads of attention_query and attention_kv")
    projection: tuple[int, ...] = option(
        (), "widths of linear layers without bias after the pooler, as in EmbeddingGemma"
    )
    normalize: bool = option(False, "scale the pooled vector to length 1")

    def __post_init__(self):
        if self.name not in POOLERS:
            raise unknown("pooler", self.name, POOLERS)
        check_at_least("pooling", self, ("k", "probes", "heads"), 1)
        if any(width < 1 for width in self.projection):
            raise InputError(
                f"pooling.projection must be widths of at least 1, got {self.projection}"
            )

    def output_dim(self, embed_dim: int) -> int:
        """Returns the width of a pooled state: that of the last projection, or else `embed_dim`."""
        return (embed_dim, *self.projection)[-1]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on the matrices of the layers."""

    rank: int = option(0, "rank of the adapters; 0 for none")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")

    def __post_init__(self):
        if self.rank < 0 or not 0 < self.alpha < math.inf:
            raise InputError(
                "lora.rank must be at least 0 and lora.alpha positive, "
                f"got {self.rank} and {self.alpha}"
            )

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head, which maps the encoder's states to scores.

    Attributes:
        outputs: width of the scores, C.
        kind: key of `gemma_encoder.model.heads.HEADS`: "mlp" and "embedding" read the pooled
            state, "language_model" and "sparse" the hidden states and the embedding table.
        hidden_dims: widths of an MLP's hidden layers; empty for a linear head.
    """

    outputs: int
    kind: str = "mlp"
    hidden_dims: tuple[int, ...] = ()

    def __post_init__(self):
        if self.outputs < 1 or any(width < 1 for width in self.hidden_dims):
            raise InputError(
                f"a head has at least 1 output and hidden layers of width 1, got {self.outputs} "
                f"and {self.hidden_dims}"
            )


def check_compute_dtype(compute_dtype: str, valid: Sequence[str] = COMPUTE_DTYPES) -> None:
    """Raises InputError for a dtype of activations that is not valid."""
    if compute_dtype == "float16":
        raise InputError(
            "float16 is refused: Gemma's activations overflow its range; use bfloat16, or "
            "float32 on a CPU"
        )
    if compute_dtype not in valid:
        raise unknown("compute_dtype", compute_dtype, valid)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder: a transformer, a pooler and heads, each serving one or more tasks.

    Attributes:
        transformer: the backbone.
        heads: heads by name; an integer stands for a linear head with that many outputs.
        pooling: the pooler.
        attention: the mask switch, "bidirectional" or "causal"; can be overridden per call.
        attention_dropout: rate on attention probabilities.
        feed_forward_dropout: rate on the output of the feed-forward layer, before the residual is
            added.
        compute_dtype: dtype of the transformer's activations: "float32" or "bfloat16".
        remat: rematerialization in the backward pass: "none"; "full" (recompute each group of
            layers); "dots" (recompute all but matrix products); or "offload" (as "full", with the
            input of each group stored in host memory).
        attention_implementation: "auto" (the fastest that supports the config), "xla" (supports
            everything), "splash" (TPU), "cudnn" or "tokamax" (NVIDIA GPUs).
        lora: low-rank adapters; none by default.
        quantization: "int8" multiplies the matrices of the layers in int8, see
            `gemma_encoder.model.quantization`, and rounds embeddings to int8; "none" does neither.
        weights: dtype in which these matrices and the embedding table are stored: "float32",
            "bfloat16" or, with quantization "int8", "int8". Only "float32" can be trained.
    """

    transformer: TransformerConfig
    heads: Mapping[str, HeadConfig] = dataclasses.field(default_factory=dict)
    pooling: PoolingConfig = PoolingConfig()
    attention: str = "bidirectional"
    attention_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    attention_implementation: str = "auto"
    lora: LoraConfig = LoraConfig()
    quantization: str = "none"
    weights: str = "float32"

    def __post_init__(self):
        heads = {
            name: HeadConfig(head) if isinstance(head, int) else head
            for name, head in self.heads.items()
        }
        object.__setattr__(self, "heads", heads)
        check_compute_dtype(self.compute_dtype)
        for name, value, valid in (
            ("attention", self.attention, ATTENTION),
            ("remat policy", self.remat, REMAT_POLICIES),
            (
                "attention_implementation",
                self.attention_implementation,
                ATTENTION_IMPLEMENTATIONS,
            ),
            ("quantization", self.quantization, QUANTIZATIONS),
            ("dtype of weights", self.weights, WEIGHTS),
        ):
            if value not in valid:
                raise unknown(name, value, valid)
        for name in self.heads:
            if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
                raise InputError(
                    f"head name {name!r} must start with a letter or '_' and contain only letters, "
                    "digits, '_', '-' and '.'"
                )
        check_at_least("", self, ("attention_dropout", "feed_forward_dropout"), 0, below=1)
        self._check_quantization()
        uneven = self.transformer.embed_dim % self.pooling.heads
        if uneven and self.pooling.name in PROBE_POOLERS:
            raise InputError(
                f"pooling.heads={self.pooling.heads} does not divide the model's width "
                f"{self.transformer.embed_dim}"
            )

    def _check_quantization(self) -> None:
        fits = {"float32": QUANTIZATIONS, "bfloat16": ("none",), "int8": ("int8",)}
        if self.quantization not in fits[self.weights]:
            raise InputError(
                f"quantization={self.quantization!r} and weights={self.weights!r} contradict each "
                "other; int8 weights are for quantization='int8', and bfloat16 for 'none'"
            )
        if self.lora.rank and (self.quantization, self.weights) != ("none", "float32"):
            raise InputError(
                f"quantization={self.quantization!r} and weights={self.weights!r} are not for "
                "adapters (lora.rank); merge them first: gemma-encoder export, and use the export"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of a pooled state: that of the last projection, or else of the transformer."""
        return self.pooling.output_dim(self.transformer.embed_dim)

    def __hash__(self) -> int:
        fields = (field.name for field in dataclasses.fields(self) if field.name != "heads")
        return hash((tuple(sorted(self.heads.items())), *(getattr(self, name) for name in fields)))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable description; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderConfig":
        """Restores a config from `to_dict`, also after a round trip through JSON.

        Raises:
            InputError: a field is unknown to this version, or one is missing.
        """
        check_mapping(values, "an encoder", "transformer", "pooling", "heads")
        check_mapping(values["heads"], "the heads")
        parts = {
            "transformer": TransformerConfig.from_dict(values["transformer"]),
            "pooling": from_fields(PoolingConfig, values["pooling"], "a pooler"),
            "lora": from_fields(LoraConfig, values.get("lora", {}), "adapters"),
            "heads": {
                name: from_fields(HeadConfig, head, "a head")
                for name, head in values["heads"].items()
            },
        }
        return from_fields(cls, {**values, **parts}, "an encoder")
