"""Arrays on a CPU are stored as by Orbax, without copies of them."""

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

from gemma_encoder import digests
from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.weights import array_store
from tests.fuzz.cases import peak_of_memory, start_of_memory

PEAK = 1.3  # times the arrays, the bound that checkpoints promise
SHAPE = (32768, 128)  # 16 MB


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


def write_by_orbax(folder, tree):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(tree))
    return folder


def write(folder, tree):
    folder.mkdir()
    array_store.write_arrays(folder, tree)
    return folder


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype and leaf.sharding == other.sharding


@pytest.mark.parametrize("chunk", [array_store.CHUNK, 20])  # 20 bytes: several chunks in a shard
def test_each_reads_what_the_other_wrote(tmp_path, tree, monkeypatch, chunk):
    monkeypatch.setattr(array_store, "CHUNK", chunk)
    ours, theirs = write(tmp_path / "ours", tree), write_by_orbax(tmp_path / "orbax", tree)
    for folder in (ours, theirs):
        assert_equal(array_store.restore(folder, arguments_of(tree)), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.args.PyTreeRestore(item=tree, restore_args=arguments_of(tree))
        assert_equal(reader.restore(ours, args=arguments), tree)


def test_digests_are_those_of_the_files(tmp_path, tree):
    folder = tmp_path / "ours"
    folder.mkdir()
    written = array_store.write_arrays(folder, tree)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    assert written == {
        name: digests._digest_of_file(path) for name, path in files.items() if path.is_file()
    }


@pytest.mark.parametrize("dtype", ["bool", "int4", "uint16", "float16", "float8_e4m3fn"])
def test_all_dtypes_are_stored(tmp_path, dtype):
    tree = {"x": jnp.arange(6).reshape(2, 3).astype(dtype), "empty": jnp.zeros((0, 3), dtype)}
    folder = write(tmp_path / "ours", tree)
    assert_equal(array_store.restore(folder, arguments_of(tree)), tree)


def test_metadata_are_those_of_orbax(tmp_path, tree):
    """But for the shapes that replicas write, which Orbax shares among them."""
    metadata = []
    for folder in (write(tmp_path / "ours", tree), write_by_orbax(tmp_path / "orbax", tree)):
        content = read_object(folder / "_METADATA")
        for leaf in content["tree_metadata"].values():
            leaf["value_metadata"].pop("write_shape", None)
        metadata.append(content)
    assert metadata[0] == metadata[1]
    assert list(metadata[0]["tree_metadata"]) == list(metadata[1]["tree_metadata"])


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_or_read_can_be_donated(tmp_path, dtype):
    """A step reuses the memory: nothing refers to it after a save, nor after a restore.

    Of arrays this small, memory of NumPy's is aligned as JAX's is one time in four.
    """
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    arrays = {str(index): step(jnp.zeros((16, 64 + index))) for index in range(16)}
    folder = write(tmp_path / "ours", arrays)
    arguments = arguments_of({key: array.astype(dtype) for key, array in arrays.items()})
    restored = array_store.restore(folder, arguments)
    for before in (*arrays.values(), *restored.values()):
        memory = before.unsafe_buffer_pointer()
        assert step(before).unsafe_buffer_pointer() == memory


def peaks(folder, pipe):
    """Sends the peak memory of a save and of a restore over that of the arrays."""
    zeros = {"w": jnp.zeros((4, 4))}
    array_store.restore(write(folder / "first", zeros), arguments_of(zeros))  # starts threads
    leaf = jax.jit(lambda: jnp.ones(SHAPE))
    tree = jax.block_until_ready({f"w{i}": leaf() for i in range(16)})
    size = sum(array.nbytes for array in tree.values())
    arguments = arguments_of(tree)
    before = start_of_memory()
    write(folder / "ours", tree)
    saved = 1 + (peak_of_memory() - before) / size
    tree.clear()
    before = start_of_memory()
    tree |= array_store.restore(folder / "ours", arguments)
    pipe.send((saved, (peak_of_memory() - before) / size))


def test_peak_of_memory(tmp_path):
    """A save and a restore take little more memory than the arrays, in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peaks, args=(pathlib.Path(tmp_path), sender))
    process.start()
    sender.close()
    saved, restored = receiver.recv()
    process.join()
    assert 1 <= saved <= PEAK
    assert 0.9 <= restored <= PEAK
