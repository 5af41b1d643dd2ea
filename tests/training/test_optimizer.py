"""Optimizers: rules by layer, frozen parameters, factored moments, and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gemma_encoder.inputs.errors import InputError
from gemma_encoder.model import sharding
from gemma_encoder.model.config import EncoderConfig
from gemma_encoder.model.encoder import (
    initial_parameters,
    layer_paths,
    merge_parameters,
    parameter_paths,
    select,
)
from gemma_encoder.training.optimizer import make_optimizer, make_schedule, trainable
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.state import abstract_state, initial_state


@pytest.fixture(scope="module")
def encoder(tiny_config):
    """Two repetitions of Gemma 3's pattern and a layer: stacked blocks of two, and a remainder."""
    return EncoderConfig(tiny_config("gemma3"), {"a": 3})


@pytest.fixture(scope="module")
def parameters(encoder):
    return jax.tree.map(lambda leaf: leaf + 0.5, initial_parameters(encoder, jax.random.key(0)))


def by_layer(encoder, parameters):
    """Returns the parameters by path of their single layer."""
    result = {}
    for path, leaf in parameter_paths(parameters).items():
        layers = layer_paths(encoder.transformer, path)
        result |= {
            layer: leaf[i] if path.startswith("backbone/blocks") else leaf
            for i, layer in enumerate(layers)
        }
    return result


def step(options, encoder, parameters, gradients=None, count=1):
    """Takes steps with learning rate 1; returns the changes by layer path, and the state."""
    optimizer = make_optimizer(options, lambda step: 1.0, encoder)
    is_trainable = trainable(options, encoder)
    trained = select(parameters, is_trainable)
    state = optimizer.init(trained)
    gradients = select(gradients or jax.tree.map(jnp.sin, parameters), is_trainable)
    new = trained
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, new)
        new = optax.apply_updates(new, updates)
    whole = merge_parameters(new, select(parameters, lambda path: not is_trainable(path)))
    changes = jax.tree.map(
        lambda a, b: np.asarray(a - b), by_layer(encoder, whole), by_layer(encoder, parameters)
    )
    return changes, state


def find_moments(state, field):
    """Returns the first part of an optimizer's state that has a field, e.g. "mu" of Adam."""

    def has_field(part):
        return hasattr(part, field)

    return next(part for part in jax.tree.leaves(state, is_leaf=has_field) if has_field(part))


def test_every_layer_has_one_path(encoder, parameters):
    paths = by_layer(encoder, parameters)
    depth = encoder.transformer.num_layers
    assert {path.split("/")[2] for path in paths if "/layers/" in path} == {
        str(i) for i in range(depth)
    }
    assert sum(path.endswith("/query") for path in paths) == depth


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)]
)
def test_schedules(schedule, middle):
    rate = make_schedule(OptimizerConfig(1.0, schedule), steps=110, warmup=10)
    values = [float(rate(step)) for step in (0, 5, 10, 60, 109)]
    np.testing.assert_allclose(values[:4], [0, 0.5, 1, middle], atol=1e-6)
    assert values[4] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=0.02)
    with pytest.raises(InputError, match="unknown optimizer.schedule"):
        OptimizerConfig(1.0, "lineer")
    with pytest.raises(InputError, match="warmup"):
        make_schedule(OptimizerConfig(1.0), 10, 11)


def test_weight_decay_skips_norms_biases_and_embeddings(encoder, parameters):
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    moved, _ = step(OptimizerConfig(1.0, weight_decay=0.5), encoder, parameters, zeros)
    for path, leaf in by_layer(encoder, parameters).items():
        is_skipped = path.endswith(("scale", "bias", "embedding"))
        np.testing.assert_allclose(
            moved[path], 0 * leaf if is_skipped else -0.5 * leaf, rtol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_multipliers_and_layer_decay_scale_each_layers_step(encoder, parameters, name):
    plain, _ = step(OptimizerConfig(1.0, name=name), encoder, parameters)
    depth = encoder.transformer.num_layers
    options = OptimizerConfig(
        1.0,
        name=name,
        layer_decay=0.5,
        multipliers=(
            (r"backbone/layers/3/.*", 4.0),
            (r"heads/.*", 10.0),
            (r"backbone/layers/\d/linear", 2.0),
        ),
    )
    scaled, _ = step(options, encoder, parameters)
    for path, change in plain.items():
        layer = int(path.split("/")[2]) if "/layers/" in path else depth - 1
        factor = 0.5**depth if path == "backbone/embedding" else 0.5 ** (depth - 1 - layer)
        if path.startswith("heads/"):
            factor *= 10
        elif layer == 3 and "/layers/" in path:
            factor *= 4
        elif path.endswith("/linear"):
            factor *= 2
        np.testing.assert_allclose(
            scaled[path], factor * change, rtol=2e-5, atol=1e-7, err_msg=path
        )


def test_frozen_parameters_keep_their_bits_and_have_no_moments(encoder, parameters):
    period = len(encoder.transformer.pattern)
    options = OptimizerConfig(
        1.0, weight_decay=0.1, freeze=rf"backbone/(embedding|layers/([0-2]|{period})/.*)"
    )
    moved, state = step(options, encoder, parameters, count=3)
    frozen = {path for path, change in moved.items() if not change.any()}
    assert frozen == {
        path
        for path in moved
        if path == "backbone/embedding"
        or ("/layers/" in path and int(path.split("/")[2]) in (0, 1, 2, period))
    }
    moments = parameter_paths(find_moments(state, "mu").mu)
    assert "backbone/embedding" not in moments
    # Layers 0 and `period` form a stack that is entirely frozen. Layers 1 and 1 + `period` form
    # another, of which one layer is trained.
    assert "backbone/blocks/0/query" not in moments
    assert "backbone/blocks/1/query" in moments


def test_a_frozen_parameter_gets_no_gradient(micro):
    from gemma_encoder.training.build import build
    from gemma_encoder.training.step import make_program

    recipe = build(micro(optimizer__freeze=r"backbone/.*", batch__examples_per_step=8))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    program = make_program(recipe, mesh, 10, 0)
    unfrozen = dataclasses.replace(recipe.optimizer, freeze="")
    whole = make_program(dataclasses.replace(recipe, optimizer=unfrozen), mesh, 10, 0)

    def matmuls(program):
        text = program.step.lower(program.abstract, program.batch).as_text()
        return text.count("dot_general")

    assert matmuls(program) < 0.5 * matmuls(whole)


def test_adafactor_treats_the_layers_of_a_stack_separately(tiny_config):
    """Equals optax.adafactor on each layer alone; the dimensions are large enough to factor."""
    encoder = EncoderConfig(
        tiny_config("gemma2", embed_dim=160, hidden_dim=192, vocab_size=256), {"a": 1}
    )
    parameters = initial_parameters(encoder, jax.random.key(1))
    gradients = jax.tree.map(lambda leaf: jnp.cos(30 * leaf), parameters)
    moved, state = step(
        OptimizerConfig(1.0, name="adafactor", clip_norm=0.0),
        encoder,
        parameters,
        gradients,
        count=3,
    )
    layer_gradients = by_layer(encoder, gradients)
    reference = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    for path, leaf in by_layer(encoder, parameters).items():
        new = leaf
        reference_state = reference.init(leaf)
        for _ in range(3):
            updates, reference_state = reference.update(layer_gradients[path], reference_state, new)
            new = optax.apply_updates(new, updates)
        np.testing.assert_allclose(moved[path], new - leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    factored = find_moments(state, "v_row")
    assert factored.v_row["backbone"]["blocks"]["0"]["linear"].shape == (2, 160)
    assert factored.v_col["backbone"]["blocks"]["0"]["linear"].shape == (2, 192)


def test_factored_moments_are_sharded_as_their_parameter(tiny_config):
    encoder = EncoderConfig(
        tiny_config("gemma2", embed_dim=160, hidden_dim=192, vocab_size=256), {"a": 1}
    )
    mesh = sharding.make_mesh((1, 4, 2))
    optimizer = make_optimizer(OptimizerConfig(1.0, name="adafactor"), lambda step: 1.0, encoder)
    state = abstract_state(encoder, optimizer, mesh)
    factored = find_moments(state.optimizer, "v_row")

    def linear(tree):
        return tree["backbone"]["blocks"]["0"]["linear"]

    # linear is (layers, F = 192 over tensor, D = 160 over fsdp): v_row has D, v_col has F.
    assert linear(state.parameters).sharding.spec == P(None, "tensor", "fsdp")
    assert linear(factored.v_row).sharding.spec == P(None, "fsdp")
    assert linear(factored.v_col).sharding.spec == P(None, "tensor")
    assert linear(factored.v).sharding.spec == P()
    assert linear(factored.v).shape == (1,)
    real = initial_state(encoder, optimizer, mesh, 0)

    def is_sharded_as(leaf, abstract):
        return leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)

    assert jax.tree.all(jax.tree.map(is_sharded_as, real, state))


def test_moments_may_be_bfloat16(encoder, parameters):
    plain, _ = step(OptimizerConfig(1.0), encoder, parameters, count=5)
    rounded, state = step(
        OptimizerConfig(1.0, moment_dtype="bfloat16"), encoder, parameters, count=5
    )
    adam = find_moments(state, "mu")
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    for path, change in plain.items():
        # Eight bits of mantissa: each of the five steps, of size 1, has an error of at most 2^-8,
        # and so have the moments that were rounded before.
        np.testing.assert_allclose(rounded[path], change, rtol=2e-2, atol=5 * 2.0**-8, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "unknown optimizer.name 'adam'; did you mean 'adamw'"),
        ({"moment_dtype": "float16"}, "unknown optimizer.moment_dtype"),
        ({"freeze": "("}, "optimizer.freeze: .* is not a regular expression"),
        ({"multipliers": (("[", 2.0),)}, "optimizer.multipliers: .* is not a regular expression"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
    ],
)
def test_invalid_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(1.0, **changes)


def test_a_rule_that_matches_nothing_is_refused(encoder):
    for options in (
        OptimizerConfig(1.0, freeze="backbone/layer/0/.*"),
        OptimizerConfig(1.0, multipliers=(("embedding", 0.1),)),
    ):
        with pytest.raises(InputError, match="matches no parameter; paths look like backbone/"):
            trainable(options, encoder)
    with pytest.raises(InputError, match="freezes every parameter"):
        trainable(OptimizerConfig(1.0, freeze=".*"), encoder)
