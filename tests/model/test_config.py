"""Configs: published sizes, JSON round trips, and every refusal."""

import dataclasses
import json
import math

import jax
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import abstract_encoder
from gemma_encoder.model.sizes import GEMMA_CONFIGS

# Layers, vocabulary, D, F, query heads, key-value heads, head dim, window, query scale, rope scale
# of global layers; parameters without the embedding, and of the embedding. Gemma 2's counts are
# those of table 2 of its report. Gemma 3's are rounded to millions in its report (698, 3,209,
# 10,759, 25,600; 302, 675, 1,012, 1,416) and do not include the vision encoder.
PUBLISHED = {
    "gemma2_2b": (
        26,
        256_128,
        2304,
        9216,
        8,
        4,
        256,
        4096,
        256**-0.5,
        1.0,
        2_024_517_888,
        590_118_912,
    ),
    "gemma2_9b": (
        42,
        256_128,
        3584,
        14336,
        16,
        8,
        256,
        4096,
        256**-0.5,
        1.0,
        8_324_201_984,
        917_962_752,
    ),
    "gemma2_27b": (
        46,
        256_128,
        4608,
        36864,
        32,
        16,
        128,
        4096,
        144**-0.5,
        1.0,
        26_047_480_320,
        1_180_237_824,
    ),
    "gemma3_270m": (18, 262_144, 640, 2048, 4, 1, 256, 512, 256**-0.5, 1.0, None, 167_772_160),
    "gemma3_1b": (26, 262_144, 1152, 6912, 4, 1, 256, 512, 256**-0.5, 1.0, 698e6, 301_989_888),
    "gemma3_4b": (34, 262_144, 2560, 10240, 8, 4, 256, 1024, 256**-0.5, 8.0, 3209e6, 671_088_640),
    "gemma3_12b": (
        48,
        262_144,
        3840,
        15360,
        16,
        8,
        256,
        1024,
        256**-0.5,
        8.0,
        10_759e6,
        1_006_632_960,
    ),
    "gemma3_27b": (
        62,
        262_144,
        5376,
        21504,
        32,
        16,
        128,
        1024,
        168**-0.5,
        8.0,
        25_600e6,
        1_409_286_144,
    ),
}
LAST_LAYERS = {
    "gemma2_2b": ("local", "global"),
    "gemma2_9b": ("local", "global"),
    "gemma2_27b": ("local", "global"),
    "gemma3_270m": ("local", "global"),  # 18 = 3 · 6
    "gemma3_1b": ("global", "local", "local"),  # 26 = 4 · 6 + 2
    "gemma3_4b": ("global", "local", "local", "local", "local"),  # 34 = 5 · 6 + 4
    "gemma3_12b": ("local", "global"),  # 48 = 8 · 6
    "gemma3_27b": ("global", "local", "local"),  # 62 = 10 · 6 + 2
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    c = GEMMA_CONFIGS[name]
    (
        layers,
        vocab,
        embed,
        hidden,
        heads,
        kv_heads,
        head_dim,
        window,
        scale,
        rope_scale,
        others,
        embedding,
    ) = PUBLISHED[name]
    assert (c.num_layers, c.vocab_size, c.embed_dim, c.hidden_dim) == (layers, vocab, embed, hidden)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.sliding_window) == (
        heads,
        kv_heads,
        head_dim,
        window,
    )
    assert math.isclose(c.query_scale, scale, rel_tol=1e-12)
    assert (c.local_rope_base, c.global_rope_scale) == (1e4, rope_scale)
    assert c.vocab_size * c.embed_dim == embedding
    if others is not None:
        assert abs(c.num_parameters - embedding - others) <= (
            0 if name.startswith("gemma2") else 0.5e6
        )


@pytest.mark.parametrize("name", GEMMA_CONFIGS)
def test_families_differ_as_published(name):
    c = GEMMA_CONFIGS[name]
    if name.startswith("gemma2"):
        assert (
            c.attention_soft_cap,
            c.final_soft_cap,
            c.use_qk_norm,
            c.global_rope_base,
            c.pattern,
        ) == (50.0, 30.0, False, 1e4, ("local", "global"))
    else:
        assert (c.attention_soft_cap, c.final_soft_cap, c.use_qk_norm, c.global_rope_base) == (
            None,
            None,
            True,
            1e6,
        )
        assert c.pattern == ("local",) * {"gemma3_tiny": 2, "gemma3_mini": 1}.get(name, 5) + (
            "global",
        )
    assert c.bidirectional_reach is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_patterns_end_as_published(name):
    kinds = GEMMA_CONFIGS[name].layer_kinds
    assert len(kinds) == GEMMA_CONFIGS[name].num_layers
    assert kinds[-len(LAST_LAYERS[name]) :] == LAST_LAYERS[name]
    assert kinds[0] == "local"


@pytest.mark.parametrize("name", GEMMA_CONFIGS)
def test_the_number_of_parameters_is_that_of_the_model(name):
    """Counted from shapes: the parameters of the largest size would take 109 GB."""
    shapes = jax.tree.leaves(abstract_encoder(EncoderConfig(GEMMA_CONFIGS[name])).shapes)
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in shapes)
    assert sum(math.prod(shape.shape) for shape in shapes) == GEMMA_CONFIGS[name].num_parameters


def test_reach_by_kind_and_switch(tiny_config):
    c = tiny_config("gemma3", sliding_window=8)
    assert c.reach("local", "causal") == (7, 0)
    assert c.reach("local", "bidirectional") == (7, 7)  # the gemma package's meaning
    assert c.reach("global", "causal") is c.reach("global", "bidirectional") is None
    explicit = dataclasses.replace(c, bidirectional_reach=(0, 0))
    assert (explicit.reach("local", "bidirectional"), explicit.reach("local", "causal")) == (
        (0, 0),
        (7, 0),
    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_config_survives_json(tiny_config, family):
    full = EncoderConfig(
        tiny_config(family, bidirectional_reach=(4, 1)),
        heads={"rte": HeadConfig(2, hidden_dims=(16, 8)), "stsb": 1},
        pooling=PoolingConfig("attention_kv", k=2, probes=3, heads=8),
        attention="causal",
        attention_dropout=0.1,
        feed_forward_dropout=0.2,
        compute_dtype="float32",
        remat="dots",
    )
    for config in (full, EncoderConfig(tiny_config(family))):
        restored = EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert restored == config
        # Tuples are restored as tuples: a list would not hash.
        assert hash(restored.transformer) == hash(config.transformer)


def test_every_gemma_config_survives_json():
    for transformer in GEMMA_CONFIGS.values():
        config = EncoderConfig(transformer)
        assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_those_of_the_paper():
    config = EncoderConfig(GEMMA_CONFIGS["gemma2_2b"])
    assert (
        config.attention,
        config.compute_dtype,
        config.pooling.name,
        config.attention_dropout,
    ) == ("bidirectional", "bfloat16", "mean", 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention": "bidirectonal"},
            "unknown attention 'bidirectonal'; did you mean 'bidirectional'",
        ),
        ({"attention": "casual"}, "did you mean 'causal'"),
        ({"compute_dtype": "float16"}, "float16 is refused: .* use bfloat16, or float32"),
        ({"compute_dtype": "bfloat"}, "unknown compute_dtype 'bfloat'; did you mean 'bfloat16'"),
        ({"remat": "ful"}, "unknown remat policy 'ful'; did you mean 'full'"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be"),
        (
            {"feed_forward_dropout": 1.5},
            "feed_forward_dropout must be at least 0 and below 1, got 1.5",
        ),
        ({"feed_forward_dropout": float("nan")}, "feed_forward_dropout must be"),
        (
            {"pooling": PoolingConfig("attention_kv", heads=3)},
            "pooling.heads=3 does not divide the model's width 32",
        ),
        (
            {"pooling": PoolingConfig("attention_query", heads=5)},
            "pooling.heads=5 does not divide the model's width 32",
        ),
    ],
)
def test_invalid_encoder_configs_are_refused(tiny_config, fields, message):
    with pytest.raises(InputError, match=message):
        EncoderConfig(tiny_config("gemma2"), **fields)


@pytest.mark.parametrize("outputs", [0, -1])
def test_a_head_without_outputs_is_refused(tiny_config, outputs):
    with pytest.raises(InputError, match="a head has at least 1 output"):
        EncoderConfig(tiny_config("gemma2"), heads={"rte": outputs})


def test_heads_of_poolers_without_attention_need_not_divide(tiny_config):
    assert (
        EncoderConfig(tiny_config("gemma2"), pooling=PoolingConfig("mean", heads=3)).pooling.heads
        == 3
    )


def test_an_unknown_pooler_is_refused():
    with pytest.raises(InputError, match="unknown pooler 'lastk'; did you mean 'last_k'"):
        PoolingConfig("lastk")


@pytest.mark.parametrize("field", ["k", "probes", "heads"])
def test_pooling_sizes_below_one_are_refused(field):
    with pytest.raises(InputError, match=f"pooling.{field} must be at least 1, got 0"):
        PoolingConfig(**{field: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "4 query heads cannot share 3 key-value heads evenly",
        ),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"pattern": ("local", "globl")}, "unknown layer kind 'globl'; did you mean 'global'"),
    ],
)
def test_invalid_transformer_configs_are_refused(tiny_config, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_config("gemma3", **changes)


@pytest.mark.parametrize(
    "field",
    [
        "num_layers",
        "vocab_size",
        "embed_dim",
        "hidden_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "sliding_window",
    ],
)
def test_sizes_below_one_are_refused(tiny_config, field):
    """A window of 0, for example, would mask every key, and softmax would attend to all."""
    with pytest.raises(InputError, match=field):
        tiny_config("gemma3", **{field: 0})


def test_an_empty_pattern_is_refused(tiny_config):
    with pytest.raises(InputError, match="pattern"):
        tiny_config("gemma3", pattern=(), num_layers=3)


@pytest.mark.parametrize("reach", [(-1, 0), (0, -1), (1,), (1, 2, 3)])
def test_an_invalid_reach_is_refused(tiny_config, reach):
    with pytest.raises(InputError, match="bidirectional_reach"):
        tiny_config("gemma3", bidirectional_reach=reach)


@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_a_soft_cap_that_is_not_positive_is_refused(tiny_config, cap):
    with pytest.raises(InputError, match="attention_soft_cap"):
        tiny_config("gemma2", attention_soft_cap=cap)
