"""Checkpoints have digests of all their files, whenever a save or an update is killed."""

import contextlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_encoder import digests
from gemma_encoder.inputs.errors import InputError
from gemma_encoder.inputs.json_text import read_object
from gemma_encoder.training import checkpoint, loop
from gemma_encoder.training.checkpoint import METRICS, Checkpoints
from gemma_encoder.training.state import TrainState
from gemma_encoder.weights import native

FIRST = pathlib.Path(__file__).parents[1] / "weights" / "format_1"
DATA = {"reader_00000": b"{}"}
MODES = pytest.mark.parametrize("in_background", [False, True])


class Killed(Exception):
    """Simulates a kill: nothing after it happens."""


@pytest.fixture(scope="module")
def spec():
    """`spec(step)`: an inference spec of a step."""
    import dataclasses

    first = native.load_inference_spec(native.find(FIRST))
    return lambda step: dataclasses.replace(first, step=step)


def state(step):
    scale = jnp.arange(5.0) + step
    return TrainState({"head": {"scale": scale}}, {"moment": -scale}, jnp.int32(step))


def open_folder(workdir, in_background=False):
    return Checkpoints(workdir, background=in_background)


def assert_restores(workdir, step):
    checkpoints = open_folder(workdir)
    assert checkpoints.latest_step() == step
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    restored, data = checkpoints.restore(step, abstract, list(DATA))
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert data == DATA
    checkpoints.close()


@MODES
@pytest.mark.parametrize("metrics", [{}, {"best": 0.5}])
def test_digests_name_all_files(tmp_path, spec, in_background, metrics):
    checkpoints = open_folder(tmp_path, in_background)
    for step in (1, 2):
        checkpoints.save(state(step), spec(step), DATA, metrics)
    checkpoints.close()
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / str(step)
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        files = {name for name in files if (folder / name).is_file()}
        assert read_object(folder / digests.NAME)["files"].keys() == files - {digests.NAME}
        assert ("metrics/metrics" in files) == bool(metrics)
        digests.check(folder)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert_restores(tmp_path, 2)


@MODES
@pytest.mark.parametrize("written", [False, True])
def test_a_kill_before_the_rename_leaves_no_checkpoint(
    tmp_path, spec, monkeypatch, in_background, written
):
    checkpoints = open_folder(tmp_path, in_background)
    checkpoints.save(state(1), spec(1), DATA, {})
    checkpoints.wait()
    write = digests.write

    def killed(folder):
        if written:
            write(folder)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(digests, "write", killed)
        with pytest.raises(InputError, match="checkpoint of step 2 could not be written"):
            checkpoints.save(state(2), spec(2), DATA, {})
            checkpoints.wait()
    assert native.checkpoint_steps(tmp_path) == [1]
    (left,) = (tmp_path / "checkpoints").glob(f"*{checkpoint.ocp.path.atomicity.TMP_DIR_SUFFIX}*")
    assert_restores(tmp_path, 1)
    assert not left.exists()
    if written:  # the same process saves again
        checkpoints.save(state(2), spec(2), DATA, {})
    else:
        checkpoints = open_folder(tmp_path, in_background)
        checkpoints.save(state(3), spec(3), DATA, {})
    checkpoints.close()
    newest = native.checkpoint_steps(tmp_path)[-1]
    digests.check(tmp_path / "checkpoints" / str(newest))
    assert_restores(tmp_path, newest)


@MODES
def test_a_kill_while_deleting_leaves_nothing_in_part(tmp_path, spec, monkeypatch, in_background):
    """A checkpoint that is best no longer is deleted after an evaluation, others after a save."""

    rmtree = shutil.rmtree

    def killed(path, ignore_errors=False):
        if ignore_errors:  # of what a former deletion left
            rmtree(path, ignore_errors=True)
            return
        (pathlib.Path(path) / digests.NAME).unlink()
        raise Killed

    checkpoints = open_folder(tmp_path, in_background)
    for step in (1, 2, 3, 4):
        checkpoints.save(state(step), spec(step), DATA, {"best": 0.5} if step == 1 else {})
        checkpoints.wait()
    assert native.checkpoint_steps(tmp_path) == [1, 3, 4]  # 2 was deleted after a save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(InputError):
            checkpoints.add_evaluation(spec(4), {"best": 0.75})
        assert native.checkpoint_steps(tmp_path) == [3, 4]
        with contextlib.suppress(InputError, Killed):  # the deletion is after the commit
            checkpoints.save(state(5), spec(5), DATA, {})
            checkpoints.wait()
        assert native.checkpoint_steps(tmp_path) == [4, 5]
    for step in (4, 5):
        digests.check(tmp_path / "checkpoints" / str(step))
    open_folder(tmp_path).close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert_restores(tmp_path, 5)


@pytest.mark.parametrize("survivors", range(5))
def test_an_evaluation_that_is_killed_leaves_it_whole(tmp_path, spec, killed_after, survivors):
    """After each of its file operations: the digests, two contents, the digests again."""
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(1), spec(1), DATA, {})
    with killed_after(survivors, Killed):
        try:
            checkpoints.add_evaluation(spec(1), {"best": 0.5})
            assert survivors == 4
        except InputError:
            assert survivors < 4
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    digests.check(folder)
    assert_restores(tmp_path, 1)
    checkpoints = open_folder(tmp_path)
    # The metrics come last: without them, the evaluation is repeated, and recorded.
    assert (checkpoints.best() == (1, 0.5)) == (survivors > 2)
    checkpoints.add_evaluation(spec(1), {"best": 0.75})
    assert checkpoints.best() == (1, 0.75)
    checkpoints.close()
    digests.check(folder)


@pytest.mark.parametrize("content", [(), ("inference", "parameters/d")])
def test_a_step_whose_folder_is_empty_can_be_saved(tmp_path, spec, content, caplog):
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(1), spec(1), DATA, {})
    checkpoints.close()
    for name in ("", *content):
        (tmp_path / "checkpoints" / "2" / name).mkdir(parents=True)
    assert_restores(tmp_path, 1)
    assert "2 holds no file and is skipped" in caplog.text
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(2), spec(2), DATA, {})
    checkpoints.close()
    assert_restores(tmp_path, 2)


@pytest.mark.parametrize("has_digests", [True, False])
@pytest.mark.parametrize("content", [None, b"", b'{"best": ', b"[]", b'{"best": "x"}', b"{}"])
def test_damaged_metrics_of_any_checkpoint_are_one_line(tmp_path, spec, content, has_digests):
    checkpoints = open_folder(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state(step), spec(step), DATA, {"best": float(step)})
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "2"
    if not has_digests:
        (folder / digests.NAME).unlink()
    if content is None:
        (folder / METRICS).unlink()
    else:
        (folder / METRICS).write_bytes(content)
    if content is None and not has_digests:  # as after a save without an evaluation
        assert_restores(tmp_path, 3)
        return
    with pytest.raises(InputError) as caught:
        open_folder(tmp_path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(folder)) and f"move {folder} away" in line
    shutil.rmtree(folder)
    assert_restores(tmp_path, 3)


@pytest.mark.parametrize(
    ("part", "has_digests"),
    [
        ("parameters", True),
        *((part, False) for part in ("parameters", "training", "data", "inference")),
    ],
)
def test_a_checkpoint_without_a_part_is_not_resumed(micro, tmp_path, run, part, has_digests):
    workdir = shutil.copytree(run, tmp_path / "run")
    newest = workdir / "checkpoints" / "2"
    shutil.rmtree(newest / part)
    if not has_digests:
        (newest / digests.NAME).unlink()
    with pytest.raises(InputError) as caught:
        loop.train(micro(**STEPS), workdir)
    line = str(caught.value)
    assert str(newest) in line and f"before it is {newest.with_name('1')}" in line
    assert "\n" not in line and f"move {newest} away to resume" in line


STEPS = {"train_for": "2 steps", "checkpoint_every": "1 steps", "max_eval_examples": 4}


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    """Workdir of a run with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(micro(**STEPS), workdir)
    return workdir


def test_a_run_resumes_from_the_checkpoint_before(micro, tmp_path, run):
    workdir = shutil.copytree(run, tmp_path / "run")
    newest = workdir / "checkpoints" / "2"
    chunk = max((newest / "training").rglob("*"), key=lambda path: path.stat().st_size)
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{chunk.name} is damaged: its content is not what was"):
        loop.train(micro(**STEPS), workdir)
    shutil.move(newest, tmp_path / "away")
    assert loop.train(micro(**STEPS), workdir).step == 2
    digests.check(newest)


def test_a_renamed_checkpoint_is_not_resumed(micro, tmp_path, run):
    """Steps saved after it would be older than it by name."""
    workdir = shutil.copytree(run, tmp_path / "run")
    renamed = (workdir / "checkpoints" / "2").rename(workdir / "checkpoints" / "9")
    with pytest.raises(InputError, match=f"{renamed} holds step 2 under another name; rename it"):
        loop.train(micro(**STEPS), workdir)


def test_a_file_instead_of_all_checkpoints(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(InputError, match="checkpoints is no folder; move it away, or choose"):
        open_folder(tmp_path)


@pytest.mark.parametrize("command", [loop.train, loop.evaluate])
def test_a_checkpoint_is_no_workdir(micro, run, command):
    with pytest.raises(InputError, match="1 is a checkpoint, not a workdir; name the folder of"):
        command(micro(**STEPS), run / "checkpoints" / "1")
    assert not (run / "checkpoints" / "1" / "checkpoints").exists()


def test_cloud_storage_keeps_the_default_of_orbax(monkeypatch, tmp_path):
    """There Orbax commits by a file, and no digests are written."""
    classes = []

    class Manager:
        def __init__(self, folder, options):
            classes.append(options.temporary_path_class)

    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", Manager)
    monkeypatch.setattr(checkpoint.native, "checkpoint_steps", lambda workdir: [])
    Checkpoints("gs://bucket/run")
    Checkpoints(tmp_path)
    assert classes == [None, checkpoint.DigestedPath]


@MODES
def test_plain_orbax_restores_a_checkpoint(tmp_path, spec, in_background):
    checkpoints = open_folder(tmp_path, in_background)
    checkpoints.save(state(3), spec(3), DATA, {"best": 0.5})
    checkpoints.close()
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        arguments = ocp.args.StandardRestore(state(0).parameters)
        restored = manager.restore(3, args=ocp.args.Composite(parameters=arguments))
        assert manager.metrics(3) == {"best": 0.5}
    jax.tree.map(np.testing.assert_array_equal, restored.parameters, state(3).parameters)
