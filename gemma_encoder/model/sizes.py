"""Model sizes: those of the Gemma 2 and 3 reports and the `gemma` package, and small ones."""

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import TransformerConfig


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

GEMMA_CONFIGS: dict[str, TransformerConfig] = {
    "gemma2_2b": _gemma2(26, 2304, 9216, 8, 4),
    "gemma2_9b": _gemma2(42, 3584, 14336, 16, 8),
    "gemma2_27b": _gemma2(46, 4608, 36864, 32, 16, head_dim=128, query_scale=(4608 / 32) ** -0.5),
    "gemma3_270m": _gemma3(18, 640, 2048, 4, 1, sliding_window=512, global_rope_scale=1.0),
    "gemma3_1b": _gemma3(26, 1152, 6912, 4, 1, sliding_window=512, global_rope_scale=1.0),
    "gemma3_4b": _gemma3(34, 2560, 10240, 8, 4),
    "gemma3_12b": _gemma3(48, 3840, 15360, 16, 8),
    "gemma3_27b": _gemma3(62, 5376, 21504, 32, 16, head_dim=128, query_scale=(5376 / 32) ** -0.5),
    # For tests and for training from random weights on a CPU. The 4 layers of gemma3_tiny are one
    # complete repetition of its pattern and a remainder.
    "gemma2_tiny": _gemma2(**_TINY),
    "gemma3_tiny": _gemma3(**_TINY, pattern=("local", "local", "global"), global_rope_scale=1.0),
    # For pretraining a decoder on a CPU, see experiments/pretrain_decoder.py.
    "gemma3_mini": _gemma3(
        **_TINY | {"hidden_dim": 640, "sliding_window": 64},
        pattern=("local", "global"),
        global_rope_scale=1.0,
    ),
}
SMALL = {"gemma2_tiny", "gemma3_tiny", "gemma3_mini"}  # sizes that use the small tokenizer


def register_size(name: str, config: TransformerConfig, *, small: bool = False) -> None:
    """Registers a size, which configs can then name as `model.size`.

    Args:
        name: must not be registered yet.
        config: config of the transformer.
        small: use the small tokenizer and float32, as the sizes for a CPU do.

    Raises:
        InputError: the name is already registered.
    """
    if name in GEMMA_CONFIGS:
        raise InputError(f"size {name!r} is already registered")
    GEMMA_CONFIGS[name] = config
    if small:
        SMALL.add(name)
