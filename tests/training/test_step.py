"""The compiled step: equal on all meshes, compiled once, with donated and sharded state."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from gemma_encoder.data.pipeline import TrainStream
from gemma_encoder.model import sharding
from gemma_encoder.model.encoder import parameter_paths
from gemma_encoder.model.sizes import GEMMA_CONFIGS
from gemma_encoder.training.build import build
from gemma_encoder.training.optimizer import MANY, _blocks, global_norm, make_optimizer
from gemma_encoder.training.optimizer_config import OptimizerConfig
from gemma_encoder.training.state import initial_state
from gemma_encoder.training.step import make_program

STEPS = 3


def run(config, mesh_shape, devices):
    recipe = build(config, for_training=True)
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[:devices])
    # Adam divides by the root of squared gradients: with a small epsilon, it would amplify the
    # rounding of a zero gradient to a whole step.
    recipe = dataclasses.replace(recipe, optimizer=OptimizerConfig(1e-2, "constant", epsilon=1e-4))
    program = make_program(recipe, mesh, 100, 0)
    state = initial_state(recipe.encoder, program.optimizer, mesh, seed=3)
    stream = TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream)
    losses = []
    for batch in itertools.islice(stream, STEPS):
        before = state
        state, metrics = program.step(state, program.shard(batch))
        losses.append(float(metrics.loss))
    stream.close()
    assert program.step.function._cache_size() == 1
    donated = [leaf.is_deleted() for leaf in jax.tree.leaves(before.parameters)]
    assert all(donated)
    assert int(state.step) == STEPS
    return losses, jax.device_get(state.parameters), state


@pytest.fixture
def reference(micro):
    return run(micro(model__attention_dropout=0.1), (1, 1, 1), 1)


def test_meshes_agree(micro, reference):
    losses, parameters, _ = reference
    assert losses[0] != losses[-1]
    for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
        other_losses, other_parameters, state = run(micro(model__attention_dropout=0.1), shape, 8)
        # Sums over shards round in another order: a few float32 units per step.
        np.testing.assert_allclose(other_losses, losses, rtol=2e-5, err_msg=str(shape))
        for path, value in parameter_paths(parameters).items():
            np.testing.assert_allclose(
                parameter_paths(other_parameters)[path],
                value,
                rtol=1e-4,
                atol=2e-5,
                err_msg=f"{shape} {path}",
            )
        if shape == (1, 8, 1):
            query = state.parameters["backbone"]["blocks"]["0"]["query"]
            assert query.sharding.spec == P(None, "fsdp", "tensor", None)
            assert query.addressable_shards[0].data.size * 8 == query.size
            adam = next(
                part
                for part in jax.tree.leaves(
                    state.optimizer, is_leaf=lambda part: hasattr(part, "mu")
                )
                if hasattr(part, "mu")
            )
            for moment in (adam.mu, adam.nu):
                assert moment["backbone"]["blocks"]["0"]["query"].sharding == query.sharding


def test_dropout_depends_on_seed_and_step(micro):
    losses = {}
    for seed in (0, 1):
        recipe = build(
            micro(model__feed_forward_dropout=0.5, seed=seed, optimizer__learning_rate=0.0),
            for_training=True,
        )
        mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        program = make_program(recipe, mesh, 100, 0)
        state = initial_state(recipe.encoder, program.optimizer, mesh, seed=3)
        batch = program.shard(
            next(TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream))
        )
        losses[seed] = []
        for _ in range(2):  # the learning rate is zero: only the dropout differs
            state, metrics = program.step(state, batch)
            losses[seed].append(float(metrics.loss))
    assert len({*losses[0], *losses[1]}) == 4


def test_micro_batches_give_the_gradient_of_the_whole_batch(micro):
    """The same rows as one batch and as four micro-batches, with lists in one micro-batch each."""
    changes = {
        "batch__rows": 16,
        "batch__micro_batches": 4,
        "ranking__list_size": 2,
        "optimizer__schedule": "constant",
        "optimizer__epsilon": 1e-4,
    }
    recipe = build(micro(model__feed_forward_dropout=0.0, **changes), for_training=True)
    mesh = sharding.make_mesh((2, 1, 1), jax.devices()[:2])
    stream = TrainStream(recipe.sources, recipe.rates(), recipe.tokenizer, recipe.stream)
    batches = list(itertools.islice(stream, STEPS))
    stream.close()
    groups = recipe.losses.groups
    assert any((batch.group_id >= 0).any() for batch in batches)
    results = []
    for parts in (4, 1):
        shape = recipe.stream.shape
        split_recipe = dataclasses.replace(
            recipe,
            stream=dataclasses.replace(recipe.stream, micro_batches=parts),
            losses=recipe.losses._replace(groups=4 * groups // parts),
        )
        program = make_program(split_recipe, mesh, 100, 0)
        state = initial_state(recipe.encoder, program.optimizer, mesh, seed=3)
        losses = []
        for batch in batches:
            if parts == 1:  # group ids start at 0 in each micro-batch: make them unique
                micro_batch = np.arange(shape.rows)[:, None] // (shape.rows // 4)
                group_id = batch.group_id + micro_batch * groups
                group_id = np.where(batch.group_id < 0, -1, group_id).astype(np.int32)
                batch = batch._replace(group_id=group_id)
            state, metrics = program.step(state, program.shard(batch))
            losses.append(
                [
                    float(metrics.loss),
                    float(metrics.gradient_norm),
                    float(metrics.texts),
                    *(float(part.count) for part in metrics.tasks.values()),
                ]
            )
        results.append((losses, parameter_paths(jax.device_get(state.parameters))))
    (losses, parameters), (whole_losses, whole_parameters) = results
    # Four sums instead of one: a few float32 units.
    np.testing.assert_allclose(losses, whole_losses, rtol=2e-5)
    for path, value in whole_parameters.items():
        np.testing.assert_allclose(parameters[path], value, rtol=1e-4, atol=2e-5, err_msg=path)


def count_equations(jaxpr) -> int:
    """Counts the equations of a program, inner programs included."""
    return sum(
        1 + sum(count_equations(inner) for inner in core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def test_depth_hardly_changes_the_size_of_the_step(micro):
    """Compares 62 layers (ten periods of six, and two) with 12 (two periods) of Gemma 3."""
    recipe = build(micro(batch__examples_per_step=8))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    sizes = {}
    for num_layers in (12, 62):
        transformer = dataclasses.replace(
            recipe.encoder.transformer,
            num_layers=num_layers,
            pattern=GEMMA_CONFIGS["gemma3_27b"].pattern,
        )
        encoder = dataclasses.replace(recipe.encoder, transformer=transformer, remat="full")
        program = make_program(dataclasses.replace(recipe, encoder=encoder), mesh, 100, 0)
        sizes[num_layers] = count_equations(
            program.step.trace(program.abstract, program.batch).jaxpr.jaxpr
        )
    assert sizes[62] <= 1.5 * sizes[12], sizes


def test_initial_values_do_not_depend_on_the_mesh(micro):
    recipe = build(micro())
    optimizer = make_optimizer(recipe.optimizer, lambda step: 1.0, recipe.encoder)
    states = [
        initial_state(recipe.encoder, optimizer, sharding.make_mesh(shape, jax.devices()[:n]), 7)
        for shape, n in (((1, 1, 1), 1), ((2, 2, 2), 8))
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b)),
        states[0].parameters,
        states[1].parameters,
    )
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(states[0]))


def test_seeds_share_a_program_with_different_keys(micro):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    programs = [
        make_program(build(micro(seed=seed, batch__examples_per_step=8)), mesh, 10, 0)
        for seed in (0, 1)
    ]
    texts = [program.step.lower(program.abstract, program.batch).as_text() for program in programs]
    assert texts[0] == texts[1]
    assert (programs[0].step.key != programs[1].step.key).any()


def test_the_norm_of_all_leaves():
    rng = np.random.default_rng(0)
    shapes = {
        "a": (7, 5, 300),
        "b": (11,),
        "table": (MANY // 64, 65),
        "stacked": (2, 640, MANY // 1000),
    }
    tree = {
        "d": np.float32(3.0),
        "nested": {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        },
    }
    squares = [np.asarray(leaf, np.float64) ** 2 for leaf in jax.tree.leaves(tree)]
    expected = np.sqrt(sum(map(np.sum, squares)))
    # Sums of at most 1.4 million float32 squares, in blocks or by row.
    np.testing.assert_allclose(global_norm(jax.tree.map(jnp.asarray, tree)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "rows"),
    [
        ((262_144, 640), 0, 32),  # an embedding
        ((256_000, 2304), 0, 25),
        ((3, 640, 2, 2048), 1, 5),  # stacked layers
        ((3, 2048, 640), 1, 8),
        ((3, 4, 256, 640), 0, 3),
        ((2048, 256), 0, 8),
        ((256, 256), 0, 1),
        ((100_000,), 0, 1),
    ],
)
def test_blocks_of_a_sum_of_squares_are_whole_on_shards(shape, axis, rows):
    assert _blocks(shape) == (axis, rows)
    for shards in (1 << power for power in range(9)):
        assert shape[axis] % shards or shape[axis] // shards % rows == 0 or rows == 1


def test_squares_are_not_written_to_memory():
    table = jax.ShapeDtypeStruct((MANY // 64, 128), jnp.float32)
    program = jax.jit(global_norm).lower({"table": table}).compile()
    assert program.memory_analysis().temp_size_in_bytes < table.size * 4 / 16
