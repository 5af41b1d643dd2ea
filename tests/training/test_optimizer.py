"""Optimisers by config: rules that see single layers, frozen parameters, factored moments; on any mesh."""

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
    """Gemma 3's pattern twice and one layer more: stacked blocks of two layers each, and a rest."""
    return EncoderConfig(tiny_config("gemma3"), {"a": 3})


@pytest.fixture(scope="module")
def parameters(encoder):
    return jax.tree.map(lambda leaf: leaf + 0.5, initial_parameters(encoder, jax.random.key(0)))


def by_layer(encoder, parameters):
    """Each parameter by its single layer's path."""
    found = {}
    for path, leaf in parameter_paths(parameters).items():
        layers = layer_paths(encoder.transformer, path)
        found |= {
            layer: leaf[i] if path.startswith("backbone/blocks") else leaf
            for i, layer in enumerate(layers)
        }
    return found


def step(options, encoder, parameters, gradients=None, count=1):
    """The change of each parameter, by its single layer's path, in `count` steps with a learning rate of one."""
    optimizer, changes = (
        make_optimizer(options, lambda step: 1.0, encoder),
        trainable(options, encoder),
    )
    trained = select(parameters, changes)
    state = optimizer.init(trained)
    gradients = select(gradients or jax.tree.map(jnp.sin, parameters), changes)
    new = trained
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, new)
        new = optax.apply_updates(new, updates)
    whole = merge_parameters(new, select(parameters, lambda path: not changes(path)))
    return jax.tree.map(
        lambda a, b: np.asarray(a - b), by_layer(encoder, whole), by_layer(encoder, parameters)
    ), state


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


def test_weight_decay_leaves_out_norms_biases_and_embeddings(encoder, parameters):
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    moved, _ = step(OptimizerConfig(1.0, weight_decay=0.5), encoder, parameters, zeros)
    for path, leaf in by_layer(encoder, parameters).items():
        left_out = path.endswith(("scale", "bias", "embedding"))
        np.testing.assert_allclose(
            moved[path], 0 * leaf if left_out else -0.5 * leaf, rtol=1e-5, err_msg=path
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
        factor *= (
            10
            if path.startswith("heads/")
            else 4
            if layer == 3 and "/layers/" in path
            else 2
            if path.endswith("/linear")
            else 1
        )
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
    adam = next(
        part
        for part in jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "mu"))
        if hasattr(part, "mu")
    )
    held = parameter_paths(adam.mu)
    # Layers 0 and `period` are one stack, wholly frozen; 1 and 1 + period are another, of which one layer is trained.
    assert (
        "backbone/embedding" not in held
        and "backbone/blocks/0/query" not in held
        and "backbone/blocks/1/query" in held
    )


def test_a_frozen_parameter_gets_no_gradient(micro):
    from gemma_encoder.training.build import build
    from gemma_encoder.training.step import make_program

    recipe = build(micro(optimizer__freeze=r"backbone/.*", batch__examples_per_step=8))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    program = make_program(recipe, mesh, 10, 0)
    text = program.step.lower(program.abstract, program.batch).as_text()
    whole = make_program(
        dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, freeze="")),
        mesh,
        10,
        0,
    )
    assert text.count("dot_general") < 0.5 * whole.step.lower(
        whole.abstract, whole.batch
    ).as_text().count("dot_general")


def test_adafactor_treats_each_layer_of_a_stack_by_itself(tiny_config):
    """Against optax.adafactor on every layer's parameters alone, with dimensions that are large enough to be factored."""
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
    alone, alone_gradients = by_layer(encoder, parameters), by_layer(encoder, gradients)
    reference = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    for path, leaf in alone.items():
        new, memory = leaf, reference.init(leaf)
        for _ in range(3):
            updates, memory = reference.update(alone_gradients[path], memory, new)
            new = optax.apply_updates(new, updates)
        np.testing.assert_allclose(moved[path], new - leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    factored = next(
        part
        for part in jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "v_row"))
        if hasattr(part, "v_row")
    )
    assert factored.v_row["backbone"]["blocks"]["0"]["linear"].shape == (2, 160)
    assert factored.v_col["backbone"]["blocks"]["0"]["linear"].shape == (2, 192)


def test_factored_moments_lie_where_their_parameter_does(tiny_config):
    encoder = EncoderConfig(
        tiny_config("gemma2", embed_dim=160, hidden_dim=192, vocab_size=256), {"a": 1}
    )
    mesh = sharding.make_mesh((1, 4, 2))
    optimizer = make_optimizer(OptimizerConfig(1.0, name="adafactor"), lambda step: 1.0, encoder)
    state = abstract_state(encoder, optimizer, mesh)
    factored = next(
        part
        for part in jax.tree.leaves(state.optimizer, is_leaf=lambda part: hasattr(part, "v_row"))
        if hasattr(part, "v_row")
    )
    # linear is (layers, F = 192 over tensor, D = 160 over fsdp): the row keeps D, the column F.
    assert state.parameters["backbone"]["blocks"]["0"]["linear"].sharding.spec == P(
        None, "tensor", "fsdp"
    )
    assert factored.v_row["backbone"]["blocks"]["0"]["linear"].sharding.spec == P(None, "fsdp")
    assert factored.v_col["backbone"]["blocks"]["0"]["linear"].sharding.spec == P(None, "tensor")
    assert factored.v["backbone"]["blocks"]["0"]["linear"].sharding.spec == P() and factored.v[
        "backbone"
    ]["blocks"]["0"]["linear"].shape == (1,)
    real = initial_state(encoder, optimizer, mesh, 0)
    assert jax.tree.all(
        jax.tree.map(
            lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim),
            real,
            state,
        )
    )


def test_moments_may_be_bfloat16(encoder, parameters):
    plain, _ = step(OptimizerConfig(1.0), encoder, parameters, count=5)
    rounded, state = step(
        OptimizerConfig(1.0, moment_dtype="bfloat16"), encoder, parameters, count=5
    )
    adam = next(
        part
        for part in jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "mu"))
        if hasattr(part, "mu")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    for path, change in plain.items():
        # Eight bits of mantissa: each of the five steps, of size one, is off by at most 2^-8 of it, and what was rounded before by as much.
        np.testing.assert_allclose(rounded[path], change, rtol=2e-2, atol=5 * 2.0**-8, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "unknown optimizer.name 'adam'; did you mean 'adamw'"),
        ({"moment_dtype": "float16"}, "unknown optimizer.moment_dtype"),
        ({"freeze": "("}, "optimizer.freeze: .* is no regular expression"),
        ({"multipliers": (("[", 2.0),)}, "optimizer.multipliers: .* is no regular expression"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
    ],
)
def test_wrong_options_are_refused(changes, message):
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
