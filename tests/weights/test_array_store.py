"""Arrays that Orbax stored are restored to CPUs without further copies of them."""

import multiprocessing
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.checkpoint_utils import construct_restore_args

from gemma_encoder.weights import array_store
from tests.fuzz.cases import peak_of_memory, start_of_memory

PEAK = 1.3  # times the arrays, the bound that checkpoints promise
SHAPE = (65536, 128)  # 32 MB


class Nothing(NamedTuple):
    """An empty state, as of optax."""


@pytest.fixture
def tree(mesh_of):
    """A tree with all kinds of nodes, sharded in several ways."""

    def put(array, *axes):
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(array, jax.sharding.NamedSharding(mesh_of(2, 2), spec))

    parameters = {
        "b": put(jnp.ones((), jnp.bfloat16)),
        "w": put(jnp.arange(24.0).reshape(6, 4), "data", "fsdp"),
        "z": put(jnp.zeros((2, 7, 6), jnp.int8), None, None, "data"),
    }
    optimizer = optax.masked(optax.adamw(1e-3), {"b": True, "w": True, "z": False})
    state = optax.chain(optax.clip(1.0), optimizer).init(parameters)
    empty = {"dict": {}, "list": [], "tuple": (), "none": None, "state": Nothing()}
    return {"optimizer": state, "step": put(jnp.int32(3)), "empty": empty, **parameters}


@pytest.fixture
def mesh_of():
    """`mesh_of(data, fsdp)`: a mesh of CPU devices."""

    def mesh(*shape):
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        return jax.sharding.Mesh(devices, ("data", "fsdp"))

    return mesh


def arguments_of(tree):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
    return construct_restore_args(abstract)


def write(folder, tree):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(tree))
    return folder


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype and leaf.sharding == other.sharding


def test_arrays_are_as_they_were_stored(tmp_path, tree):
    folder = write(tmp_path / "arrays", tree)
    assert_equal(array_store.restore(folder, arguments_of(tree)), tree)


def test_arrays_get_another_sharding_and_dtype(tmp_path, tree, mesh_of):
    folder = write(tmp_path / "arrays", tree)
    sharding = jax.sharding.NamedSharding(mesh_of(1, 3), jax.sharding.PartitionSpec("fsdp"))
    argument = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=(6, 4), dtype=jnp.bfloat16)
    restored = array_store.restore(folder, {"w": argument}, partial=True)
    assert_equal(restored, {"w": jax.device_put(tree["w"].astype(jnp.bfloat16), sharding)})


def test_other_arrays_are_refused(tmp_path, tree):
    folder = write(tmp_path / "ours", tree)
    fewer = {"step": tree["step"]}
    assert_equal(array_store.restore(folder, arguments_of(fewer), partial=True), fewer)
    with pytest.raises(ValueError, match="none missing, b, optimizer.+ in addition"):
        array_store.restore(folder, arguments_of(fewer))
    with pytest.raises(ValueError, match="other missing, none in addition"):
        array_store.restore(folder, arguments_of({**tree, "other": tree["step"]}))
    with pytest.raises(ValueError, match=r"step has shape \(\), expected \(6, 4\)"):
        array_store.restore(folder, arguments_of({**tree, "step": tree["w"]}))


def test_what_is_restored_can_be_donated(tmp_path):
    """A training step reuses the memory."""
    array = jnp.zeros((1024, 1024))
    folder = write(tmp_path / "arrays", {"w": array})
    restored = array_store.restore(folder, arguments_of({"w": array}))["w"]
    memory = restored.unsafe_buffer_pointer()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert step(restored).unsafe_buffer_pointer() == memory


def peak_of_a_restore(folder, pipe):
    """Sends the peak memory of a restore over that of the arrays."""
    zeros = {"w": jnp.zeros((4, 4))}
    array_store.restore(write(folder / "first", zeros), arguments_of(zeros))  # starts threads
    sharding = zeros["w"].sharding
    argument = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=SHAPE)
    arguments = {f"w{i}": argument for i in range(8)}
    before = start_of_memory()
    restored = array_store.restore(folder / "arrays", arguments)
    assert restored["w7"][-1, -1] == 1
    pipe.send((peak_of_memory() - before) / (8 * 4 * np.prod(SHAPE)))


def test_peak_of_memory(tmp_path):
    """A restore takes little more memory than the arrays, measured in a new process."""
    write(tmp_path / "arrays", {f"w{i}": jnp.ones(SHAPE) for i in range(8)})
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_of_a_restore, args=(pathlib.Path(tmp_path), sender))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    assert 0.9 <= peak <= PEAK
