"""LoRA: one adapter per matrix, no effect at initialization, and merging equals adapting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model.config import EncoderConfig, LoraConfig
from gemma_encoder.model.encoder import (
    abstract_encoder,
    initial_parameters,
    layer_paths,
    merge_parameters,
    parameter_paths,
    select,
)
from gemma_encoder.model.lora import adapter_params, is_adapter, merge_backbone_lora, merge_lora

LORA = LoraConfig(rank=3, alpha=6.0)
MATRICES = ("query", "key_value", "attention_out", "gating", "linear")


def batch():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(5, 60, (2, 9)), jnp.int32),
        jnp.ones((2, 9), jnp.int32),
        jnp.broadcast_to(jnp.arange(9), (2, 9)),
        1,
    )


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def adapted(request, tiny_config):
    """(config, parameters) with adapters."""
    config = EncoderConfig(tiny_config(request.param), {"a": 2}, compute_dtype="float32", lora=LORA)
    return config, drawn(config)


def drawn(config):
    return jax.jit(lambda key: initial_parameters(config, key))(jax.random.key(0))


def is_base(path):
    return not is_adapter(path)


def disturbed(parameters):
    """The parameters with nonzero adapters."""

    def move(leaf):
        return leaf + 0.02 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape))

    adapters = jax.tree.map(move, select(parameters, is_adapter))
    return merge_parameters(select(parameters, is_base), adapters)


def merged(config, parameters):
    """(config, parameters) without adapters, which are merged into the matrices."""
    backbone = merge_backbone_lora(parameters["backbone"], config.lora)
    return dataclasses.replace(config, lora=LoraConfig()), {**parameters, "backbone": backbone}


def output(config, parameters):
    encode = jax.jit(lambda parameters: abstract_encoder(config).merge(parameters)(*batch()))
    return encode(parameters)


def scores(config, parameters):
    return output(config, parameters).scores["a"]


def test_every_matrix_of_every_layer_has_an_adapter(adapted):
    config, parameters = adapted
    adapters = {
        path
        for stacked in parameter_paths(parameters)
        for path in layer_paths(config.transformer, stacked)
        if is_adapter(path)
    }
    layers = range(config.transformer.num_layers)
    assert adapters == {
        f"backbone/layers/{layer}/{matrix}_lora_{part}"
        for layer in layers
        for matrix in MATRICES
        for part in "ab"
    }
    a = parameters["backbone"]["blocks"]["0"]["linear_lora_a"]
    assert a.shape == (2, 48, 3) and not np.array_equal(a[0], a[1]), "each layer draws its own"


def test_untrained_adapters_have_no_effect(adapted):
    config, parameters = adapted
    initial = scores(config, parameters)
    np.testing.assert_array_equal(initial, scores(*merged(config, parameters)))
    assert not any(
        np.any(leaf)
        for path, leaf in parameter_paths(parameters).items()
        if path.endswith("_lora_b")
    )
    a_matrices = select(parameters, lambda path: path.endswith("_lora_a"))
    other_parameters = select(parameters, lambda path: not path.endswith("_lora_a"))
    shifted = jax.tree.map(lambda leaf: leaf + 1, a_matrices)
    np.testing.assert_array_equal(
        initial, scores(config, merge_parameters(other_parameters, shifted))
    )


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_merged_adapters_compute_the_same(adapted, remat):
    config, parameters = adapted
    parameters = disturbed(parameters)
    actual = scores(dataclasses.replace(config, remat=remat), parameters)
    expected = scores(*merged(config, parameters))
    # (W + AB) x and Wx + A(Bx) round differently, in float32, over five or more layers.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(actual - scores(config, drawn(config))).max() > 1e-2


def test_gradients_reach_every_adapter_under_scan_and_remat(adapted):
    config, parameters = adapted
    config = dataclasses.replace(config, remat="full")
    parameters = disturbed(parameters)
    adapters = select(parameters, is_adapter)
    base = select(parameters, is_base)
    gradients = jax.jit(
        jax.grad(lambda part: jnp.sum(scores(config, merge_parameters(part, base)) ** 2))
    )(adapters)
    for path, leaf in parameter_paths(gradients).items():
        assert np.abs(leaf).max() > 0, path


def test_activations_stay_in_bfloat16(adapted):
    config, parameters = adapted
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    hidden = output(half, disturbed(parameters)).hidden
    assert hidden.dtype == jnp.bfloat16
    exact = output(config, disturbed(parameters)).hidden
    assert jnp.linalg.norm(hidden.astype(jnp.float32) - exact) < 0.05 * jnp.linalg.norm(exact)


def test_the_config_survives_json_and_refuses_nonsense(adapted):
    config, _ = adapted
    assert EncoderConfig.from_dict(config.to_dict()) == config
    old = config.to_dict()
    del old["lora"]
    assert EncoderConfig.from_dict(old).lora == LoraConfig()
    with pytest.raises(InputError, match="lora.rank must be at least 0"):
        LoraConfig(rank=-1)


def test_qwix_computes_the_same_with_the_same_adapters():
    """A product over two axes, as of the heads' outputs."""
    lora = LoraConfig(rank=2, alpha=3.0)
    provider = qwix.LoraProvider(module_path=".*", rank=lora.rank, alpha=lora.alpha)

    class Matrix(nnx.Module):
        def __init__(self):
            self.out = nnx.Param(jax.random.normal(jax.random.key(1), (4, 3, 5)))

        def __call__(self, x):
            return jnp.einsum("TNH,NHD->TD", x, self.out[...])

    x = jax.random.normal(jax.random.key(2), (7, 4, 3))
    adapted = qwix.apply_lora_to_model(Matrix(), provider, x, rngs=nnx.Rngs(0))
    a, b = adapter_params(nnx.Rngs(0), (4, 3, 5), 2, lora.rank, ())
    assert a.shape == adapted.out_lora_a.shape and b.shape == adapted.out_lora_b.shape
    assert np.abs(a[...]).max() <= (6 / (4 * 3)) ** 0.5  # He-uniform, as qwix draws
    adapted.out_lora_b[...] = jnp.ones_like(b[...])
    layer = {name: getattr(adapted, name)[...] for name in ("out", "out_lora_a", "out_lora_b")}
    merged = merge_lora(layer, lora, stacked=False)["out"]
    # (W + AB) x and Wx + A(Bx) round differently in float32.
    np.testing.assert_allclose(
        adapted(x), jnp.einsum("TNH,NHD->TD", x, merged), rtol=1e-5, atol=1e-5
    )
