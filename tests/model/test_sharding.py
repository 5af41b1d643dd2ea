"""Sharding: the rules for parameters, and meshes."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig, HeadConfig, PoolingConfig
from gemma_encoder.model.encoder import abstract_encoder, parameter_paths
from gemma_encoder.model.sizes import GEMMA_CONFIGS


@pytest.mark.parametrize("size", GEMMA_CONFIGS)
@pytest.mark.parametrize("pooler", ["mean", "attention_kv", "attention_query"])
def test_every_parameter_has_a_rule(size, pooler):
    heads = {"a": HeadConfig(2, hidden_dims=(8,))}
    config = EncoderConfig(GEMMA_CONFIGS[size], heads, PoolingConfig(pooler))
    shapes = abstract_encoder(config).shapes
    mesh = sharding.make_mesh((1, 4, 2))
    shardings = parameter_paths(sharding.parameter_shardings(shapes, mesh))
    assert shardings.keys() == parameter_paths(shapes).keys()
    gating = shardings["backbone/blocks/0/gating"].spec
    assert gating == P(None, "fsdp", None, "tensor")


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(InputError, match="no sharding rule matches the parameter 'backbone/novel'"):
        sharding.spec_for("backbone/novel", (2, 2), sharding.make_mesh((1, 4, 2)))


def test_a_dimension_that_an_axis_does_not_divide_is_whole():
    mesh = sharding.make_mesh((1, 4, 2))
    # One key-value head (Gemma 3 1B) cannot be split over two devices.
    spec = sharding.spec_for("backbone/blocks/0/key_value", (4, 1152, 2, 1, 256), mesh)
    assert spec == P(None, "fsdp", None, None, None)


@pytest.mark.parametrize(("shape", "devices"), [((-1, 1, 1), 8), ((2, -1, 2), 8), ((1, 1, 1), 1)])
def test_minus_one_stands_for_the_remaining_devices(shape, devices):
    assert sharding.make_mesh(shape, jax.devices()[:devices]).size == devices


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1), (-1, -1, 1), (0, 8, 1)])
def test_meshes_that_do_not_fit_are_refused(shape):
    with pytest.raises(InputError, match="mesh"):
        sharding.make_mesh(shape)
