"""Adapters: at the start they change nothing; they are made for every matrix; folding them in computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from gemma_encoder.model.lora import is_adapter, merge_backbone_lora

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


def disturbed(parameters):
    """With adapters that do something."""

    def move(leaf):
        return leaf + 0.02 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape))

    base, adapters = (
        select(parameters, lambda path: not is_adapter(path)),
        select(parameters, is_adapter),
    )
    return merge_parameters(base, jax.tree.map(move, adapters))


def plain(config, parameters):
    backbone = merge_backbone_lora(parameters["backbone"], config.lora)
    return dataclasses.replace(config, lora=LoraConfig()), {**parameters, "backbone": backbone}


def output(config, parameters):
    return jax.jit(lambda parameters: abstract_encoder(config).merge(parameters)(*batch()))(
        parameters
    )


def scores(config, parameters):
    return output(config, parameters).scores["a"]


def test_every_matrix_of_every_layer_has_an_adapter(adapted):
    config, parameters = adapted
    found = {
        path
        for stacked in parameter_paths(parameters)
        for path in layer_paths(config.transformer, stacked)
        if is_adapter(path)
    }
    layers = range(config.transformer.num_layers)
    assert found == {
        f"backbone/layers/{layer}/{matrix}_lora_{part}"
        for layer in layers
        for matrix in MATRICES
        for part in "ab"
    }
    a = parameters["backbone"]["blocks"]["0"]["linear_lora_a"]
    assert a.shape == (2, 48, 3) and not np.array_equal(a[0], a[1]), "each layer draws its own"


def test_adapters_that_were_not_trained_change_nothing(adapted):
    config, parameters = adapted
    without, base = plain(config, parameters)
    said = scores(config, parameters)
    # A matrix that may be adapted is multiplied with as it is, others with heads as one axis: float32 rounds these differently.
    np.testing.assert_allclose(said, scores(without, base), rtol=1e-5, atol=1e-5)
    assert not any(
        np.any(leaf)
        for path, leaf in parameter_paths(parameters).items()
        if path.endswith("_lora_b")
    )
    others = merge_parameters(
        select(parameters, lambda path: not path.endswith("_lora_a")),
        jax.tree.map(
            lambda leaf: leaf + 1, select(parameters, lambda path: path.endswith("_lora_a"))
        ),
    )
    np.testing.assert_array_equal(said, scores(config, others))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_folded_adapters_compute_the_same(adapted, remat):
    config, parameters = adapted
    parameters = disturbed(parameters)
    without, folded = plain(config, parameters)
    found, expected = (
        scores(dataclasses.replace(config, remat=remat), parameters),
        scores(without, folded),
    )
    # (W + AB) x and Wx + A(Bx) round differently, in float32, over five or more layers.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - scores(config, drawn(config))).max() > 1e-2


def test_gradients_reach_every_adapter_under_scan_and_remat(adapted):
    config, parameters = adapted
    config, parameters = dataclasses.replace(config, remat="full"), disturbed(parameters)
    adapters, base = (
        select(parameters, is_adapter),
        select(parameters, lambda path: not is_adapter(path)),
    )
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


def test_keys_and_values_of_a_weights_shape_are_no_weight(adapted):
    config, parameters = adapted
    parameters = disturbed(parameters)
    rows = config.transformer.embed_dim  # keys and values [rows, 2, K, H], as `key_value` is
    tokens = jnp.broadcast_to(jnp.array([7, 9], jnp.int32), (rows, 2))
    batch = (tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(2), (rows, 2)), 1)

    def run(rows):
        return jax.jit(
            lambda parameters: abstract_encoder(config).merge(parameters)(
                *(array[:rows] for array in batch[:3]), 1
            )
        )(parameters).scores["a"]

    # Rows of other batches take other paths through a matrix product: float32 rounds differently.
    np.testing.assert_allclose(run(rows)[:3], run(3), rtol=1e-5, atol=1e-5)
