"""The gemma package's checkpoints, against the gemma package itself: same random weights, same hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import GEMMA_CONFIGS, EncoderConfig
from gemma_encoder.model.encoder import skeleton
from gemma_encoder.weights import gemma as weights

LENGTH = 24
CONFIGS = {
    # GQA, a window shorter than the text, soft cap; gating stored (2, D, F) as by gemma2_2b.
    "gemma2": dataclasses.replace(GEMMA_CONFIGS["gemma2_tiny"], embed_dim=32, hidden_dim=48, head_dim=8, query_scale=8**-0.5, vocab_size=64, sliding_window=5),
    # QK-norm, two rotary bases, positions scaled on global layers, a cut-short last group; gating stored (2, F, D).
    "gemma3": dataclasses.replace(
        GEMMA_CONFIGS["gemma3_tiny"],
        embed_dim=32,
        hidden_dim=48,
        head_dim=8,
        query_scale=8**-0.5,
        vocab_size=64,
        sliding_window=5,
        num_layers=5,
        global_rope_scale=8.0,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request):
    """(our config, their model, their parameters drawn at random)."""
    from gemma import gm
    from gemma.gm.nn import _config

    ours = CONFIGS[request.param]
    kinds = {"local": gm.nn.AttentionType.LOCAL_SLIDING, "global": gm.nn.AttentionType.GLOBAL}
    model = gm.nn.Transformer(
        config=_config.TransformerConfig(
            num_embed=ours.vocab_size,
            embed_dim=ours.embed_dim,
            hidden_dim=ours.hidden_dim,
            num_heads=ours.num_heads,
            head_dim=ours.head_dim,
            num_kv_heads=ours.num_kv_heads,
            final_logit_softcap=None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=tuple(kinds[kind] for kind in ours.layer_kinds),
            attn_logits_soft_cap=ours.attention_soft_cap,
            sliding_window_size=ours.sliding_window,
            transpose_gating_einsum=request.param == "gemma3",
            use_qk_norm=ours.use_qk_norm,
            local_base_frequency=int(ours.local_rope_base),
            global_base_frequency=int(ours.global_rope_base),
            global_scale_factor=ours.global_rope_scale,
        )
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32)))["params"]
    rng = np.random.default_rng(0)
    return ours, model, jax.tree.map(lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape), np.float32), shapes)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_hidden_states_equal_the_gemma_packages(theirs, attention):
    config, model, parameters = theirs
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (2, LENGTH)), jnp.int32)
    mask = jnp.ones((2, LENGTH, LENGTH), bool)
    mask = jnp.tril(mask) if attention == "causal" else mask
    expected = model.apply({"params": parameters}, tokens, attention_mask=mask, return_hidden_states=True).hidden_states
    encoder = skeleton(EncoderConfig(config, compute_dtype="float32"))
    backbone = encoder.merge({"backbone": weights.from_gemma(parameters, config), "heads": {}}).backbone
    # Both in float32; the order of sums differs.
    np.testing.assert_allclose(backbone(tokens, attention=attention), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_checkpoint_is_read(theirs, tmp_path):
    from gemma import gm

    config, _, parameters = theirs
    gm.ckpts.save_params(parameters, tmp_path / "checkpoint", wait_until_finished=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    shapes = skeleton(EncoderConfig(config)).shapes["backbone"]
    loaded = weights.load(tmp_path / "checkpoint", config, jax.tree.map(lambda _: place, shapes))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), weights.from_gemma(parameters, config))
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(loaded))
    assert jax.tree.map(lambda leaf: leaf.shape, loaded) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    with pytest.raises(InputError, match="does not exist"):
        weights.load(tmp_path / "nowhere", config, {})


def test_every_tensor_that_does_not_fit_is_listed(theirs):
    config, _, parameters = theirs
    broken = {**parameters, "layer_0": {**parameters["layer_0"], "pre_ffw_norm": {"scale": np.zeros(7)}}, "surplus": {"w": np.zeros(1)}}
    del broken["final_norm"]
    with pytest.raises(InputError, match=r"final_norm/scale is missing; surplus/w is surplus; layer_0/pre_ffw_norm/scale has shape \(7,\), expected \(32,\)"):
        weights.from_gemma(broken, config)
