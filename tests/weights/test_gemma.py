"""Checkpoints of the gemma package give the same hidden states here as in the gemma package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.encoder import parameter_dict
from gemma_encoder.model.sharding import make_mesh, parameter_shardings
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.model.transformer import Transformer
from gemma_encoder.weights.backbone import load_backbone, open_checkpoint, save_gemma, size_name
from gemma_encoder.weights.gemma import TABLE, GemmaCheckpoint, published_path
from gemma_encoder.weights.tensors import Tensor, dump

LENGTH = 24
CONFIGS = {
    # GQA, a window shorter than the text, soft cap; gating stored (2, D, F) as by gemma2_2b.
    "gemma2": dataclasses.replace(
        GEMMA_CONFIGS["gemma2_tiny"],
        embed_dim=32,
        hidden_dim=48,
        head_dim=8,
        query_scale=8**-0.5,
        vocab_size=64,
        sliding_window=5,
    ),
    # QK-norm, two rotary bases, scaled positions on global layers, an incomplete last group;
    # gating stored (2, F, D).
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
    """Returns (our config, their model, their parameters at random values)."""
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
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    )["params"]
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape), np.float32), shapes
    )
    return ours, model, parameters


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """`read(parameters, config, dtype)`: saves parameters by their code, loads them by ours."""
    from gemma import gm

    def load(parameters, config, dtype=jnp.float32):
        folder = tmp_path_factory.mktemp("gemma") / "checkpoint"
        gm.ckpts.save_params(parameters, folder, wait_until_finished=True)
        return load_backbone(folder, config, dtype=dtype)

    return load


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_hidden_states_equal_the_gemma_packages(theirs, attention, read):
    config, model, parameters = theirs
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (2, LENGTH)), jnp.int32)
    mask = jnp.ones((2, LENGTH, LENGTH), bool)
    mask = jnp.tril(mask) if attention == "causal" else mask
    expected = model.apply(
        {"params": parameters}, tokens, attention_mask=mask, return_hidden_states=True
    ).hidden_states
    backbone = read(parameters, config)
    # Both in float32; the order of sums differs.
    np.testing.assert_allclose(
        backbone(tokens, attention=attention), expected, rtol=1e-5, atol=1e-5
    )


def assert_same(actual: dict, expected: dict) -> None:
    """Asserts that two trees are equal to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def layouts(parameters: dict) -> dict[str, dict]:
    """Returns the parameters in every layout of the gemma package, made by its own code."""
    from gemma.gm.ckpts import _checkpoint, _compat

    flat = _checkpoint._nested_to_flat(parameters)
    stacked = _compat.stack_params(flat, 2)
    training = {
        "params": parameters,
        "opt_state": {"mu": np.zeros(3, np.float32)},
        "step": np.zeros((), np.int32),
        "collections": {"x": np.zeros(2, np.float32)},
    }
    return {"nested": parameters, "flat": flat, "stacked": stacked, "kauldron": training}


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked", "kauldron"])
def test_every_layout_is_read_as_the_gemma_package_reads_it(theirs, tmp_path, layout, read):
    from gemma import gm

    config, _, parameters = theirs
    gm.ckpts.save_params(
        layouts(parameters)[layout], tmp_path / "checkpoint", wait_until_finished=True
    )
    oracle = jax.device_get(gm.ckpts.load_params(tmp_path / "checkpoint"))
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert f"({layout} layout)" in checkpoint.description
    backbone = load_backbone(tmp_path / "checkpoint", config)
    again = dict(dump(parameter_dict(nnx.state(backbone)), config, TABLE))
    flat = {"/".join(keys): value for keys, value in flatten_dict(oracle).items()}
    for name, value in again.items():
        features_first = name.endswith("gating_einsum") and flat[name].shape != value.shape
        np.testing.assert_array_equal(value.swapaxes(1, 2) if features_first else value, flat[name])
    assert again.keys() == flat.keys()
    assert len(checkpoint.skipped) == (3 if layout == "kauldron" else 0)


def test_vision_weights_are_skipped_and_named(theirs, tmp_path, read):
    from gemma import gm

    config, _, parameters = theirs
    projection = {
        "mm_input_projection": {"w": np.zeros((2, 2), np.float32)},
        "mm_soft_embedding_norm": {"scale": np.zeros(2, np.float32)},
    }
    parameters = {
        **parameters,
        "embedder": {**parameters["embedder"], **projection},
        "vision_encoder": {"x": {"w": np.zeros(3, np.float32)}},
    }
    gm.ckpts.save_params(parameters, tmp_path / "checkpoint", wait_until_finished=True)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.skipped == (
        "embedder/mm_input_projection/w",
        "embedder/mm_soft_embedding_norm/scale",
        "vision_encoder/x/w",
    )
    checkpoint.check(config)


def test_parameters_are_loaded_onto_the_mesh(theirs, tmp_path, read):
    """Shardings follow the rules, and values equal those on one device."""
    from gemma import gm

    config, _, parameters = theirs
    mesh = make_mesh((2, 2, 2))
    on_one_device = parameter_dict(nnx.state(read(parameters, config)))
    for layout in ("nested", "stacked"):
        gm.ckpts.save_params(
            layouts(parameters)[layout], tmp_path / layout, wait_until_finished=True
        )
        spread = parameter_dict(nnx.state(load_backbone(tmp_path / layout, config, mesh)))
        assert_same(jax.device_get(spread), jax.device_get(on_one_device))
        expected = parameter_shardings({"backbone": spread}, mesh)["backbone"]
        is_equivalent = jax.tree.map(
            lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
            spread,
            expected,
        )
        assert jax.tree.all(is_equivalent)
        assert not spread["embedding"].sharding.is_fully_replicated


def test_parameters_have_the_requested_dtype(theirs, tmp_path, read):
    config, _, parameters = theirs
    backbone = read(parameters, config, jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(backbone)))
    np.testing.assert_array_equal(
        backbone.embedding[...],
        jnp.asarray(parameters["embedder"]["input_embedding"], jnp.bfloat16),
    )


def test_a_saved_checkpoint_loads_here_and_in_gemma(theirs, tmp_path, read):
    """Loading, saving and loading give the same bits; the saved folder has the config."""
    from gemma import gm

    config, model, parameters = theirs
    backbone = read(parameters, config)
    save_gemma(backbone, tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert again.config == config
    assert_same(
        jax.device_get(parameter_dict(nnx.state(again))),
        jax.device_get(parameter_dict(nnx.state(backbone))),
    )
    oracle = jax.device_get(gm.ckpts.load_params(tmp_path / "saved"))
    if model.config.transpose_gating_einsum:  # only the size of Gemma 2 2B is saved without it
        assert_same(oracle, parameters)
    with pytest.raises(InputError, match="exists; name a new folder"):
        save_gemma(backbone, tmp_path / "saved")


def test_fused_query_key_value_tensors_are_saved_and_loaded(tmp_path):
    """The gemma package fuses them if there are as many key-value heads as query heads."""
    from gemma import gm

    config = dataclasses.replace(CONFIGS["gemma3"], num_kv_heads=4)
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    save_gemma(nnx.merge(graph, state), tmp_path / "saved")
    oracle = jax.device_get(gm.ckpts.load_params(tmp_path / "saved"))
    assert oracle["layer_0"]["attn"]["qkv_einsum"]["w"].shape == (3, 4, 32, 8)
    again = load_backbone(tmp_path / "saved")
    assert_same(
        jax.device_get(parameter_dict(nnx.state(again))), jax.device_get(parameter_dict(state))
    )


def test_published_sizes_are_recognized_by_their_shapes():
    class Shapes(GemmaCheckpoint):
        def __init__(self, config):
            self.folder = epath.Path("nowhere")
            self.description = "shapes"
            self.tensors = {
                name: Tensor(shapes[0], np.dtype(np.float32))
                for name, shapes in self.expected(config).items()
            }

    for name, config in GEMMA_CONFIGS.items():
        assert size_name(Shapes(config).config()) == name
    strange = dataclasses.replace(GEMMA_CONFIGS["gemma3_1b"], hidden_dim=7)
    assert Shapes(strange).config(hint=strange) == strange
    with pytest.raises(
        InputError,
        match=r"matches no published Gemma \(embedding \(262144, 1152\), 26 layers\); pass its "
        "TransformerConfig",
    ):
        Shapes(strange).config()
    with pytest.raises(
        InputError, match=r"layer_0/mlp/linear has shape \(7, 1152\), expected \(6912, 1152\)"
    ):
        Shapes(strange).config(hint=GEMMA_CONFIGS["gemma3_1b"])


def test_every_published_name_has_its_address():
    from gemma import gm

    for path in gm.ckpts.CheckpointPath:
        if path.name.startswith(("GEMMA2_", "GEMMA3_")):
            assert published_path(path.name) == path.value
    assert published_path("GEMMA3N_E2B_PT") is None
    assert published_path("runs/sst2") is None


def test_every_mismatched_tensor_is_listed(theirs, tmp_path, read):
    config, _, parameters = theirs
    broken = {
        **parameters,
        "layer_0": {**parameters["layer_0"], "pre_ffw_norm": {"scale": np.zeros(7)}},
        "surplus": {"w": np.zeros(1)},
    }
    del broken["final_norm"]
    with pytest.raises(
        InputError,
        match=r"final_norm/scale is missing; surplus/w is unexpected; "
        r"layer_0/pre_ffw_norm/scale has shape \(7,\), expected \(32,\)",
    ):
        read(broken, config)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(
        InputError,
        match="does not exist; give a checkpoint's folder, a workdir, or a published name such as "
        "GEMMA2_2B_PT",
    ):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a checkpoint: expected the gemma package's"):
        load_backbone(tmp_path)
    (tmp_path / "_METADATA").write_text("{")
    with pytest.raises(InputError, match="has no readable Orbax checkpoint"):
        load_backbone(tmp_path)
